from __future__ import annotations

import base64
import hashlib
import hmac
import json
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from hypothesis import given
from hypothesis import strategies as st
from jose import jwk

from app.auth import Key, KeySet, Principal, TokenVerifier, mint_token
from app.auth.door import bearer_credential
from app.errors import Unauthenticated

SECRET = b"pR8-vQ2mZxT5nK0bLw7yHdJ4sGfA9cUeE1iN6oXr3tVq"
NOW = 1_800_000_000
CLAIMS: dict[str, Any] = {
    "iss": "sluice",
    "aud": "sluice",
    "sub": "desk-7",
    "iat": NOW,
    "exp": NOW + 600,
    "scope": "predict ops",
}
HEADER = {"alg": "HS256", "typ": "JWT"}


class Clock:
    def __init__(self) -> None:
        self.now = float(NOW)

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def verifier(clock: Clock) -> TokenVerifier:
    return verifier_of(clock, {None: Key.hs256(SECRET)})


def verifier_of(clock: Clock, keys: dict[str | None, Key], **options: Any) -> TokenVerifier:
    return TokenVerifier(KeySet(keys), issuer="sluice", audience="sluice", wall_clock=clock, **options)


def encode(part: bytes) -> str:
    return base64.urlsafe_b64encode(part).rstrip(b"=").decode()


def sign(header: Any, claims: Any, secret: bytes = SECRET) -> str:
    """A token with a right signature, whatever header and claims are; bytes are taken as they are."""
    parts = [part if isinstance(part, bytes) else json.dumps(part).encode() for part in (header, claims)]
    signing_input = ".".join(encode(part) for part in parts)
    return f"{signing_input}.{encode(hmac.digest(secret, signing_input.encode(), hashlib.sha256))}"


def claims_with(**changes: Any) -> dict[str, Any]:
    return {name: value for name, value in (CLAIMS | changes).items() if value is not ...}


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
    token = jwk.construct(SECRET, algorithm)
    signing_input = f"{encode(json.dumps(HEADER | {'alg': algorithm}).encode())}.{encode(json.dumps(CLAIMS).encode())}"
    assert refused(verifier, f"{signing_input}.{encode(token.sign(signing_input.encode()))}")


def test_a_token_without_signature_is_refused(verifier: TokenVerifier) -> None:
    head, payload, _ = sign({"alg": "none"}, CLAIMS).split(".")
    for token in (f"{head}.{payload}.", f"{head}.{payload}", f"{head}..", "..", "", "a.b.c", f"{head}.{payload}.e30"):
        assert refused(verifier, token)


def test_another_secret_is_refused(verifier: TokenVerifier) -> None:
    assert refused(verifier, sign(HEADER, CLAIMS, b"x" * 40))


def test_a_public_key_s_bytes_sign_nothing(clock: Clock) -> None:
    private = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    public = private.public_key()
    pem = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    verifier = verifier_of(clock, {"rsa": Key("RS256", jwk.construct(pem.decode(), "RS256"))})
    spellings = [
        pem,
        pem.strip(),
        public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo),
        public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.PKCS1),
        public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.PKCS1),
        public.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH),
        json.dumps(jwk.construct(pem.decode(), "RS256").to_dict()).encode(),
    ]
    for secret in spellings:
        for algorithm in ("HS256", "RS256"):
            assert refused(verifier, sign({"alg": algorithm, "kid": "rsa"}, CLAIMS, secret))
    key = jwk.construct(
        private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ).decode(),
        "RS256",
    )
    signing_input = (
        f"{encode(json.dumps({'alg': 'RS256', 'kid': 'rsa'}).encode())}.{encode(json.dumps(CLAIMS).encode())}"
    )
    assert verifier.verify(f"{signing_input}.{encode(key.sign(signing_input.encode()))}").subject == "desk-7"


def test_secrets_and_public_keys_never_share_a_set() -> None:
    with pytest.raises(ValueError, match="never both"):
        KeySet({None: Key.hs256(SECRET), "rsa": Key("RS256", None)})


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


@given(st.text(max_size=200) | st.from_regex(r"[\w-]{1,80}\.[\w-]{1,80}\.[\w-]{1,80}"))
def test_no_text_makes_the_verifier_fail_otherwise(text: str) -> None:
    assert refused(verifier_of(Clock(), {None: Key.hs256(SECRET)}), text)


@given(st.data())
def test_a_changed_character_is_refused(data: st.DataObject) -> None:
    token = sign(HEADER, CLAIMS)
    at = data.draw(st.integers(0, len(token) - 1))
    other = data.draw(st.characters(codec="utf-8").filter(lambda character: character != token[at]))
    assert refused(verifier_of(Clock(), {None: Key.hs256(SECRET)}), token[:at] + other + token[at + 1 :])


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
    verifier = verifier_of(clock, {None: Key("HS256", counting)}, cache_size=2)
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


@pytest.mark.parametrize(
    "values", [[], [b""], [b"Basic abc"], [b"Bearer a", b"Bearer a"], [b"Bearer " + b"a" * 5000], [b"abc"]]
)
def test_only_one_bearer_header_counts(values: list[bytes]) -> None:
    with pytest.raises(Unauthenticated):
        bearer_credential(values)


def test_the_scheme_s_case_does_not_matter() -> None:
    assert bearer_credential([b"bEARER abc"]) == "abc"


def test_tenants_share_and_subjects_do_not() -> None:
    assert Principal("a", "fund").account == Principal("b", "fund").account
    assert Principal("a").account != Principal("b").account
    assert Principal("fund").account != Principal("x", "fund").account
