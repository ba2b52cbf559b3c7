"""Tokens: each form, header, claim and key that must not count, and what is remembered."""

from __future__ import annotations

import json
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from hypothesis import given, settings
from hypothesis import strategies as st
from jose import jwk

from app.auth import Key, KeySet, Principal, TokenVerifier, mint_token
from app.auth.jws import UnknownKey
from app.errors import IdentityUnavailable, Unauthenticated
from tests.app.auth.signing import (
    CLAIMS,
    HEADER,
    NOW,
    SECRET,
    Clock,
    claims_with,
    decode,
    ec_key,
    encode,
    issue,
    key_of,
    public_jwk,
    rsa_key,
    sign,
    sign_with,
    signing_input,
    verifier_of,
)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def verifier(clock: Clock) -> TokenVerifier:
    return verifier_of(clock)


def refused(verifier: TokenVerifier, token: str) -> bool:
    """Whether the token is refused by the one error that callers expect; anything else fails the test."""
    try:
        verifier.verify(token)
    except Unauthenticated:
        return True
    return False


def test_a_good_token_gives_its_principal(verifier: TokenVerifier) -> None:
    token = sign(HEADER, claims_with(tenant="fund-a", jti="1"))
    assert verifier.verify(token) == Principal("desk-7", "fund-a", frozenset({"predict", "ops"}))


def test_a_minted_token_is_taken(verifier: TokenVerifier) -> None:
    token = mint_token(
        SECRET, subject="ann", scopes=["predict"], issuer="sluice", audience="sluice", lifetime_s=60, now=NOW
    )
    assert verifier.verify(token) == Principal("ann", None, frozenset({"predict"}))


def test_every_minted_token_can_be_told_from_every_other() -> None:
    tokens = [
        mint_token(
            SECRET, subject="ann", scopes=["predict"], issuer="sluice", audience="sluice", lifetime_s=60, now=NOW
        )
        for _ in range(3)
    ]
    assert len({json.loads(decode(token.split(".")[1]))["jti"] for token in tokens}) == 3


@pytest.mark.parametrize(
    "wrong", [{"subject": ""}, {"subject": "a\nb"}, {"scopes": ["Predict!"]}, {"lifetime_s": 0}, {"lifetime_s": 86401}]
)
def test_minting_refuses_what_the_verifier_would_refuse(wrong: dict[str, Any]) -> None:
    good: dict[str, Any] = {"subject": "ann", "scopes": ["predict"], "lifetime_s": 60}
    with pytest.raises(ValueError, match=r"must|may"):
        mint_token(SECRET, **(good | wrong), issuer="sluice", audience="sluice", now=NOW)


@pytest.mark.parametrize("algorithm", ["none", "None", "NONE", "nOnE", "", "HS384", "HS512", "RS256", "ES256", "hs256"])
def test_only_the_key_s_own_algorithm_counts(verifier: TokenVerifier, algorithm: str) -> None:
    assert refused(verifier, sign(HEADER | {"alg": algorithm}, CLAIMS))


@pytest.mark.parametrize("algorithm", ["HS384", "HS512"])
def test_another_hmac_is_refused_though_it_is_signed_rightly(verifier: TokenVerifier, algorithm: str) -> None:
    message = signing_input(HEADER | {"alg": algorithm}, CLAIMS)
    assert refused(verifier, f"{message}.{encode(jwk.construct(SECRET, algorithm).sign(message.encode()))}")


def test_a_token_without_signature_is_refused(verifier: TokenVerifier) -> None:
    head, payload, _ = sign({"alg": "none"}, CLAIMS).split(".")
    for token in (f"{head}.{payload}.", f"{head}.{payload}", f"{head}..", "..", "", "a.b.c", f"{head}.{payload}.e30"):
        assert refused(verifier, token)


def test_another_secret_is_refused(verifier: TokenVerifier) -> None:
    assert refused(verifier, sign(HEADER, CLAIMS, b"x" * 40))


