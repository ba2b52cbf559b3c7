import pytest

from app.serve_api import ServeApi, merge
from serve_app.serve_config import ServedApplication, build_config


def instance(**applications: dict[str, object] | None) -> dict[str, object]:
    return {
        "proxy_location": "EveryNode",
        "applications": {name: {"deployed_app_config": config} for name, config in applications.items()},
    }


def names(config: dict[str, object]) -> list[str]:
    return [application["name"] for application in config["applications"]]


def test_other_peoples_applications_are_kept_as_they_were_declared() -> None:
    theirs = {"name": "theirs", "import_path": "their.module:app", "route_prefix": "/theirs"}
    merged = merge(instance(theirs=theirs), build_config(ServedApplication()))
    assert theirs in merged["applications"]
    assert names(merged) == ["theirs", "cnn_lstm_predictor"]


def test_our_application_is_replaced_and_not_doubled() -> None:
    old = {"name": "cnn_lstm_predictor", "import_path": "old:app"}
    merged = merge(instance(cnn_lstm_predictor=old), build_config(ServedApplication()))
    assert names(merged) == ["cnn_lstm_predictor"]
    assert old not in merged["applications"]


def test_a_candidate_stands_beside_the_version_in_service() -> None:
    current = build_config(ServedApplication())["applications"][0]
    merged = merge(instance(cnn_lstm_predictor=current), build_config(ServedApplication(name="cnn_lstm_predictor-2")))
    assert names(merged) == ["cnn_lstm_predictor", "cnn_lstm_predictor-2"]


def test_proxies_that_others_are_reached_through_stay_up() -> None:
    theirs = {"name": "theirs", "import_path": "their.module:app"}
    assert merge(instance(theirs=theirs), build_config(ServedApplication()))["proxy_location"] == "EveryNode"
    assert merge(instance(), build_config(ServedApplication()))["proxy_location"] == "Disabled"


def test_an_application_that_was_never_declared_is_not_put() -> None:
    assert names(merge(instance(imperative=None), build_config(ServedApplication()))) == ["cnn_lstm_predictor"]


def test_deleting_ours_puts_everybody_elses_as_they_were_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = {"name": "theirs", "import_path": "their.module:app", "route_prefix": "/theirs"}
    ours = {"name": "cnn_lstm_predictor", "import_path": "ours:app"}
    there = instance(theirs=theirs, cnn_lstm_predictor=ours, imperative=None)
    put: list[tuple[str, object]] = []
    monkeypatch.setattr(ServeApi, "instance", lambda _: there)
    monkeypatch.setattr(ServeApi, "_request", lambda _, method, json: put.append((method, json)))
    with ServeApi("http://127.0.0.1:9") as api:
        api.delete(["cnn_lstm_predictor"])
    assert put == [("PUT", {"proxy_location": "EveryNode", "applications": [theirs]})]


def test_what_is_deleted_is_waited_for_until_it_is_gone_or_for_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    there = [instance(theirs={}, ours={}), instance(theirs={})]
    monkeypatch.setattr(ServeApi, "instance", lambda _: there.pop(0) if len(there) > 1 else there[0])
    monkeypatch.setattr("app.serve_api.time.sleep", lambda _: None)
    clock = iter(range(100))
    with ServeApi("http://127.0.0.1:9") as api:
        assert api.wait_gone(["ours"], timeout_s=10, clock=lambda: float(next(clock))) == []
        assert api.wait_gone(["ours", "theirs"], timeout_s=10, clock=lambda: float(next(clock))) == ["theirs"]
