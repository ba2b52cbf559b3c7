"""Every fault, in an order that shares what runs."""

from __future__ import annotations

from tests.faults import on_ray
from tests.faults.scenario import Scenario

ALL: tuple[Scenario, ...] = (
    on_ray.controller_killed(),
    on_ray.replica_killed(),
    on_ray.all_replicas_killed(),
    on_ray.replica_frozen(),
    on_ray.rolling_redeploy(),
    on_ray.replica_killed_with_legacy(),
    on_ray.head_replaced(),
    on_ray.control_store_killed(),
    on_ray.no_cluster_at_start(),
)
