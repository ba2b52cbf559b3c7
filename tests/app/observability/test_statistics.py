from __future__ import annotations

from typing import Any

from app.observability.statistics import InferenceStatistics

STAGES = {"decode": 1.0, "queue": 2.0, "batch": 3.0, "model": 8.0, "encode": 0.5}


def make() -> InferenceStatistics:
    return InferenceStatistics(lambda: 1_800_000_000.25)


def answer(statistics: InferenceStatistics, version: str | None, windows: int, group: int) -> None:
    statistics.count_answer(version, windows=windows, groups=((windows, group),), duration_ms=20.0, stages_ms=STAGES)


def figures(statistics: InferenceStatistics, version: str | None) -> dict[str, Any]:
    return statistics.document(version)["inference_stats"]


def test_requests_that_shared_a_group_are_one_execution() -> None:
    statistics = make()
    answer(statistics, "1", windows=1, group=4)
    answer(statistics, "1", windows=3, group=4)
    answer(statistics, "1", windows=2, group=2)
    document = statistics.document("1")
    assert (document["inference_count"], document["execution_count"]) == (6, 2)
    assert document["inference_stats"]["success"] == {"count": 3, "ns": 60_000_000}
    assert document["inference_stats"]["queue"] == {"count": 3, "ns": 15_000_000}
    assert document["inference_stats"]["compute_infer"] == {"count": 3, "ns": 24_000_000}
    of_two, of_four = document["batch_stats"]
    assert (of_two["batch_size"], of_four["batch_size"]) == (2, 4)
    assert of_four["compute_infer"] == {"count": 1, "ns": 8_000_000}
    assert of_four["compute_input"] == {"count": 1, "ns": 2_000_000}
    assert document["last_inference"] == 1_800_000_000_250


def test_a_request_that_was_split_is_several_executions() -> None:
    statistics = make()
    statistics.count_answer(
        "1", windows=70, groups=((32, 32), (32, 32), (6, 12)), duration_ms=20.0, stages_ms={**STAGES, "decode": 7.0}
    )
    answer(statistics, "1", windows=6, group=12)
    document = statistics.document("1")
    assert (document["inference_count"], document["execution_count"]) == (76, 3)
    of_twelve, of_32 = document["batch_stats"]
    assert of_32["compute_infer"] == {"count": 2, "ns": 16_000_000}
    assert of_32["compute_input"] == {"count": 2, "ns": 6_400_000}
    assert of_twelve["compute_infer"] == {"count": 1, "ns": 8_000_000}
    assert document["inference_stats"]["success"]["count"] == 2


def test_versions_are_told_apart_and_a_failure_goes_to_the_one_that_was_named() -> None:
    statistics = make()
    answer(statistics, "1", 1, 1)
    answer(statistics, "2", 1, 1)
    statistics.count_failure("1", 5.0)
    assert figures(statistics, "1")["fail"] == {"count": 1, "ns": 5_000_000}
    assert figures(statistics, "2")["fail"]["count"] == 0
    assert statistics.versions() == {"1", "2"}


def test_a_failure_without_a_version_goes_to_the_one_that_answered_last() -> None:
    statistics = make()
    answer(statistics, "1", 1, 1)
    answer(statistics, "2", 1, 1)
    statistics.count_failure(None, 5.0)
    assert figures(statistics, "2")["fail"]["count"] == 1


def test_names_that_callers_make_up_get_no_row() -> None:
    statistics = make()
    for number in range(100):
        statistics.count_failure(f"made-up-{number}", 1.0)
    assert statistics.versions() == set()
    assert figures(statistics, None)["fail"]["count"] == 100


def test_a_backend_that_makes_versions_up_gets_one_row_for_the_surplus() -> None:
    statistics = make()
    for number in range(100):
        answer(statistics, str(number), 1, 1)
    assert len(statistics.versions()) == 33
    assert statistics.document("other")["inference_count"] == 68


def test_what_a_remote_service_answers_is_counted_without_a_version() -> None:
    statistics = make()
    answer(statistics, None, 2, 2)
    assert statistics.has_unversioned()
    assert statistics.document(None)["inference_count"] == 2
