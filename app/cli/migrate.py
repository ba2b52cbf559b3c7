"""`sluice migrate`: the model onto Ray Serve, and the callers after it by a plan."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from app.cli.access import client_settings, gateway_client
from app.cli.deploy import (
    application_of,
    known_version,
    put_application,
    require_taken,
    served_application,
    served_model,
)
from app.cli.options import Device, Engine, PlanFile, Profile, Reason, Size, Token, Url, WaitS
from app.cli.terminal import err, fail, out, told
from app.settings import Settings

if TYPE_CHECKING:
    from app.backends.base import Arm
    from app.cli.rollout_view import Progress
    from app.client import GatewayClient
    from app.rollout.plan import Plan
    from app.rollout.record import Record

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
    wanted = read_plan(plan)
    with gateway_client(settings, url, token, "ops admin") as gateway:
        document = told(gateway.rollout)
        _require_nothing_runs(document)
        whole = _between_versions(settings, wanted, version, _arms_in(document))
        canary = whole.canary.arm()
        _require_way_up(document, whole)
        served = None
        if not no_deploy:
            served = _deploy(settings, canary, wait_s, profile=profile, size=size, engine=engine, device=device)
        _await_ready(gateway, canary, wait_s)
        if served is not None:
            require_taken(gateway, served)
        begun = told(lambda: gateway.move_rollout("start", {"plan": plan_document(whole), "reason": reason}))
        try:
            end = _watch(gateway, begun)
        except KeyboardInterrupt:
            err.print("\nthe plan goes on without this terminal: `sluice rollout show`, `sluice rollout rollback`")
            raise SystemExit(_INTERRUPTED) from None
    _tell_end(end, begun["run"]["id"])


def _between_versions(settings: Settings, plan: Plan, version: str | None, record: Record) -> Plan:
    """The plan with its arms: from what serves now; an alias is pinned to the version that it stands for now."""
    from app.rollout.plan import ArmName

    if version is None:
        return plan
    if plan.model_fields_set & {"stable", "canary"}:
        fail("the plan names its arms: give no --version", _USAGE)
    serving = record.canary if record.share == 1.0 else record.stable
    stable = serving if serving.backend == "ray_serve" else ArmName(backend="ray_serve")
    canary = ArmName(backend="ray_serve", version=known_version(settings, version))
    return plan.model_copy(update={"stable": stable, "canary": canary})


def _require_nothing_runs(document: dict[str, Any]) -> None:
    from app.rollout.record import ACTIVE

    run = document["run"]
    if run is not None and run["phase"] in ACTIVE:
        fail(f"the plan {run['plan']['name']} is {run['phase']}: let it end, or roll it back")


def _require_way_up(document: dict[str, Any], plan: Plan) -> None:
    """Refuse, before anything is deployed, a plan that cannot begin or has nobody left to move.

    A new gateway gives Ray Serve everybody: what is deployed then has them all at once.
    """
    from app.rollout.moves import MoveRefused, present_share

    try:
        share = present_share(_arms_in(document), plan)
    except MoveRefused as refused:
        fail(str(refused))
    last, canary = plan.steps[-1].share, plan.canary.arm()
    if share >= last > 0:
        words = "set 0 --canary" if plan.stable.backend == plan.canary.backend else "set 0"
        fail(
            f"{canary} has {100 * share:.4g} % of the callers already, and the plan ends with {100 * last:.4g} %: "
            f"`sluice rollout {words}` first, or `sluice deploy` if all at once is wanted"
        )
    if share > plan.steps[0].share:
        err.print(
            f"{canary} has {100 * share:.4g} % of the callers already: the steps below are left out", markup=False
        )


def _arms_in(document: dict[str, Any]) -> Record:
    """Of what is in force who gets which arm."""
    from app.backends.base import Arm
    from app.rollout.plan import ArmName
    from app.rollout.record import Record

    stable, canary = (
        ArmName.model_validate({"backend": arm.backend, "version": arm.version})
        for arm in (Arm.parse(document["stable"]), Arm.parse(document["canary"]))
    )
    changed = {name: document[name] for name in ("changed_at", "changed_by")}
    return Record(share=document["share"], stable=stable, canary=canary, **changed)


def _deploy(settings: Settings, canary: Arm, wait_s: float, *, engine: str, device: str, **options: str) -> str:
    """Put what the canary answers with, and give its version; what else is there stays as it is."""
    if canary.backend != "ray_serve":
        fail(f"{canary} is not on Ray Serve: say --no-deploy", _USAGE)
    application = served_application(
        lambda: served_model(settings, canary.version or "latest", engine, device),
        name=application_of(canary),
        **options,
    )
    put_application(settings, application, wait_s)
    return application.serves.version


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
    screen: Screen | Lines = Screen(out) if out.is_terminal else Lines(out.print, time.monotonic)
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
    """Progress that stands still on a terminal and changes; steps that are passed stay above it."""

    def __init__(self, console: Console) -> None:
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._seen: Progress | None = None

    def __enter__(self) -> None:
        self._live.start()

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def show(self, stands: Progress) -> None:
        if self._seen is not None and self._seen.step < stands.step:
            passed = (
                f"step {self._seen.step} of {self._seen.steps} passed: {100 * self._seen.share:.4g} % of the callers"
            )
            self._live.console.print(Text(passed))
        self._seen = stands
        rows = [(_bar(stands.share), Text(stands.line()))]
        guards = [sentence.partition(": ") for sentence in stands.guards]
        found = [(f"  {signal}", Text(sentence, style="dim")) for signal, _, sentence in guards]
        self._live.update(Group(_columns(rows), _columns(found)), refresh=True)


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


def _columns(rows: list[tuple[str, Text]]) -> Table:
    """Long texts go on below themselves."""
    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True)
    for name, text in rows:
        table.add_row(Text(name), text)
    return table


def _bar(share: float) -> str:
    filled = round(10 * share)
    return f"[{'#' * filled}{'.' * (10 - filled)}]"


def _tell_end(document: dict[str, Any], run_id: str) -> None:
    run = document["run"]
    if run["id"] != run_id:
        fail("another plan was started meanwhile: `sluice rollout show`")
    if run["phase"] != "done":
        why = f": {document['reason']}" if document["reason"] else ""
        fail(f"{run['phase'].replace('_', ' ')} by {document['changed_by']}{why}")
    out.print(Text(f"done: {document['canary']} has {document['share']:.2%} of the callers"))
