from __future__ import annotations

from app.auth import Principal


def test_tenants_share_and_subjects_do_not() -> None:
    assert Principal("a", "fund").account == Principal("b", "fund").account
    assert Principal("a").account != Principal("b").account
    assert Principal("fund").account != Principal("x", "fund").account


def test_without_a_list_every_model_may_be_used_and_with_one_those_on_it() -> None:
    assert Principal("a").may_use("cnn_lstm")
    assert Principal("a", models=frozenset({"cnn_lstm"})).may_use("cnn_lstm")
    assert not Principal("a", models=frozenset({"other"})).may_use("cnn_lstm")
    assert not Principal("a", models=frozenset()).may_use("cnn_lstm")
