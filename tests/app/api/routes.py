"""The routes that an application serves, found in itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.app.under_test import GatewayUnderTest


def routes_of(gateway: GatewayUnderTest) -> set[tuple[str, str]]:
    """Every method and path that the application serves, whether OpenAPI shows it or not."""

    def walk(routes: Any) -> Iterator[tuple[str, str]]:
        for route in routes:
            contexts = getattr(route, "effective_route_contexts", None)
            if contexts is not None:
                yield from walk(contexts())
            elif isinstance(getattr(route, "methods", None), set):
                yield from ((method, route.path) for method in route.methods - {"HEAD"})
            else:
                raise AssertionError(f"a route of an unknown kind: {route}")

    return set(walk(gateway.app.routes))
