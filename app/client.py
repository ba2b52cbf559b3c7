"""A small client of the gateway, for the command line, the benchmarks and the tests."""

from __future__ import annotations

from collections.abc import Callable, Collection
from types import TracebackType
from typing import Any

import httpx

from serve_app.contract import FloatArray

# What is read of each answer; another service's lacks some of it.
_ROLLOUT = ("share", "stable", "canary", "changed_at", "changed_by", "reason", "overrides", "run", "judgement")
_REPORT = ("arms", "hit_rate_difference", "hit_rate_difference_by_caller", "notes")
_PREDICTION = (
    "predictions",
    "uncertainty",
    "backend",
    "model_name",
    "model_version",
    "model_time_ms",
    "processing_time_ms",
    "request_id",
)


class GatewayRefused(Exception):
    """The gateway gave no answer or answered with a problem, or it is none at all; the message is one line."""


class GatewayClient:
    """Talks to one gateway over one kept connection.

    Args:
        url: Root of the gateway, `http://127.0.0.1:8000`.
        token: Bearer token, or what makes one for each request: no token lives as long as a plan may run.
        timeout_s: Limit of each request, above the gateway's own deadline.

    Raises:
        GatewayRefused: The URL is none.
    """

    def __init__(self, url: str, token: str | Callable[[], str], *, timeout_s: float = 10.0) -> None:
        def sign(request: httpx.Request) -> httpx.Request:
            request.headers["Authorization"] = f"Bearer {token if isinstance(token, str) else token()}"
            return request

        try:
            self._http = httpx.Client(base_url=url, auth=sign, timeout=timeout_s, trust_env=False)
        except httpx.InvalidURL as error:
            raise GatewayRefused(f"{url!r:.80} is no address: {error}") from error

    def __enter__(self) -> GatewayClient:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._http.close()

    def predict(self, windows: FloatArray, *, headers: dict[str, str] | None = None) -> dict[str, Any]:
        """Ask for predictions; windows are float32[F, T] or float32[B, F, T] and travel as raw bytes."""
        headers = {"Content-Type": "application/octet-stream", **(headers or {})}
        body = windows.astype("<f4").tobytes()
        return self._answer("POST", "/ray-serve/predict", _PREDICTION, content=body, headers=headers)

    def ray_serve_stats(self) -> dict[str, Any]:
        """Ray Serve's figures, per replica and in total."""
        return self._answer("GET", "/ray-serve/stats", ("replicas",))

    def rollout(self) -> dict[str, Any]:
        """The share in force, and who set it."""
        return self._answer("GET", "/rollout", _ROLLOUT)

    def rollout_report(self, since: float) -> dict[str, Any]:
        """What the experiment has shown over requests from `since` seconds after the epoch on."""
        return self._answer("GET", "/rollout/report", _REPORT, params={"since": since})

    def set_fraction(self, fraction: float) -> dict[str, Any]:
        """Give Ray Serve this share of the callers, 0..1."""
        return self._answer("PUT", "/rollout", _ROLLOUT, json={"ray_serve_fraction": fraction})

    def change_share(self, wish: dict[str, Any]) -> dict[str, Any]:
        """Change a share: one of `ray_serve_fraction`, `share` and `clear`, of an `account` where one is named."""
        return self._answer("PUT", "/rollout", _ROLLOUT, json=wish)

    def move_rollout(self, move: str, wish: dict[str, Any]) -> dict[str, Any]:
        """`start`, `pause`, `resume`, `promote` or `rollback`, with what the route takes."""
        return self._answer("POST", f"/rollout/{move}", _ROLLOUT, json=wish)

    def answering_arms(self) -> set[str]:
        """Names of the backends that answer, as their last inferences show."""
        response = self._request("GET", "/health")
        try:
            return {row["arm"] for row in response.json()["arms"] if row["status"] in {"healthy", "degraded"}}
        except (ValueError, KeyError, TypeError):
            raise GatewayRefused(_problem(response) if response.is_error else _stranger(response)) from None

    def kills(self) -> dict[str, Any]:
        """What is killed, by whom and why."""
        return self._answer("GET", "/kill", ("killed", "blind"))

    def change_kill(self, wish: dict[str, Any]) -> dict[str, Any]:
        """Kill something or lift it: `scope`, `name`, `killed` and `reason`; tells whom that has reached."""
        return self._answer("PUT", "/kill", ("entry", "reached", "kept"), json=wish)

    def _answer(self, method: str, path: str, members: Collection[str], **arguments: Any) -> dict[str, Any]:
        """The answer as JSON, which has these members."""
        response = self._request(method, path, **arguments)
        if response.is_error:
            raise GatewayRefused(_problem(response))
        try:
            document = response.json()
        except ValueError:
            document = None
        if not isinstance(document, dict) or not document.keys() >= set(members):
            raise GatewayRefused(_stranger(response))
        return document

    def _request(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        try:
            return self._http.request(method, path, **arguments)
        except (httpx.HTTPError, UnicodeError) as error:  # a name that DNS cannot have is a UnicodeError
            raise GatewayRefused(f"no answer from {self._http.base_url}: {error}") from error


def _problem(response: httpx.Response) -> str:
    """One line from problem+json, or the status where a proxy answered in the gateway's place."""
    try:
        problem = response.json()
        return f"{problem['status']} {problem['title']}: {problem['detail']}"
    except (ValueError, KeyError, TypeError):
        return f"{response.status_code} {response.reason_phrase}"


def _stranger(response: httpx.Response) -> str:
    """One line for an answer that is no gateway's."""
    where = response.url.copy_with(query=None)
    return f"{where} answers {response.status_code}, and not as a gateway does: is it the right address?"
