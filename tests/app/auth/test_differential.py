"""Our verdict on changed tokens beside that of joserfc: we may be stricter, and are never laxer.

Where joserfc takes a token that we refuse, the change is one of those that our rules are narrower about; every other
disagreement fails the test.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import ECKey, KeySet, OctKey, RSAKey
from joserfc.jwt import JWTClaimsRegistry

from app.auth import TokenVerifier
from app.errors import Unauthenticated
from tests.app.auth.signing import (
    CLAIMS,
    HEADER,
    NOW,
    SECRET,
    Clock,
    algorithm_of,
    claims_with,
    decode,
    ec_key,
    encode,
    key_of,
    public_jwk,
    rsa_key,
    sign,
    sign_with,
    verifier_of,
)

LEEWAY_S = 30
_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
_JUNK = ["=", " ", "\n", "\0", "+", "/", ".", "é", "!", "\ud800"]
_VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 1.5, NOW, NOW + 30, NOW + 31, NOW - 30, NOW - 31, NOW + 600, NOW + 86_401, 10**18),
    *("", "sluice", "desk", "predict", "JWT", "k1", "at+jwt", "é", "\0", "x" * 300, [], ["sluice"], {}, str(NOW)),
]

# The kinds of change that we are stricter about than joserfc, and why.
STRICTER = {
    "a claim's value": "every claim is typed and bounded: integers for times, plain names, 24 hours at most",
    "a claim left out": "scope and iat are required",
    "a header's value": "a header has four names, all text; typ and kid have their forms",
    "a name more in the header": "nothing beyond the four names is understood, so nothing is taken",
    "another JSON": "no name twice, one object, no NaN",
    "a claim more": "jti, nbf, tenant and models are typed where they are given",
}


@dataclass(frozen=True)
class World:
    """One way of signing, for us and for the other library."""

    header: dict[str, Any]
    sign: Callable[[Any, Any], str]
    verifier: TokenVerifier
    key: Any


def world_of(algorithm: str) -> World:
    if algorithm == "HS256":
        return World(HEADER, sign, verifier_of(Clock()), OctKey.import_key(SECRET))
    private = rsa_key() if algorithm == "RS256" else ec_key()
    row: Any = public_jwk(private, "k1")
    key = RSAKey.import_key(row) if algorithm == "RS256" else ECKey.import_key(row)
    header = {"alg": algorithm_of(private), "typ": "JWT", "kid": "k1"}
    verifier = verifier_of(Clock(), {"k1": key_of(private)})
    return World(header, lambda header, claims: sign_with(private, header, claims), verifier, KeySet([key]))


class Mutations:
    """Changed tokens of one world: the kind of the change, and the token."""

    def __init__(self, world: World, seed: int) -> None:
        self._world = world
        self._chance = random.Random(seed)
        self._good = world.sign(world.header, CLAIMS)
        self._kinds = [
            self._character,
            self._base64,
            self._parts,
            self._header_value,
            self._header_more,
            self._claim_value,
            self._claim_out,
            self._claim_more,
            self._time,
            self._other_json,
            self._spelling,
            self._signature,
        ]

    def __next__(self) -> tuple[str, str]:
        return self._chance.choice(self._kinds)()

    def _character(self) -> tuple[str, str]:
        good, at = self._good, self._chance.randrange(len(self._good))
        other = self._chance.choice([*_ALPHABET, *_JUNK])
        return "a character", self._chance.choice([good[:at] + other + good[at + 1 :], good[:at] + other + good[at:]])

    def _base64(self) -> tuple[str, str]:
        parts = self._good.split(".")
        place = self._chance.randrange(3)
        at = self._chance.choice([0, len(parts[place]) - 1, len(parts[place])])
        junk = self._chance.choice([*_ALPHABET, *_JUNK, "==", "===="])
        keep = self._chance.choice([0, 1])
        parts[place] = parts[place][:at] + junk + parts[place][at + keep :]
        return "a base64 character", ".".join(parts)

    def _parts(self) -> tuple[str, str]:
        parts = self._good.split(".")
        self._chance.shuffle(parts)
        count = self._chance.choice([1, 2, 3, 4, 5])
        return "other parts", ".".join((parts * 2)[:count])

    def _header_value(self) -> tuple[str, str]:
        name = self._chance.choice(["alg", "typ", "kid", "cty"])
        value = self._chance.choice([*_VALUES, "none", "HS256", "RS256", "ES256", "HS512", "PS256"])
        return "a header's value", self._world.sign(self._world.header | {name: value}, CLAIMS)

    def _header_more(self) -> tuple[str, str]:
        name = self._chance.choice(["jku", "jwk", "x5u", "x5c", "crit", "b64", "zip", "enc", "ALG", "x", "", "iss"])
        header = self._world.header | {name: self._chance.choice([*_VALUES, ["exp"], ["b64"], {"kty": "oct", "k": ""}])}
        return "a name more in the header", self._world.sign(header, CLAIMS)

    def _claim_value(self) -> tuple[str, str]:
        name = self._chance.choice(list(CLAIMS))
        return "a claim's value", self._signed(claims_with(**{name: self._chance.choice(_VALUES)}))

    def _claim_out(self) -> tuple[str, str]:
        return "a claim left out", self._signed(claims_with(**{self._chance.choice(list(CLAIMS)): ...}))

    def _claim_more(self) -> tuple[str, str]:
        name = self._chance.choice(["nbf", "jti", "tenant", "models", "email", "azp", "x"])
        return "a claim more", self._signed(claims_with(**{name: self._chance.choice([*_VALUES, ["cnn_lstm"]])}))

    def _time(self) -> tuple[str, str]:
        near = [NOW + side * LEEWAY_S + off for side in (-1, 0, 1) for off in (-1, 0, 1)]
        times = {name: self._chance.choice(near) for name in ("iat", "exp", "nbf") if self._chance.random() < 0.6}
        if times.get("exp", NOW + 600) <= times.get("iat", NOW):
            times["iat"] = times["exp"] - self._chance.randrange(1, 100)
        return "a time near its limit", self._signed(claims_with(**times))

    def _other_json(self) -> tuple[str, str]:
        text = json.dumps(CLAIMS)
        name, value = self._chance.choice(list(CLAIMS.items()))
        other = self._chance.choice(
            [
                text[:-1] + f', "{name}": {json.dumps(value)}}}',
                text[:-1] + f', "{name}": 0}}',
                text.replace(str(NOW + 600), "NaN"),
                text.replace(str(NOW + 600), "1e999"),
                text.replace(str(NOW + 600), f"{NOW + 600}.0"),
                text.replace(str(NOW + 600), f"{(NOW + 600) / 1e9}e9"),
                text[: self._chance.randrange(len(text))],
                text + self._chance.choice([" ", "\0", "}", "1", "\n"]),
                "[" + text + "]",
                text[:-1] + ', "x": ' + "[" * 300 + "]" * 300 + "}",
                "\ufeff" + text,
                text[:-1] + ', "x": "\\ud800"}',
            ]
        )
        return "another JSON", self._world.sign(self._world.header, other.encode())

    def _spelling(self) -> tuple[str, str]:
        """The same claims in other JSON, which changes nothing: both must take it."""
        items = list(CLAIMS.items())
        self._chance.shuffle(items)
        separators = self._chance.choice([(",", ":"), (", ", ": "), (" ,\n", " :\t")])
        text = json.dumps(dict(items), separators=separators)
        return "the same in other JSON", self._world.sign(self._world.header, text.encode())

    def _signature(self) -> tuple[str, str]:
        message, _, signature = self._good.rpartition(".")
        octets = bytearray(decode(signature))
        octets[self._chance.randrange(len(octets))] ^= 1 << self._chance.randrange(8)
        length = self._chance.choice([len(octets), len(octets) - 1, 1])
        return "a signature", f"{message}.{encode(bytes(octets[:length]))}"

    def _signed(self, claims: dict[str, Any]) -> str:
        return self._world.sign(self._world.header, claims)


def we_take(world: World, token: str) -> bool:
    try:
        world.verifier.verify(token)
    except Unauthenticated:
        return False
    return True


def joserfc_takes(world: World, token: str) -> bool:
    required: Any = {"essential": True}
    registry = JWTClaimsRegistry(
        now=NOW,
        leeway=LEEWAY_S,
        iss={"essential": True, "value": "sluice"},
        aud={"essential": True, "value": "sluice"},
        sub=required,
        exp=required,
    )
    try:
        decoded = jwt.decode(token, world.key, algorithms=[world.header["alg"]])
        registry.validate(decoded.claims)
    except (JoseError, ValueError, TypeError, AttributeError, KeyError, OverflowError, RecursionError):
        return False
    return True


def compare(algorithm: str, count: int, seed: int) -> Counter[tuple[str, bool, bool]]:
    """How often which verdicts came of which kind of change: ours, then joserfc's."""
    world = world_of(algorithm)
    mutations = Mutations(world, seed)
    verdicts: Counter[tuple[str, bool, bool]] = Counter()
    for _ in range(count):
        kind, token = next(mutations)
        ours, theirs = we_take(world, token), joserfc_takes(world, token)
        assert theirs or not ours, f"taken by us alone: {kind}: {token!r}"
        assert ours or not theirs or kind in STRICTER, f"refused by us alone: {kind}: {token!r}"
        verdicts[kind, ours, theirs] += 1
    return verdicts


