"""`sluice rollout`: whom the canary answers, and the plan by which it gets more of them."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from math import isnan
from typing import Annotated, Any, Literal

import typer

from app.cli.access import client_settings, gateway_client
from app.cli.audit import rollout_verify
from app.cli.deploy import application_of
from app.cli.options import AsJson, PlanFile, Reason, Token, Url
from app.cli.rollout_report import rollout_report
from app.cli.terminal import err, fail, out, told

_USAGE = 2
_DELETED_S = 60.0  # replicas answer what they have taken, for up to 10 s, before they end
_SEEN_EVERYWHERE_S = 1.0  # in which every worker of every gateway has heard of a share

commands = typer.Typer(no_args_is_help=True, help="Whom the canary answers, and the plan by which it gets more.")
commands.command("report")(rollout_report)
commands.command("verify")(rollout_verify)


@commands.command("show")
def rollout_show(url: Url = None, token: Token = None, as_json: AsJson = False) -> None:
    """Show what is in force; of a plan, how far it is and what its guards have seen."""
    with gateway_client(client_settings(), url, token, "ops") as gateway:
        _print_rollout(told(gateway.rollout), as_json)


@commands.command("set")
def rollout_set(
    fraction: Annotated[
        float | None, typer.Argument(help="Share of callers whom Ray Serve answers.", min=0, max=1)
    ] = None,
    canary: Annotated[bool, typer.Option("--canary", help="The share is the canary's, whatever its backend.")] = False,
    account: Annotated[str | None, typer.Option(help="Whose share: sub:NAME, sub:TENANT/NAME or tenant:NAME.")] = None,
    clear: Annotated[bool, typer.Option("--clear", help="The account has the common share again.")] = False,
    reason: Reason = "",
    url: Url = None,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Change a share; 0 sends everybody back to legacy. A plan that is being run stops, unless it is an account's."""
    if clear == (fraction is not None) or (fraction is not None and isnan(fraction)):
        fail("give a share, or --clear", _USAGE)
    if clear and (account is None or canary):
        fail("--clear needs an --account and no --canary", _USAGE)
    wish: dict[str, Any] = {"clear": True} if clear else {"share" if canary else "ray_serve_fraction": fraction}
    if account is not None:
        wish["account"] = account
    with gateway_client(client_settings(), url, token, "ops admin") as gateway:
        _print_rollout(told(lambda: gateway.change_share({**wish, "reason": reason})), as_json)


@commands.command("plan")
def rollout_plan(as_json: AsJson = False) -> None:
    """Print the default plan, to begin one's own from."""
    from app.cli.plans import plan_document, read_plan, toml_of

    document = plan_document(read_plan(None))
    print(json.dumps(document, indent=2) if as_json else toml_of(document), end="\n" if as_json else "")


@commands.command("start")
def rollout_start(
    plan: PlanFile = None, reason: Reason = "", url: Url = None, token: Token = None, as_json: AsJson = False
) -> None:
    """Begin a plan; without a file, the default one from legacy to Ray Serve."""
    from app.cli.plans import plan_document, read_plan

    _move("start", {"plan": plan_document(read_plan(plan)), "reason": reason}, url, token, as_json)


@commands.command("pause")
def rollout_pause(reason: Reason = "", url: Url = None, token: Token = None, as_json: AsJson = False) -> None:
    """Stay at the present step; its guards are watched on."""
    _move("pause", {"reason": reason}, url, token, as_json)


@commands.command("resume")
def rollout_resume(reason: Reason = "", url: Url = None, token: Token = None, as_json: AsJson = False) -> None:
    """Go on after a pause; the step begins anew."""
    _move("resume", {"reason": reason}, url, token, as_json)


@commands.command("promote")
def rollout_promote(reason: Reason = "", url: Url = None, token: Token = None, as_json: AsJson = False) -> None:
    """On to the next step now: opens a manual gate, and waits for nothing."""
    with gateway_client(client_settings(), url, token, "ops admin") as gateway:
        # From where it stands now: where somebody else is quicker, their step is not followed by one more.
        wish = {"reason": reason, "epoch": told(gateway.rollout)["epoch"]}
        _print_rollout(told(lambda: gateway.move_rollout("promote", wish)), as_json)


@commands.command("rollback")
def rollback(
    to: Annotated[
        Literal["stable", "legacy"], typer.Option(help="stable: nobody on the canary. legacy: everybody on legacy.")
    ] = "stable",
    delete: Annotated[
        bool, typer.Option("--delete", help="Then delete our applications on Ray Serve that serve nobody any more.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Delete without asking.")] = False,
    reason: Reason = "",
    url: Url = None,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Send everybody back at once; ends the plan that is being run."""
    document = _move("rollback", {"to": to, "reason": reason}, url, token, as_json)
    if delete:
        _delete_idle(document, yes, moved_at=time.monotonic())


def _move(move: str, wish: dict[str, Any], url: str | None, token: str | None, as_json: bool) -> dict[str, Any]:
    with gateway_client(client_settings(), url, token, "ops admin") as gateway:
        document = told(lambda: gateway.move_rollout(move, wish))
    _print_rollout(document, as_json)
    return document


def _print_rollout(document: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(document))
        return
    from app.cli.rollout_view import render

    out.print(render(document, time.time()))


def _delete_idle(document: dict[str, Any], yes: bool, moved_at: float) -> None:
    """Delete what serves nobody, once every gateway has heard that it serves nobody."""
    from app.serve_api import DeployFailed, ServeApi, declared

    settings = client_settings()
    try:
        with ServeApi(settings.ray_dashboard_url, token=settings.ray_auth_token()) as api:
            names = idle_applications(document, our_applications(declared(api.instance())))
            if not names:
                err.print("nothing to delete: no application of ours is idle")
                return
            if not yes:
                _ask(names)
            time.sleep(max(0.0, moved_at + _SEEN_EVERYWHERE_S - time.monotonic()))
            api.delete(names)
            left = api.wait_gone(names, timeout_s=_DELETED_S, clock=time.monotonic)
    except DeployFailed as error:
        fail(str(error))
    if left:
        fail(f"Ray Serve is still deleting {', '.join(left)} after {_DELETED_S:.0f} s; every other one stays")
    err.print(f"{', '.join(names)} deleted on Ray Serve; every other one stays", markup=False)


def our_applications(declared: Mapping[str, Any]) -> list[str]:
    """Names of the applications that are ours: somebody else's may begin as ours do.

    Args:
        declared: Configurations by name, as they were declared.
    """
    from serve_app.contract import APP_NAME
    from serve_app.serve_config import IMPORT_PATH

    return [
        name
        for name, config in declared.items()
        if (name == APP_NAME or name.startswith(f"{APP_NAME}-")) and config.get("import_path") == IMPORT_PATH
    ]


def idle_applications(document: dict[str, Any], ours: list[str]) -> list[str]:
    """Those of our applications to which the stable arm sends nobody."""
    from app.backends.base import Arm

    if Arm.parse(document["stable"]).backend == "legacy":
        return ours if "legacy" in document["backends"] else []  # without it Ray Serve answers whatever the share says
    # A version of the stable arm may be the default application's, so only the canary's own is certain to be idle.
    canary = Arm.parse(document["canary"])
    return [name for name in ours if canary.version is not None and name == application_of(canary)]


def _ask(names: list[str]) -> None:
    if not sys.stdin.isatty():
        fail("nothing was deleted: say --yes where nobody can be asked")
    if not typer.confirm(f"Delete {', '.join(names)} on Ray Serve?"):
        fail("nothing was deleted")
