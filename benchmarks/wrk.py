"""The closed loop: `wrk`, for throughput.

A generator in Python would take a third of the two cores away from what it measures; wrk takes a few per cent, and the
same few from every system.
"""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import tempfile
from pathlib import Path

from benchmarks.request import HOST, Measured, Request

_TIMEOUT_S = 10  # of one request
_GRACE_S = 30.0  # after the planned end: a hang guard

# Without a `request` function wrk sends one prebuilt request and calls no Lua while it measures.
_SCRIPT = """
local file = assert(io.open({body}, "rb"))
wrk.method = {method}
wrk.body = file:read("*a")
file:close()
{headers}
function done(summary, latency, requests)
  local e = summary.errors
  io.write(string.format(
    '\\n{{"us": %d, "complete": %d, "status": %d, "connection": %d, "timeout": %d, ' ..
    '"p50": %.1f, "p90": %.1f, "p99": %.1f, "max": %.1f}}\\n',
    summary.duration, summary.requests, e.status, e.connect + e.read + e.write, e.timeout,
    latency:percentile(50), latency:percentile(90), latency:percentile(99), latency.max))
end
"""


class NoWrk(Exception):
    """The generator is not installed; the message is one line."""


class WrkFailed(Exception):
    """A load could not be sent, as when the system has died; the message is one line."""


def require_wrk() -> str:
    """Path of `wrk`. Raises `NoWrk`."""
    found = shutil.which("wrk")
    if found is None:
        raise NoWrk("the benchmarks send their load with wrk, which is not installed: apt-get install wrk")
    return found


def closed_loop(request: Request, *, connections: int, seconds: int) -> Measured:
    """Send the same request again and again over each connection.

    Args:
        request: What is sent.
        connections: How many, each with one request at a time.
        seconds: How long.

    Returns:
        What came of it; latencies are corrected by wrk for the requests that a stall kept it from sending.

    Raises:
        NoWrk: It is not installed.
        WrkFailed: It did not run, or not to its end.
    """
    with tempfile.TemporaryDirectory(prefix="sluice-wrk-") as folder:
        script = Path(folder) / "request.lua"
        (body := Path(folder) / "body").write_bytes(request.body)
        script.write_text(_lua(request, body))
        command = [require_wrk(), "-t1", f"-c{connections}", f"-d{seconds}s", f"--timeout={_TIMEOUT_S}s"]
        before_s = _children_cpu_s()
        output = _run([*command, f"-s{script}", request.url], seconds + _GRACE_S)
    return _read(output, _children_cpu_s() - before_s)


def _lua(request: Request, body: Path) -> str:
    """The script; JSON strings of printable ASCII are Lua strings too."""
    headers = "\n".join(f"wrk.headers[{json.dumps(k)}] = {json.dumps(v)}" for k, v in request.headers.items())
    return _SCRIPT.format(body=json.dumps(str(body)), method=json.dumps(request.method), headers=headers)


def _run(command: list[str], timeout_s: float) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=True)
    except subprocess.CalledProcessError as error:
        raise WrkFailed(f"wrk failed: {(error.stderr or error.stdout).strip()[-300:]}") from error
    except subprocess.TimeoutExpired as error:
        raise WrkFailed(f"wrk did not end within {timeout_s:.0f} s against {HOST}") from error
    return done.stdout


def _read(output: str, cpu_s: float) -> Measured:
    told = json.loads(output.strip().splitlines()[-1])
    failed = {code: told[code] for code in ("status", "connection", "timeout") if told[code]}
    answered = told["complete"] - told["status"]
    figures = ("p50", "p90", "p99", "max")
    return Measured(
        loop="closed",
        seconds=told["us"] / 1e6,
        answered=answered,
        failed=failed,
        latency_ms={name: told[name] / 1e3 if told["complete"] else None for name in figures},
        generator_cpu_s=cpu_s,
    )


def _children_cpu_s() -> float:
    """CPU seconds of the children that have ended; between two calls here that is wrk alone."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