@pytest.mark.parametrize("private", [rsa_key(), ec_key()], ids=["RS256", "ES256"])
def test_a_public_key_s_bytes_sign_nothing(clock: Clock, private: Any) -> None:
    verifier = verifier_of(clock, {"k1": key_of(private)})
    for secret in spellings_of(private.public_key(), public_jwk(private, "k1")):
        for algorithm in ("HS256", "RS256", "ES256"):
            assert refused(verifier, sign({"alg": algorithm, "kid": "k1"}, CLAIMS, secret))
    assert verifier.verify(issue(private, "k1")).subject == "desk-7"


def spellings_of(public: Any, row: dict[str, Any]) -> list[bytes]:
    """The bytes under which a public key is known to the world."""
    encoding, form = serialization.Encoding, serialization.PublicFormat
    pem = public.public_bytes(encoding.PEM, form.SubjectPublicKeyInfo)
    spellings = [
        pem,
        pem.strip(),
        pem.replace(b"\n", b"\r\n"),
        public.public_bytes(encoding.DER, form.SubjectPublicKeyInfo),
        public.public_bytes(encoding.OpenSSH, form.OpenSSH),
        json.dumps(row).encode(),
        json.dumps(row, separators=(",", ":")).encode(),
    ]
    if row["kty"] == "RSA":
        spellings += [public.public_bytes(kind, form.PKCS1) for kind in (encoding.PEM, encoding.DER)]
    return spellings


def test_secrets_and_public_keys_never_share_a_set() -> None:
    with pytest.raises(ValueError, match="never both"):
        KeySet({None: Key.hs256(SECRET), "rsa": key_of(rsa_key())})


@pytest.mark.parametrize(
    "kid", ["../../dev/null", "/dev/null", "x' UNION SELECT '1", "|sleep 10", "", "k" * 65, "unknown", 1, None, [], "é"]
)
def test_a_strange_kid_is_refused_and_no_other_key_tried(clock: Clock, kid: Any) -> None:
    verifier = verifier_of(clock, {"k1": Key.hs256(SECRET)})
    assert not refused(verifier, sign(HEADER | {"kid": "k1"}, CLAIMS))
    assert refused(verifier, sign(HEADER | {"kid": kid}, CLAIMS))
    assert refused(verifier, sign(HEADER, CLAIMS))


@pytest.mark.parametrize(
    "extra",
    [
        {"jku": "http://127.0.0.1:9/keys"},
        {"x5u": "http://127.0.0.1:9/keys"},
        {"jwk": {"kty": "oct", "k": "AAAA"}},
        {"x5c": ["MIIB"]},
        {"crit": ["exp"]},
        {"crit": ["b64"], "b64": False},
        {"b64": False},
        {"zip": "DEF"},
        {"enc": "A256GCM"},
        {"typ": "JWE"},
        {"typ": 1},
        {"cty": {"a": 1}},
        {"ALG": "none"},
    ],
)
def test_headers_beyond_the_four_known_are_refused(verifier: TokenVerifier, extra: dict[str, Any]) -> None:
    assert refused(verifier, sign(HEADER | extra, CLAIMS))


@pytest.mark.parametrize(
    "header",
    [
        b'{"alg":"none","alg":"HS256"}',
        b'{"alg":"HS256","typ":"JWT","typ":"JWT"}',
        b"[]",
        b'"HS256"',
        b"null",
        b"{",
        b"",
        b"\xff\xfe",
        b'\xef\xbb\xbf{"alg":"HS256"}',
        b'{"typ":"JWT"}',
        b'{"alg":null}',
        b'{"alg":["HS256"]}',
    ],
)
def test_a_malformed_header_is_refused(verifier: TokenVerifier, header: bytes) -> None:
    assert refused(verifier, sign(header, CLAIMS))


@pytest.mark.parametrize("name", ["iss", "aud", "sub", "iat", "exp", "scope"])
def test_every_claim_is_required(verifier: TokenVerifier, name: str) -> None:
    assert refused(verifier, sign(HEADER, claims_with(**{name: ...})))