def assert_telling(verdicts: Counter[tuple[str, bool, bool]]) -> None:
    """Both have taken many and refused many, so that agreeing means something."""
    both = sum(count for (_, ours, theirs), count in verdicts.items() if ours and theirs)
    neither = sum(count for (_, ours, theirs), count in verdicts.items() if not ours and not theirs)
    assert both > 0.1 * verdicts.total()
    assert neither > 0.4 * verdicts.total()
    assert verdicts["the same in other JSON", True, True]
    assert not verdicts["the same in other JSON", False, True]


@pytest.mark.parametrize("algorithm", ["HS256", "RS256", "ES256"])
def test_we_take_nothing_that_joserfc_refuses(algorithm: str) -> None:
    assert_telling(compare(algorithm, 1500, seed=1))


@pytest.mark.slow
def test_we_take_nothing_that_joserfc_refuses_in_twenty_thousand_changes() -> None:
    verdicts: Counter[tuple[str, bool, bool]] = Counter()
    for seed, algorithm in enumerate(["HS256", "RS256", "ES256"], 100):
        verdicts += compare(algorithm, 7000, seed)
    assert_telling(verdicts)
    print(f"\n{verdicts.total()} changed tokens; taken by both, refused by both, by us alone:")
    for kind in sorted({kind for kind, _, _ in verdicts}):
        row = (verdicts[kind, True, True], verdicts[kind, False, False], verdicts[kind, False, True])
        print(f"  {kind:28}" + "".join(f"{count:7}" for count in row) + f"  {STRICTER.get(kind, '')}")
