"""Ray Serve's REST interface, as far as deploying needs it: read what runs, put one application, wait for it.

The PUT declares the whole instance: an application that it does not name is deleted. So ours is always merged
into what is there, and other people's applications stay as they are.
"""

from __future__ import annotations

import functools
import ssl
import time
from collections.abc import Callable, Collection
from types import TracebackType
from typing import Any

import httpx

_APPLICATIONS = "/api/serve/applications/"
_FAILED = {"DEPLOY_FAILED", "UNHEALTHY"}


class DeployFailed(Exception):
    """The configuration was refused or the application did not come up; the message says why."""


@functools.cache
def _trusted() -> ssl.SSLContext:
    """Whose certificates are believed: reading them takes 40 ms of CPU, and who watches a deployment asks often."""
    return httpx.create_ssl_context(trust_env=False)


class ServeApi:
    """A client of one cluster's dashboard.

    Args:
        url: Root of the dashboard, `http://host:8265`.
        token: The cluster's authentication token; None where the cluster asks for none.
        timeout_s: Limit of each request.
    """

    def __init__(self, url: str, *, token: str | None = None, timeout_s: float = 10.0) -> None:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._http = httpx.Client(base_url=url, headers=headers, timeout=timeout_s, trust_env=False, verify=_trusted())

    def __enter__(self) -> ServeApi:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._http.close()

    def instance(self) -> dict[str, Any]:
        """Everything the cluster serves, as Ray reports it. Raises `DeployFailed`."""
        return dict(self._request("GET").json())

    def application(self, name: str) -> dict[str, Any]:
        """One application as Ray reports it: `status`, `message`, `deployments`; empty where it is not there."""
        return dict(self.instance().get("applications", {}).get(name) or {})

    def put(self, config: dict[str, Any]) -> None:
        """Apply a Serve configuration, keeping the applications that it does not name.

        Args:
            config: What `serve_app.serve_config.build_config` returns.

        Raises:
            DeployFailed: The dashboard is not there, or refused the configuration.
        """
        self._request("PUT", json=merge(self.instance(), config))

    def delete(self, names: Collection[str]) -> None:
        """Delete these applications and keep every other one. Raises `DeployFailed`."""
        instance = self.instance()
        applications = [config for name, config in declared(instance).items() if name not in names]
        proxies = {name: instance[name] for name in ("proxy_location",) if instance.get(name)}
        self._request("PUT", json={**proxies, "applications": applications})

    def wait_gone(self, names: Collection[str], *, timeout_s: float, clock: Callable[[], float]) -> list[str]:
        """Wait until none of these applications is left; replicas answer what they have taken before they end.

        Args:
            names: The applications.
            timeout_s: How long to wait.
            clock: Monotonic seconds.

        Returns:
            Those that are still there.

        Raises:
            DeployFailed: The dashboard is not there.
        """
        deadline = clock() + timeout_s
        while True:
            applications = self.instance().get("applications", {})
            left = [name for name in names if name in applications]
            if not left or clock() > deadline:
                return left
            time.sleep(0.5)

    def wait_running(
        self, name: str, *, timeout_s: float, on_progress: Callable[[str], None], clock: Callable[[], float]
    ) -> None:
        """Wait until an application runs.

        Args:
            name: The application.
            timeout_s: How long to wait.
            on_progress: Told of every new state, one line each.
            clock: Monotonic seconds.

        Raises:
            DeployFailed: It failed, or was not running in time.
        """
        deadline = clock() + timeout_s
        said = ""
        while True:
            application = self.application(name)
            status = application.get("status", "NOT_STARTED")
            line = f"{name}: {status.lower().replace('_', ' ')}, {_replicas(application)} running"
            if line != said:
                on_progress(line)
                said = line
            if status == "RUNNING":
                return
            if status in _FAILED:
                raise DeployFailed(f"{name} is {status.lower()}: {_reason(application)}")
            if clock() > deadline:
                raise DeployFailed(f"{name} was not running after {timeout_s:.0f} s (last seen: {status.lower()})")
            time.sleep(0.5)

    def _request(self, method: str, **arguments: Any) -> httpx.Response:
        try:
            response = self._http.request(method, _APPLICATIONS, **arguments)
        except httpx.HTTPError as error:
            raise DeployFailed(f"no answer from the Ray dashboard at {self._http.base_url}: {error}") from error
        if response.status_code == httpx.codes.UNAUTHORIZED:
            raise DeployFailed("the Ray dashboard wants a token: set RAY_AUTH_TOKEN_PATH to the cluster's token file")
        if response.is_error:
            raise DeployFailed(f"the Ray dashboard refused the configuration: {response.text.strip()[-800:]}")
        return response


def merge(instance: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """The configuration to put: ours, and every declared application of the instance that ours does not name."""
    names = {application["name"] for application in config["applications"]}
    kept = [application for name, application in declared(instance).items() if name not in names]
    merged = {**config, "applications": [*kept, *config["applications"]]}
    if kept and instance.get("proxy_location"):
        # Others may be reached through the cluster's HTTP proxies; ours needs none and is not published by them.
        merged["proxy_location"] = instance["proxy_location"]
    return merged


def declared(instance: dict[str, Any]) -> dict[str, Any]:
    """By name, the applications that a PUT has declared, as it declared them; a PUT leaves all others alone."""
    return {
        name: application["deployed_app_config"]
        for name, application in instance.get("applications", {}).items()
        if application.get("deployed_app_config")
    }


def _replicas(application: dict[str, Any]) -> int:
    deployments = application.get("deployments", {}).values()
    return sum(replica["state"] == "RUNNING" for deployment in deployments for replica in deployment["replicas"])


def _reason(application: dict[str, Any]) -> str:
    """The last lines of what Ray says of the failure: the application's message, else its deployments'."""
    messages = [application.get("message", "")]
    messages += [deployment.get("message", "") for deployment in application.get("deployments", {}).values()]
    return next((message.strip()[-800:] for message in messages if message), "no reason given")