@pytest.mark.parametrize("name", ["iss", "aud", "sub", "iat", "exp", "scope", "tenant", "jti", "nbf"])
@pytest.mark.parametrize("value", [True, 1.5, [], ["sluice"], {}, "\x00", "a\nb", "x" * 300, -1, 10**400])
def test_every_claim_is_typed_and_bounded(verifier: TokenVerifier, name: str, value: Any) -> None:
    assert refused(verifier, sign(HEADER, claims_with(**{name: value})))


@pytest.mark.parametrize(
    "changes",
    [
        {"exp": NOW - 30},
        {"exp": NOW - 3600, "iat": NOW - 7200},
        {"exp": str(NOW + 600)},
        {"exp": None},
        {"exp": NOW + 600.0},
        {"exp": NOW + 86401},
        {"exp": NOW + 315_360_000},
        {"exp": NOW, "iat": NOW},
        {"iat": NOW + 31},
        {"iat": NOW + 31_536_000, "exp": NOW + 31_536_100},
        {"iat": str(NOW)},
        {"nbf": NOW + 31},
        {"nbf": None},
        {"iss": "Sluice"},
        {"iss": "sluice "},
        {"aud": "another-service"},
        {"aud": ["sluice"]},
        {"aud": "sluice2"},
        {"sub": ""},
        {"sub": 7},
        {"scope": ["predict"]},
        {"scope": "predict  ops"},
        {"scope": " predict"},
    ],
)
def test_times_issuer_and_audience_are_exact(verifier: TokenVerifier, changes: dict[str, Any]) -> None:
    assert refused(verifier, sign(HEADER, claims_with(**changes)))


@pytest.mark.parametrize(
    "changes", [{"exp": NOW - 29, "iat": NOW - 100}, {"iat": NOW + 30}, {"nbf": NOW + 30}, {"exp": NOW + 86400}]
)
def test_clocks_may_differ_by_thirty_seconds(verifier: TokenVerifier, changes: dict[str, Any]) -> None:
    assert not refused(verifier, sign(HEADER, claims_with(**changes)))


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"[]",
        b"null",
        b"\xff",
        json.dumps(CLAIMS).encode()[:-1] + b',"exp":99999999999}',
        json.dumps(CLAIMS).encode().replace(b'"exp": 1800000600', b'"exp": 1e999'),
        json.dumps(CLAIMS).encode().replace(b'"exp": 1800000600', b'"exp": NaN'),
        json.dumps(CLAIMS).encode().replace(b'"exp": 1800000600', b'"exp": Infinity'),
        json.dumps(CLAIMS).encode()[:-1] + b',"x":' + b"[" * 1200 + b"]" * 1200 + b"}",
        json.dumps(CLAIMS).encode().replace(b"1800000600", b"1" * 2500),
    ],
)
def test_a_malformed_payload_is_refused(verifier: TokenVerifier, payload: bytes) -> None:
    assert refused(verifier, sign(HEADER, payload))


def test_bombs_are_refused_before_they_are_parsed(verifier: TokenVerifier) -> None:
    nested = b'{"alg":"HS256","kid":' + b"[" * 1200 + b"]" * 1200 + b"}"
    assert refused(verifier, sign(nested, CLAIMS))
    assert refused(verifier, sign(HEADER | {"kid": "k" * 10_000}, CLAIMS))
    assert refused(verifier, sign(HEADER, claims_with(sub="x" * 5000)))
    assert refused(verifier, "a." * 100_000)
    assert refused(verifier, ".".join(["eyJhbGciOiJkaXIiLCJlbmMiOiJBMjU2R0NNIn0", "", "AAAA", "AAAA", "AAAA"]))


