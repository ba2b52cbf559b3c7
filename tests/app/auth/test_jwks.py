"""Key sets: which keys are taken, which are passed over, and which spoil the set."""

from __future__ import annotations

import json
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from app.auth.jwks import KeysRefused, read_jwks
from tests.app.auth.signing import ec_key, encode, encode_integer, jwks, public_jwk, rsa_key

RSA = public_jwk(rsa_key(), "rsa")
EC = public_jwk(ec_key(), "ec")
PRIVATE = {"d": encode_integer(rsa_key().private_numbers().d)}
POINT = ec_key().public_key().public_numbers()


def changed(row: dict[str, Any], **members: Any) -> dict[str, Any]:
    return {name: value for name, value in (row | members).items() if value is not ...}


def of_size(bits: int) -> dict[str, Any]:
    return public_jwk(rsa_key(bits), "rsa")


def test_keys_of_both_kinds_are_found_by_their_ids() -> None:
    keys = read_jwks(jwks(RSA, EC))
    assert (keys.get("rsa").algorithm, keys.get("ec").algorithm, len(keys)) == ("RS256", "ES256", 2)


def test_what_a_key_is_for_may_be_left_to_its_kind() -> None:
    keys = read_jwks(jwks(changed(RSA, alg=..., use=...), changed(EC, alg=..., use=...)))
    assert (keys.get("rsa").algorithm, keys.get("ec").algorithm) == ("RS256", "ES256")


@pytest.mark.parametrize(
    "row",
    [
        changed(RSA, use="enc", alg="RSA-OAEP"),
        changed(RSA, use="enc", alg=...),
        changed(RSA, alg="RS512"),
        changed(RSA, alg="PS256"),
        changed(EC, alg="ES384", crv="P-384"),
        changed(EC, alg=..., crv="P-521"),
        {"kty": "OKP", "crv": "Ed25519", "x": "AAAA", "kid": "ed"},
        {"kty": "new"},
    ],
)
def test_what_an_issuer_publishes_for_others_is_passed_over(row: dict[str, Any]) -> None:
    assert len(read_jwks(jwks(changed(row, kid="other"), EC))) == 1
    with pytest.raises(KeysRefused, match="no key in it"):
        read_jwks(jwks(row))


