"""`sluice migrate` against a gateway that listens, over fake backends; what it deploys is in the tests of deploying."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from app.backends.base import Arm
from app.cli import migrate
from app.cli.migrate import Lines, Screen
from app.cli.rollout_view import progress
from app.client import GatewayClient, GatewayRefused
from app.rollout.moves import By, breach, start
from app.rollout.plan import Plan
from app.rollout.record import Record
from serve_app.serve_config import ServedApplication
from tests.app.cli.command import MODELS
from tests.app.cli.test_rollout import SLOW_PLAN, Sluice, gateway, sluice
from tests.app.under_test import NOW, FakeClock, GatewayUnderTest

__all__ = ["gateway", "sluice"]  # fixtures

QUICK_PLAN = """
[[steps]]
share = 0.5
hold_s = 0
samples = 0
[[steps]]
share = 1.0
hold_s = 0
samples = 0
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(migrate, "_LOOK_PERIOD_S", 0.02)


async def test_a_plan_that_is_done_ends_with_0_and_everybody_has_moved(
    sluice: Sluice, gateway: GatewayUnderTest, tmp_path: Path
) -> None:
    (tmp_path / "plan.toml").write_text(QUICK_PLAN)
    result = await sluice("migrate", "plan.toml", "--no-deploy")
    assert result.exit_code == 0, result.stderr
    assert "step 1 of 2, running" in result.stdout
    assert result.stdout.splitlines()[-1] == "done: ray_serve has 100.00% of the callers"
    assert (await gateway.predict()).headers["x-served-by"] == "ray_serve"


async def test_a_plan_that_somebody_rolls_back_ends_with_1_and_why(
    sluice: Sluice, gateway: GatewayUnderTest, tmp_path: Path
) -> None:
    (tmp_path / "plan.toml").write_text(SLOW_PLAN)
    migrating = asyncio.create_task(sluice("migrate", "plan.toml", "--no-deploy"))
    async with asyncio.timeout(20):
        while (await gateway.client.get("/rollout", headers=gateway.bearer("ops"))).json()["run"] is None:
            await asyncio.sleep(0.02)
    # Not by a second command: both would take the process's standard error for theirs.
    headers = gateway.bearer("admin", subject="ann")
    assert (await gateway.client.post("/rollout/rollback", json={"reason": "not today"}, headers=headers)).is_success
    result = await migrating
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == "sluice: rolled back by ann: not today"