def mutations(token: str) -> list[str]:
    """Other spellings of one token that a lenient base64 decoder reads as the same bytes."""
    head, payload, signature = token.split(".")
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    last = alphabet.index(signature[-1])
    same_bits = [alphabet[(last & ~3) | low] for low in range(4) if (last & ~3) | low != last]
    return [
        *(f"{head}.{payload}.{signature[:-1]}{character}" for character in same_bits),
        *(f"{head}.{payload}.{signature}{junk}" for junk in ("=", "==", "====", "\n", " ", "!", "\x00", "é", "\ud800")),
        *(f"{head}.{payload}.{signature[:10]}{junk}{signature[10:]}" for junk in ("\n", " ", "!", "*", "\r\n")),
        f"{head}=.{payload}.{signature}",
        f"{head}.{payload}=.{signature}",
        f" {token}",
        f"{token}.",
        f".{token}",
        f"{head}.{payload}.{signature}.{signature}",
        token.replace("-", "+").replace("_", "/") + "+",
        "".join(chr(ord(c) + 0xFEE0) if c.isalnum() else c for c in token),
    ]


def test_one_token_has_one_spelling(verifier: TokenVerifier) -> None:
    token = sign(HEADER, CLAIMS)
    assert not refused(verifier, token)
    for spelling in mutations(token):
        assert refused(verifier, spelling), spelling


@settings(deadline=None)
@given(st.text(max_size=200) | st.from_regex(r"[\w-]{1,80}\.[\w-]{1,80}\.[\w-]{1,80}"))
def test_no_text_makes_the_verifier_fail_otherwise(text: str) -> None:
    assert refused(verifier_of(Clock()), text)


@settings(deadline=None)
@given(st.data())
def test_a_changed_character_is_refused(data: st.DataObject) -> None:
    token = sign(HEADER, CLAIMS)
    at = data.draw(st.integers(0, len(token) - 1))
    other = data.draw(st.characters(codec="utf-8").filter(lambda character: character != token[at]))
    assert refused(verifier_of(Clock()), token[:at] + other + token[at + 1 :])


def test_a_remembered_token_still_expires(verifier: TokenVerifier, clock: Clock) -> None:
    token = sign(HEADER, CLAIMS)
    verifier.verify(token)
    clock.now = NOW + 629
    assert not refused(verifier, token)
    clock.now = NOW + 630
    assert refused(verifier, token)
    clock.now = NOW + 629
    assert not refused(verifier, token)


def test_a_remembered_token_is_not_verified_again(clock: Clock) -> None:
    counting = jwk.construct(SECRET, "HS256")
    calls: list[bytes] = []
    really = counting.verify
    counting.verify = lambda message, signature: (calls.append(message), really(message, signature))[1]
    verifier = verifier_of(clock, {None: Key("HS256", counting, 32)}, cache_size=2)
    tokens = [sign(HEADER, claims_with(sub=name)) for name in ("a", "b", "c")]
    for _ in range(3):
        verifier.verify(tokens[0])
    assert len(calls) == 1
    verifier.verify(tokens[1])
    verifier.verify(tokens[0])  # used last but one, so b goes first
    verifier.verify(tokens[2])
    verifier.verify(tokens[0])
    assert len(calls) == 3
    verifier.verify(tokens[1])
    assert len(calls) == 4


def test_refused_tokens_are_not_remembered(verifier: TokenVerifier, clock: Clock) -> None:
    early = sign(HEADER, claims_with(iat=NOW + 100, exp=NOW + 200))
    assert refused(verifier, early)
    clock.now = NOW + 100
    assert not refused(verifier, early)


def test_tenants_share_and_subjects_do_not() -> None:
    assert Principal("a", "fund").account == Principal("b", "fund").account
    assert Principal("a").account != Principal("b").account
    assert Principal("fund").account != Principal("x", "fund").account


@pytest.mark.parametrize("private", [rsa_key(), ec_key()], ids=["RS256", "ES256"])
def test_a_key_pair_s_tokens_count_for_its_own_id_and_algorithm_alone(clock: Clock, private: Any) -> None:
    other = rsa_key(name="other") if private is ec_key() else ec_key("other")
    verifier = verifier_of(clock, {"k1": key_of(private), "k2": key_of(other)})
    assert not refused(verifier, issue(private, "k1"))
    assert refused(verifier, issue(private, "k2"))
    assert refused(
        verifier, sign_with(private, {"alg": "RS256" if private is ec_key() else "ES256", "kid": "k1"}, CLAIMS)
    )
    assert refused(verifier, sign_with(private, {"alg": "RS256" if private is rsa_key() else "ES256"}, CLAIMS))


