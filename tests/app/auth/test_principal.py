from __future__ import annotations

import pytest

from app.auth import Principal, read_identity


def test_tenants_share_and_subjects_do_not() -> None:
    assert Principal("a", "fund").account == Principal("b", "fund").account
    assert Principal("a").account != Principal("b").account
    assert Principal("fund").account != Principal("x", "fund").account


def test_without_a_list_every_model_may_be_used_and_with_one_those_on_it() -> None:
    assert Principal("a").may_use("cnn_lstm")
    assert Principal("a", models=frozenset({"cnn_lstm"})).may_use("cnn_lstm")
    assert not Principal("a", models=frozenset({"other"})).may_use("cnn_lstm")
    assert not Principal("a", models=frozenset()).may_use("cnn_lstm")


@pytest.mark.parametrize(
    ("text", "identity"),
    [
        ("gateway-a", (None, "gateway-a")),
        ("fund-a/gateway", ("fund-a", "gateway")),
        ("fund-a/a/b", ("fund-a", "a/b")),
        ("/spiffe://desk", (None, "spiffe://desk")),
    ],
)
def test_an_identity_is_written_as_tenant_and_subject(text: str, identity: tuple[str | None, str]) -> None:
    assert read_identity(text) == identity
    tenant, subject = identity
    assert Principal(subject, tenant).identity == identity


def test_keys_that_tenants_choose_are_kept_apart() -> None:
    who = [Principal("broker", tenant) for tenant in (None, "fund-a", "fund-b")] + [Principal("other", "fund-a")]
    assert who[0].key_of("client-1") == "client-1"  # as ever, so that nobody changes sides
    assert len({principal.key_of("client-1") for principal in who}) == 4
