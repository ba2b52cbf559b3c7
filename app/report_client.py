"""The client of `sluice rollout report`."""

from __future__ import annotations

from typing import Any

from app.client import GatewayClient


class ReportClient(GatewayClient):
    """A client that knows the experiment's report."""

    def report(self, since: float) -> dict[str, Any]:
        """The report over requests from `since` seconds after the epoch on."""
        return self._answer("GET", "/rollout/report", params={"since": since})