def test_an_unknown_key_is_told_apart_for_those_who_can_look_for_it(clock: Clock) -> None:
    with pytest.raises(UnknownKey):
        verifier_of(clock, {"k1": key_of(ec_key())}).verify(issue(ec_key("new"), "k2"))


def test_without_keys_a_token_is_neither_right_nor_wrong_but_nonsense_stays_wrong(clock: Clock) -> None:
    verifier = TokenVerifier(None, issuer="sluice", audience="sluice", wall_clock=clock)
    with pytest.raises(IdentityUnavailable):
        verifier.verify(issue(ec_key(), "k1"))
    assert refused(verifier, "nonsense")
    verifier.replace_keys(KeySet({"k1": key_of(ec_key())}))
    assert not refused(verifier, issue(ec_key(), "k1"))


def test_new_keys_forget_what_old_ones_have_verified(clock: Clock) -> None:
    old, new = issue(ec_key("old"), "old"), issue(ec_key("new"), "new")
    verifier = verifier_of(clock, {"old": key_of(ec_key("old"))})
    assert not refused(verifier, old)
    verifier.replace_keys(KeySet({"old": key_of(ec_key("old")), "new": key_of(ec_key("new"))}))
    assert not refused(verifier, old)
    assert not refused(verifier, new)
    verifier.replace_keys(KeySet({"new": key_of(ec_key("new"))}))
    assert refused(verifier, old)
    assert not refused(verifier, new)


def test_a_key_counts_from_its_beginning_to_its_end_whatever_the_token_says(clock: Clock) -> None:
    key = Key.es256(ec_key().public_key(), not_before=NOW + 10, not_after=NOW + 20)
    verifier = verifier_of(clock, {"k1": key})
    token = issue(ec_key(), "k1")
    for now, counts in ((9.9, False), (10, True), (19.9, True), (20, False), (15, True)):
        clock.now = NOW + now
        assert refused(verifier, token) is not counts


def test_the_list_of_models_is_taken_over(verifier: TokenVerifier) -> None:
    assert verifier.verify(sign(HEADER, claims_with(models=["cnn_lstm", "b"]))).models == {"cnn_lstm", "b"}
    assert verifier.verify(sign(HEADER, CLAIMS)).models is None
    assert verifier.verify(sign(HEADER, claims_with(models=[]))).models == frozenset()


@pytest.mark.parametrize("models", [None, "cnn_lstm", {"cnn_lstm": 1}, [1], [None], ["../x"], ["X"], [""], ["a"] * 65])
def test_a_list_of_models_that_is_none_is_refused(verifier: TokenVerifier, models: Any) -> None:
    assert refused(verifier, sign(HEADER, claims_with(models=models)))


@settings(deadline=None)
@given(
    at=st.lists(st.floats(NOW - 200_000, NOW + 200_000), min_size=1, max_size=6),
    iat=st.integers(NOW - 100, NOW + 100),
    nbf=st.integers(NOW - 200, NOW + 200),
    lifetime=st.integers(1, 300),
)
def test_remembering_changes_no_verdict_however_the_clock_jumps(
    at: list[float], iat: int, nbf: int, lifetime: int
) -> None:
    """The same token at the same time of day is judged alike by a verifier that knows it and one that does not."""
    clock = Clock()
    remembering = verifier_of(clock)
    token = sign(HEADER, claims_with(iat=iat, nbf=nbf, exp=iat + lifetime))
    for clock.now in [float(iat), *at, float(iat), *at]:
        assert refused(remembering, token) == refused(verifier_of(clock), token)


def test_a_clock_set_back_does_not_bring_a_token_s_time_forward(verifier: TokenVerifier, clock: Clock) -> None:
    token = sign(HEADER, CLAIMS)
    assert not refused(verifier, token)
    for years in (-10, 10):
        clock.now = NOW + years * 31_557_600
        assert refused(verifier, token)