async def test_nothing_is_deployed_or_begun_while_a_plan_is_run(sluice: Sluice, tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text(SLOW_PLAN)
    await sluice("rollout", "start", "plan.toml")
    result = await sluice("migrate")
    assert (result.exit_code, result.stderr) == (1, "sluice: the plan slow is running: let it end, or roll it back\n")


@pytest.mark.parametrize(("share", "last"), [("1", "100"), ("0.6", "50")])
async def test_nothing_is_deployed_for_a_plan_that_has_nobody_left_to_move(
    sluice: Sluice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: str, last: str
) -> None:
    monkeypatch.setattr(migrate, "_deploy", forbidden)
    (tmp_path / "plan.toml").write_text(f"[[steps]]\nshare = 0.01\n[[steps]]\nshare = {float(last) / 100}\n")
    await sluice("rollout", "set", share)
    result = await sluice("migrate", "plan.toml")
    assert result.exit_code == 1
    assert result.stderr == (
        f"sluice: ray_serve has {100 * float(share):g} % of the callers already, and the plan ends with {last} %: "
        "`sluice rollout set 0` first, or `sluice deploy` if all at once is wanted\n"
    )


async def test_nothing_is_deployed_for_a_plan_from_an_arm_that_does_not_serve(
    sluice: Sluice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migrate, "_deploy", forbidden)
    (tmp_path / "plan.toml").write_text(
        'stable = { backend = "ray_serve" }\ncanary = { backend = "ray_serve", version = "2" }'
    )
    result = await sluice("migrate", "plan.toml")
    assert result.exit_code == 1
    assert "a plan from ray_serve to ray_serve@2 cannot begin there" in result.stderr


async def test_a_plan_that_begins_above_its_first_step_says_so(sluice: Sluice, tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text(QUICK_PLAN)
    await sluice("rollout", "set", "0.6")
    result = await sluice("migrate", "plan.toml", "--no-deploy")
    assert result.exit_code == 0
    assert "ray_serve has 60 % of the callers already: the steps below are left out\n" in result.stderr


def forbidden(*_: object, **__: object) -> None:
    raise AssertionError("deployed")


async def test_no_plan_is_begun_before_the_version_answers(
    sluice: Sluice, gateway: GatewayUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODEL_REGISTRY_PATH", str(MODELS))
    await sluice("rollout", "set", "1")
    result = await sluice("migrate", "--no-deploy", "--version", "1", "--wait-s", "0.1")
    assert result.exit_code == 1
    assert "ray_serve@1 did not answer" in result.stderr.replace("\n", " ")
    assert (await gateway.client.get("/rollout", headers=gateway.bearer("ops"))).json()["run"] is None


async def test_a_version_beside_a_plan_that_names_its_arms_is_a_fault_of_usage(sluice: Sluice, tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text('[canary]\nbackend = "ray_serve"\n')
    assert (await sluice("migrate", "plan.toml", "--version", "1")).exit_code == 2


async def test_an_interrupt_leaves_the_plan_running_and_says_so(
    sluice: Sluice, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(migrate, "_watch", interrupt)
    result = await sluice("migrate", "--no-deploy")
    assert result.exit_code == 130
    assert "the plan goes on" in result.stderr
    assert "running" in (await sluice("rollout", "show")).stdout


@pytest.mark.parametrize(
    ("words", "name"), [((), "cnn_lstm_predictor"), (("--version", "latest"), "cnn_lstm_predictor-{}")]
)
async def test_a_version_is_put_beside_what_serves_and_an_alias_is_pinned(
    sluice: Sluice, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], name: str
) -> None:
    put: list[ServedApplication] = []

    def stop(_: object, application: ServedApplication, wait_s: float) -> None:
        put.append(application)
        raise SystemExit(3)

    monkeypatch.setattr(migrate, "put_application", stop)
    monkeypatch.setenv("MODEL_REGISTRY_PATH", str(MODELS))
    await sluice("rollout", "set", "1" if "--version" in words else "0")
    assert (await sluice("migrate", *words, "--profile", "trading")).exit_code == 3
    assert (put[0].name, put[0].profile) == (name.format(put[0].serves.version), "trading")
    assert put[0].serves.version.isdecimal()


async def test_no_plan_is_begun_where_replicas_refused_what_was_put(
    sluice: Sluice, gateway: GatewayUnderTest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "plan.toml").write_text(QUICK_PLAN)
    refused = {"version": "1", "replicas": 2, "reason": "artefact-rejected"}
    monkeypatch.setattr(migrate, "put_application", lambda *_: None)
    monkeypatch.setattr(GatewayClient, "ray_serve_stats", lambda _: {"rejected": [refused]})
    monkeypatch.setenv("MODEL_REGISTRY_PATH", str(MODELS))
    result = await sluice("migrate", "plan.toml")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == (
        "sluice: 2 replicas refused version 1 and serve what they had: artefact-rejected"
    )
    assert (await gateway.client.get("/rollout", headers=gateway.bearer("ops"))).json()["run"] is None


class Gateway:
    """Answers what it is told to, in this order."""

    def __init__(self, *answers: Any) -> None:
        self._answers = list(answers)

    def rollout(self) -> Any:
        answer = self._answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def answering_arms(self) -> set[str]:
        return {"ray_serve"}

    def ray_serve_stats(self) -> Any:
        return {"replicas": [{"model_version": "3"}]}


def running() -> Record:
    record = Record(share=0.0, changed_at=NOW, changed_by="settings")
    return start(record, Plan(), "run-1", By("ann", NOW))


def document(record: Record, **judgement: Any) -> dict[str, Any]:
    arms = {"stable": str(record.stable.arm()), "canary": str(record.canary.arm())}
    return {**record.document(), **arms, "judgement": judgement or None}


def test_a_gateway_that_is_away_for_a_moment_does_not_end_the_watch(capsys: pytest.CaptureFixture[str]) -> None:
    sentence = "errors: 9 of 10 failed"
    ended = document(breach(running(), By("controller", NOW, sentence), [sentence]))
    seen = migrate._watch(Gateway(GatewayRefused("no answer"), ended), document(running()))  # type: ignore[arg-type]
    with pytest.raises(SystemExit) as end:
        migrate._tell_end(seen, "run-1")
    assert end.value.code == 1
    assert capsys.readouterr().err == f"sluice: rolled back by controller: {sentence}\n"


def test_only_a_replica_of_the_version_makes_it_ready() -> None:
    answers = [migrate._is_ready(Gateway(), Arm("ray_serve", version)) for version in (None, "3", "4")]  # type: ignore[arg-type]
    assert answers == [True, True, False]
    assert not migrate._is_ready(Gateway(), Arm("legacy"))  # type: ignore[arg-type]


def test_samples_of_an_earlier_step_are_not_counted_for_this_one() -> None:
    for epoch, samples in (("run-1.1", 7), ("run-1.0", 0)):
        stands = progress(document(running(), epoch=epoch, samples=7, guards=[]), NOW + 30)
        assert stands is not None
        assert (stands.samples, stands.held_s, stands.lacks_callers) == (samples, 30.0, samples == 0)


def test_lines_for_a_file_are_few() -> None:
    clock, lines = FakeClock(0.0), list[str]()
    shown = Lines(lambda text, **_: lines.append(str(text)), clock)
    stands = progress(document(running()), NOW)
    assert stands is not None
    for _ in range(60):
        shown.show(stands)
        clock.advance(1.0)
    assert len(lines) == 2
    shown.show(stands._replace(phase="paused"))
    assert "paused" in lines[2]


def test_a_screen_keeps_each_passed_step_and_a_guard_in_its_column() -> None:
    guards = [{"signal": "errors", "sentence": "0 of 9 (0 %) of the canary's answers failed: no breach is shown."}]
    stands = progress(document(running(), epoch="run-1.1", samples=9, guards=guards), NOW + 30)
    assert stands is not None
    written = io.StringIO()
    screen = Screen(Console(file=written, width=48, force_terminal=True, color_system=None))
    with screen:
        screen.show(stands)
        screen.show(stands._replace(step=2, share=0.05))
    _, last_frame = written.getvalue().split("step 1 of 5 passed: 1 % of the callers\n")
    guard = last_frame[last_frame.index("  errors") :].splitlines()
    assert guard[0].startswith("  errors 0 of 9")
    assert guard[1].startswith(" " * len("  errors ") + "failed")