REFUSED: dict[str, dict[str, Any]] = {
    "a private RSA key": changed(RSA, **PRIVATE),
    "a private key for others": changed(RSA, use="enc", alg="RSA-OAEP", **PRIVATE),
    "a private point": changed(EC, d="AAAA"),
    "a shared secret": {"kty": "oct", "k": encode(b"s" * 32), "kid": "s", "alg": "HS256"},
    "a shared secret without its value": {"kty": "oct", "kid": "s"},
    "a secret's value in a public key": changed(RSA, k="AAAA"),
    "no kid": changed(RSA, kid=...),
    "an empty kid": changed(RSA, kid=""),
    "a kid that is a path": changed(RSA, kid="../../dev/null"),
    "a kid that is a number": changed(RSA, kid=1),
    "a kid too long": changed(RSA, kid="k" * 65),
    "RSA of 1024 bits": of_size(1024),
    "RSA of 2040 bits": of_size(2040),
    "RSA beyond 8192 bits": changed(RSA, n=encode_integer((1 << 8192) + 1)),
    "an exponent of 1": changed(RSA, e="AQ"),
    "an exponent of 3": changed(RSA, e="Aw"),
    "an even exponent": changed(RSA, e=encode_integer(65538)),
    "a giant exponent": changed(RSA, e=encode_integer((1 << 64) + 1)),
    "an even modulus": changed(RSA, n=encode_integer(rsa_key().public_key().public_numbers().n + 1)),
    "a modulus with a leading zero": changed(RSA, n=encode(b"\0" + b"\xff" * 256)),
    "a modulus with padding": changed(RSA, n=RSA["n"] + "="),
    "a modulus in the other alphabet": changed(RSA, n=RSA["n"][:-2] + "+/"),
    "a modulus that is a number": changed(RSA, n=5),
    "no modulus": changed(RSA, n=...),
    "no exponent": changed(RSA, e=...),
    "RS256 on a curve": changed(EC, alg="RS256"),
    "ES256 on RSA": changed(RSA, alg="ES256"),
    "RS256 for encryption": changed(RSA, use="enc"),
    "HMAC on RSA, which is passed over": changed(RSA, alg="HS256"),
    "ES256 on another curve": changed(EC, crv="P-384"),
    "ES256 on secp256k1": changed(EC, crv="secp256k1"),
    "no curve": changed(EC, crv=..., alg=...),
    "a point off the curve": changed(EC, y=encode((POINT.y ^ 1).to_bytes(32))),
    "a point at zero": changed(EC, x=encode(bytes(32)), y=encode(bytes(32))),
    "a coordinate too short": changed(EC, x=encode(POINT.x.to_bytes(33)[2:])),
    "a coordinate too long": changed(EC, x=encode(POINT.x.to_bytes(33))),
    "no x": changed(EC, x=...),
    "operations without verify": changed(RSA, key_ops=["encrypt"]),
    "operations with sign": changed(RSA, key_ops=["verify", "sign"]),
    "operations that are text": changed(RSA, key_ops="verify"),
    "a use that is a list": changed(RSA, use=["sig"]),
    "an alg that is a list": changed(RSA, alg=["RS256"]),
    "a kty that is a number": changed(RSA, kty=1),
    "no kty": changed(RSA, kty=...),
    "an end that is text": changed(RSA, exp="1"),
    "an end before its beginning": changed(RSA, nbf=10, exp=10),
    "an end in the year 1e999": changed(RSA, exp=1e18),
    "a beginning that is true": changed(RSA, nbf=True),
    "a negative beginning": changed(RSA, nbf=-1),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_key_that_must_not_be_there_spoils_the_set(name: str) -> None:
    row = REFUSED[name]
    good = {"a private key for others": [EC]}.get(name, [] if "passed over" in name else [EC])
    with pytest.raises(KeysRefused) as refusal:
        read_jwks(jwks(*good, row))
    assert len(str(refusal.value)) < 200
    for member in ("n", "x", "y", "d", "k"):
        assert not isinstance(row.get(member), str) or len(row[member]) < 8 or row[member] not in str(refusal.value)


def test_two_keys_of_one_id_spoil_the_set() -> None:
    with pytest.raises(KeysRefused, match="another"):
        read_jwks(jwks(RSA, changed(EC, kid="rsa")))


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b'{"keys": {}}',
        b'{"keys": []}',
        b'{"keys": [1]}',
        b'{"keys": null}',
        b"\xff\xfe",
        b"\xef\xbb\xbf" + jwks(RSA),
        jwks(RSA)[:-1],
        jwks(RSA)[:-1] + b',"keys":[]}',
        jwks(RSA).replace(b'"kty"', b'"kty": "RSA", "kty"'),
        b'{"keys":' + b"[" * 20_000 + b"]" * 20_000 + b"}",
        b" " * (64 << 10) + jwks(RSA),
        jwks(*(changed(EC, kid=f"k{number}") for number in range(33))),
        b"-----BEGIN PUBLIC KEY-----",
        json.dumps(RSA).encode(),
    ],
    ids=range(18),
)
def test_what_is_no_key_set_is_refused(text: bytes) -> None:
    with pytest.raises(KeysRefused):
        read_jwks(text)


def test_a_key_s_own_times_are_read() -> None:
    key = read_jwks(jwks(changed(RSA, nbf=5, exp=7))).get("rsa")
    assert (key.not_before, key.not_after) == (5, 7)


def test_a_key_on_another_curve_has_no_place_in_a_key_of_ours() -> None:
    numbers = ec_key("p384", ec.SECP384R1).public_key().public_numbers()
    row = {
        "kty": "EC",
        "crv": "P-256",
        "kid": "k",
        "x": encode(numbers.x.to_bytes(48)),
        "y": encode(numbers.y.to_bytes(48)),
    }
    with pytest.raises(KeysRefused, match="32 bytes"):
        read_jwks(jwks(row))
