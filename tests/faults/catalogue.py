"""Every fault, in an order that shares what runs."""

from __future__ import annotations

from tests.faults import on_gateway, on_model, on_neighbours, on_ray
from tests.faults.scenario import Scenario

ALL: tuple[Scenario, ...] = (
    # Ray Serve with two stubs that sleep
    on_ray.controller_killed(),
    on_ray.replica_killed(),
    on_ray.all_replicas_killed(),
    on_ray.retry_storm(),
    on_ray.replica_frozen(),
    on_gateway.clients_leave(),
    on_gateway.bad_rows(),
    on_neighbours.legacy_slow(),
    on_neighbours.legacy_resets(),
    on_neighbours.legacy_torn(),
    on_neighbours.legacy_sliced(),
    on_neighbours.legacy_silent(),
    on_neighbours.legacy_down(),
    on_gateway.overload(2, "overload-twice"),
    on_gateway.overload(10, "overload-tenfold"),
    on_ray.rolling_redeploy(),
    # with the shipped model, and clusters that come and go
    on_ray.replica_killed_with_legacy(),
    on_neighbours.bad_versions_published(),
    on_neighbours.registry_away(),
    on_neighbours.bridge_killed(),
    on_neighbours.bridge_frozen(),
    on_ray.head_replaced(),
    on_ray.control_store_killed(),
    on_ray.no_cluster_at_start(),
    # with an engine that fails as it is told
    on_model.output_not_a_number(),
    on_model.output_not_a_number_with_legacy(),
    on_model.bad_row_fails_a_pass(),
    on_model.large_batches_out_of_memory(),
    on_model.out_of_memory(),
    on_model.model_hangs(),
    on_model.replica_runs_out_of_luck(),
    # without Ray
    on_gateway.heavy_bodies(),
    on_gateway.rolling_gateway_restart(),
    on_gateway.gateways_restarted_behind_the_edge(),
    on_gateway.one_of_two_workers_killed(),
    on_gateway.lone_worker_killed(),
    on_gateway.log_disk_full(),
    on_gateway.log_reader_gone(),
    on_gateway.out_of_descriptors(),
    on_neighbours.clock_jumps(),
    on_neighbours.redis_away_at_start(),
    on_neighbours.redis_killed(),
    on_neighbours.redis_frozen(),
    on_neighbours.redis_slow(),
    on_neighbours.redis_silent(),
    on_neighbours.redis_refuses_writes(),
    on_neighbours.redis_read_only(),
)

# What CI tries, in `test_faults.py`: one for each kind of fault, and as short as it can be.
SHORT: tuple[Scenario, ...] = (
    on_ray.controller_killed(),
    on_ray.replica_killed(seconds=16),
    on_ray.all_replicas_killed(),
    on_gateway.clients_leave(),
    on_gateway.overload(10, "overload-tenfold", seconds=8),
    on_ray.rolling_redeploy(times=1, rate_rps=30, seconds=8),
    on_neighbours.bad_versions_published(),
    on_gateway.rolling_gateway_restart(times=1),
    on_neighbours.redis_killed(),
    on_neighbours.redis_frozen(),
)
