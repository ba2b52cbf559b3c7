"""`sluice migrate`: the model onto Ray Serve, and the callers after it by a plan."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group
from rich.live import Live
from rich.text import Text

from app.cli.access import client_settings, gateway_client
from app.cli.deploy import application_of, known_version, put_application, served_application, served_model
from app.cli.options import Device, Engine, PlanFile, Profile, Reason, Size, Token, Url, WaitS
from app.cli.terminal import err, fail, out, told
from app.settings import Settings

if TYPE_CHECKING:
    from app.backends.base import Arm
    from app.cli.rollout_view import Progress
    from app.client import GatewayClient
    from app.rollout.plan import Plan

_USAGE = 2
_INTERRUPTED = 130  # as a shell says of a command that SIGINT ended
_LOOK_PERIOD_S = 1.0
_LINE_PERIOD_S = 30.0
_SILENCE_S = 60.0  # a gateway that is replaced is back within it


def migrate(
    plan: PlanFile = None,
    version: Annotated[
        str | None, typer.Option(help="From what Ray Serve serves now to this version or alias, put beside it.")
    ] = None,
    no_deploy: Annotated[bool, typer.Option("--no-deploy", help="The application is there already.")] = False,
    profile: Profile = "local",
    size: Size = "local",
    engine: Engine = "torch",
    device: Device = "cpu",
    wait_s: WaitS = 300.0,
    reason: Reason = "",
    url: Url = None,
    token: Token = None,
) -> None:
    """Deploy beside what serves, then move the callers by a plan and show how far it is.

    Ends with 0 when the plan is done, with 1 when it was rolled back or stopped.
    """
    from app.cli.plans import plan_document, read_plan

    settings = client_settings()
    whole = _between_versions(settings, read_plan(plan), version)
    canary = whole.canary.arm()
    with gateway_client(settings, url, token, "ops admin") as gateway:
        _require_nothing_runs(told(gateway.rollout))
        if not no_deploy:
            _deploy(settings, canary, wait_s, profile=profile, size=size, engine=engine, device=device)
        _await_ready(gateway, canary, wait_s)
        begun = told(lambda: gateway.move_rollout("start", {"plan": plan_document(whole), "reason": reason}))
        try:
            end = _watch(gateway, begun)
        except KeyboardInterrupt:
            err.print("\nthe plan goes on without this terminal: `sluice rollout show`, `sluice rollout rollback`")
            raise SystemExit(_INTERRUPTED) from None
    _tell_end(end, begun["run"]["id"])


def _between_versions(settings: Settings, plan: Plan, version: str | None) -> Plan:
    """The plan with its arms; an alias is pinned to the version that it stands for now."""
    from app.rollout.plan import ArmName

    if version is None:
        return plan
    if plan.model_fields_set & {"stable", "canary"}:
        fail("the plan names its arms: give no --version", _USAGE)
    canary = ArmName(backend="ray_serve", version=known_version(settings, version))
    return plan.model_copy(update={"stable": ArmName(backend="ray_serve"), "canary": canary})


def _require_nothing_runs(document: dict[str, Any]) -> None:
    from app.rollout.record import ACTIVE

    run = document["run"]
    if run is not None and run["phase"] in ACTIVE:
        fail(f"the plan {run['plan']['name']} is {run['phase']}: let it end, or roll it back")


def _deploy(settings: Settings, canary: Arm, wait_s: float, *, engine: str, device: str, **options: str) -> None:
    """Put what the canary answers with; what else is there stays as it is."""
    if canary.backend != "ray_serve":
        fail(f"{canary} is not on Ray Serve: say --no-deploy", _USAGE)
    application = served_application(
        lambda: served_model(settings, canary.version or "latest", engine, device),
        name=application_of(canary),
        **options,
    )
    put_application(settings, application, wait_s)


def _await_ready(gateway: GatewayClient, canary: Arm, wait_s: float) -> None:
    """Wait until the gateway itself has had an answer from the canary's backend, and knows its version."""
    deadline = time.monotonic() + wait_s
    while not told(lambda: _is_ready(gateway, canary)):
        if time.monotonic() > deadline:
            fail(f"{canary} did not answer the gateway within {wait_s:.0f} s; no plan was started")
        time.sleep(_LOOK_PERIOD_S)
    err.print(f"{canary} answers the gateway", markup=False)


def _is_ready(gateway: GatewayClient, canary: Arm) -> bool:
    if canary.backend not in gateway.answering_arms():
        return False
    if canary.version is None or canary.backend != "ray_serve":
        return True
    rows = gateway.ray_serve_stats()["replicas"]
    return any(row["model_version"] == canary.version for row in rows)


def _watch(gateway: GatewayClient, document: dict[str, Any]) -> dict[str, Any]:
    """Show how far the plan is until it has ended or another one is run; gives what is in force then."""
    run_id = document["run"]["id"]
    screen: Screen | Lines = Screen() if out.is_terminal else Lines(out.print, time.monotonic)
    with screen:
        while True:
            stands = _progress(document, time.time())
            screen.show(stands)
            if document["run"]["id"] != run_id or not stands.active:
                return document
            time.sleep(_LOOK_PERIOD_S)
            document = _look(gateway)


def _progress(document: dict[str, Any], now_s: float) -> Progress:
    from app.cli.rollout_view import progress

    stands = progress(document, now_s)
    assert stands is not None, "a run is kept after its end"
    return stands


def _look(gateway: GatewayClient) -> dict[str, Any]:
    """What is in force; a gateway that is replaced meanwhile is waited for."""
    from app.client import GatewayRefused

    deadline = time.monotonic() + _SILENCE_S
    while True:
        try:
            return gateway.rollout()
        except GatewayRefused as error:
            if time.monotonic() > deadline:
                fail(f"{error}; the plan goes on without this terminal")
            time.sleep(_LOOK_PERIOD_S)


class Screen:
    """Progress that stands still on a terminal and changes."""

    def __init__(self) -> None:
        self._live = Live(console=out, auto_refresh=False, transient=True)

    def __enter__(self) -> None:
        self._live.start()

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def show(self, stands: Progress) -> None:
        parts = [Text(f"[{_bar(stands.share)}] {stands.line()}")]
        parts += [Text(f"  {sentence}", style="dim") for sentence in stands.guards]
        self._live.update(Group(*parts), refresh=True)


class Lines:
    """Progress for a file: a line for every step and phase, and one now and then between."""

    def __init__(self, write: Callable[..., object], clock: Callable[[], float]) -> None:
        self._write = write
        self._clock = clock
        self._said: tuple[int, str] | None = None
        self._said_at = 0.0

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...

    def show(self, stands: Progress) -> None:
        now = self._clock()
        if (stands.step, stands.phase) == self._said and now - self._said_at < _LINE_PERIOD_S:
            return
        self._said, self._said_at = (stands.step, stands.phase), now
        self._write(Text(stands.line()), soft_wrap=True)


def _bar(share: float) -> str:
    filled = round(20 * share)
    return "#" * filled + "." * (20 - filled)


def _tell_end(document: dict[str, Any], run_id: str) -> None:
    run = document["run"]
    if run["id"] != run_id:
        fail("another plan was started meanwhile: `sluice rollout show`")
    if run["phase"] != "done":
        why = f": {document['reason']}" if document["reason"] else ""
        fail(f"{run['phase'].replace('_', ' ')} by {document['changed_by']}{why}")
    out.print(Text(f"done: {document['canary']} has {document['share']:.2%} of the callers"))
