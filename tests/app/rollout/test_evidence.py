from app.rollout.evidence import N_CLASSES, NAMES, Evidence


def test_a_window_that_both_arms_answered_is_counted_by_the_pair_of_classes_that_they_chose() -> None:
    evidence = Evidence()
    for stable in range(N_CLASSES):
        for canary in range(N_CLASSES):
            for _ in range(1 + 3 * stable + canary):
                evidence.count_shadow(stable, canary, outside_interval=False)
    pairs = [[evidence[f"shadow_pair_{i}_{j}"] for j in range(N_CLASSES)] for i in range(N_CLASSES)]
    assert pairs == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    assert [evidence[f"shadow_stable_class_{i}"] for i in range(N_CLASSES)] == [6, 15, 24]
    assert [evidence[f"shadow_canary_class_{i}"] for i in range(N_CLASSES)] == [12, 15, 18]
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
