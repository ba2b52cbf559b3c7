"""CPU time is read of whole families and told by role."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from benchmarks.cpu import command_of, family, machine_busy_s, spent_by_role, used_s


def burn(seconds: float) -> None:
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass


def test_what_a_process_burns_is_found() -> None:
    before, busy_before_s = used_s([os.getpid()]), machine_busy_s()
    burn(0.2)
    spent = spent_by_role(before, used_s([os.getpid()]), lambda pid, command: "me" if "python" in command else "?")
    assert 0.15 < spent["me"] < 0.6
    assert machine_busy_s() - busy_before_s > 0.15


def test_children_of_children_belong_to_the_family_once() -> None:
    sleep = f"import subprocess, sys; subprocess.run(['{sys.executable}', '-c', 'import time; time.sleep(30)'])"
    with subprocess.Popen([sys.executable, "-c", sleep]) as parent:
        try:
            deadline = time.monotonic() + 10
            while len(found := family([parent.pid, parent.pid])) < 2 and time.monotonic() < deadline:
                time.sleep(0.02)
            assert len(found) == 2
            assert "time.sleep(30)" in command_of(found[1])
        finally:
            for pid in reversed(found):
                os.kill(pid, 9)


def test_roles_add_up_and_a_newcomer_counts_from_its_start() -> None:
    before = {(1, 10): 1.0, (2, 11): 5.0}
    after = {(1, 10): 1.5, (3, 12): 0.25, (2, 99): 2.0}  # 2 ended, and its number came again
    roles = {1: "gateway", 2: "replica", 3: "replica"}
    assert spent_by_role(before, after, lambda pid, _: roles[pid]) == {"gateway": 0.5, "replica": 2.25}


def test_a_process_that_has_ended_has_used_nothing() -> None:
    with subprocess.Popen(["true"]) as ended:
        ended.wait()
    assert used_s([ended.pid]) == {}
    assert command_of(ended.pid) == ""
