from app.rollout.evidence import N_CLASSES, NAMES, Evidence


def test_a_window_that_both_arms_answered_is_counted_by_the_pair_of_classes_that_they_chose() -> None:
    evidence = Evidence()
    for stable in range(N_CLASSES):
        for canary in range(N_CLASSES):
            for _ in range(1 + 3 * stable + canary):
                evidence.count_shadow(stable, canary, outside_interval=False)
    pairs = [[evidence[f"shadow_pair_{i}_{j}"] for j in range(N_CLASSES)] for i in range(N_CLASSES)]
    assert pairs == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    assert (evidence["shadow_windows"], evidence["shadow_disagreements"]) == (45, 30)


def test_every_count_has_a_name_that_the_pool_takes() -> None:
    evidence = Evidence()
    for seconds in (0.0, 0.01, 1000.0):
        evidence.count_answer("canary", seconds)
    evidence.count_failure("stable", invalid=True)
    evidence.count_shadow(2, 1, outside_interval=True)
    assert set(evidence) <= NAMES
    assert (evidence["canary_latency_0"], evidence["canary_latency_89"]) == (1, 1)
    assert (evidence["stable_requests"], evidence["stable_errors"], evidence["stable_invalid"]) == (1, 1, 1)
    assert evidence["shadow_outside_interval"] == 1


def test_what_a_caller_did_not_wait_for_is_a_latency_and_no_answer() -> None:
    evidence = Evidence()
    evidence.count_given_up("canary", 0.3)
    assert evidence.counts == {"canary_latency_60": 1}


def test_a_window_without_a_gap_is_none_by_which_expected_returns_are_judged() -> None:
    evidence = Evidence()
    for outside in (None, False, True):
        evidence.count_shadow(0, 0, outside_interval=outside)
    assert [evidence[f"shadow_{name}"] for name in ("windows", "gaps", "outside_interval")] == [3, 2, 1]
