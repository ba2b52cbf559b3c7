"""Published examples of signed tokens: what is ours verifies, what is not is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicNumbers
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicNumbers
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from app.auth.jws import decode_canonical, key_of, take_apart
from app.auth.keys import Key, KeySet
from app.errors import Unauthenticated
from tests.app.auth.signing import CLAIMS, decode, ec_key, encode, sign_with
from tests.app.auth.signing import key_of as public_key_of

# RFC 7515, appendix A: one payload, three keys.
PAYLOAD = "eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ"
A1_SECRET = "AyM1SysPpbyDfgZld3umj1qzKObwVMkoqQ-EstJQLr_T-1qS0gZH75aKtMN3Yj0iPS4hcgUuTwjAzZr1Z9CAow"
A1 = f"eyJ0eXAiOiJKV1QiLA0KICJhbGciOiJIUzI1NiJ9.{PAYLOAD}.dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk"
A2_MODULUS = (
    "ofgWCuLjybRlzo0tZWJjNiuSfb4p4fAkd_wWJcyQoTbji9k0l8W26mPddxHmfHQp-Vaw-4qPCJrcS2mJPMEzP1Pt0Bm4d4QlL-yRT-SFd2lZS-pCg"
    "NMsD1W_YpRPEwOWvG6b32690r2jZ47soMZo9wGzjb_7OMg0LOL-bSf63kpaSHSXndS5z5rexMdbBYUsLA9e-KXBdQOS-UTo7WTBEMa2R2CapHg665"
    "xsmtdVMTBQY4uDZlxvb3qCo5ZwKh9kG4LT6_I5IhlJH7aGhyxXFvUK-DWNmoudF8NAco9_h9iaGNj8q2ethFkMLs91kzk2PAcDTW9gb54h4FRWyuX"
    "poQ"
)
A2 = (
    f"eyJhbGciOiJSUzI1NiJ9.{PAYLOAD}."
    "cC4hiUPoj9Eetdgtv3hF80EGrhuB__dzERat0XF9g2VtQgr9PJbu3XOiZj5RZmh7AAuHIm4Bh-0Qc_lF5YKt_O8W2Fp5jujGbds9uJdbF9CUAr7t"
    "1dnZcAcQjbKBYNX4BAynRFdiuB--f_nZLgrnbyTyWzO75vRK5h6xBArLIARNPvkSjtQBMHlb1L07Qe7K0GarZRmB_eSN9383LcOLn6_dO--xi12j"
    "zDwusC-eOkHWEsqtFZESc6BfI7noOPqvhJ1phCnvWh6IeYI2w9QOYEUipUTI8np6LbgGY9Fs98rqVt5AXLIhWkWywlVmtVrBp0igcN_IoypGlUPQ"
    "Ge77Rw"
)
A3_POINT = ("f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU", "x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0")
A3 = (
    f"eyJhbGciOiJFUzI1NiJ9.{PAYLOAD}."
    "DtEhU3ljbEg8L38VWAfUAqOyKAM6-Xx-F4GawxaepmXFCgfTjDxw5djxLa8ISlSApmWQxfKTUJqPP3-Kg6NU1Q"
)
A5_UNSECURED = f"eyJhbGciOiJub25lIn0.{PAYLOAD}."

# RFC 7520, sections 4.1 and 4.4: one text, an RSA key under a mail address, a shared secret under an UUID.
TEXT = (
    "SXTigJlzIGEgZGFuZ2Vyb3VzIGJ1c2luZXNzLCBGcm9kbywgZ29pbmcgb3V0IHlvdXIgZG9vci4gWW91IHN0ZXAgb250byB0aGUgcm9hZCwgYW5k"
    "IGlmIHlvdSBkb24ndCBrZWVwIHlvdXIgZmVldCwgdGhlcmXigJlzIG5vIGtub3dpbmcgd2hlcmUgeW91IG1pZ2h0IGJlIHN3ZXB0IG9mZiB0by4"
)
S41_HEADER = "eyJhbGciOiJSUzI1NiIsImtpZCI6ImJpbGJvLmJhZ2dpbnNAaG9iYml0b24uZXhhbXBsZSJ9"
S41_MODULUS = (
    "n4EPtAOCc9AlkeQHPzHStgAbgs7bTZLwUBZdR8_KuKPEHLd4rHVTeT-O-XV2jRojdNhxJWTDvNd7nqQ0VEiZQHz_AJmSCpMaJMRBSFKrKb2wqVwGU"
    "_NsYOYL-QtiWN2lbzcEe6XC0dApr5ydQLrHqkHHig3RBordaZ6Aj-oBHqFEHYpPe7Tpe-OfVfHd1E6cS6M1FZcD1NNLYD5lFHpPI9bTwJlsde3uhG"
    "qC0ZCuEHg8lhzwOHrtIQbS0FVbb9k3-tVTU4fg_3L_vniUFAKwuCLqKnS2BYwdq_mzSnbLY7h_qixoR7jig3__kRhuaxwUkRz5iaiQkqgc5gHdrNP"
    "5zw"
)
S41_SIGNATURE = (
    "MRjdkly7_-oTPTS3AXP41iQIGKa80A0ZmTuV5MEaHoxnW2e5CZ5NlKtainoFmKZopdHM1O2U4mwzJdQx996ivp83xuglII7PNDi84wnB-BDkoBwA7"
    "8185hX-Es4JIwmDLJK3lfWRa-XtL0RnltuYv746iYTh_qHRD68BNt1uSNCrUCTJDt5aAE6x8wW1Kt9eRo4QPocSadnHXFxnt8Is9UzpERV0ePPQdL"
    "uW3IS_de3xyIrDaLGdjluPxUAhb6L2aXic1U12podGU0KLUQSE_oI-ZnmKJ3F4uOZDnd6QZWJushZ41Axf_fcIe8u9ipH84ogoree7vjbU5y18kDq"
    "uDg"
)
S44_KID = "018c0ae5-4d9b-471b-bfd6-eef314bc7037"
S44_SECRET = "hJtXIZ2uSN5kbQfbtTNWbpdmhkV8FJG-Onbc6mxCcYg"
S44 = (
    f"eyJhbGciOiJIUzI1NiIsImtpZCI6IjAxOGMwYWU1LTRkOWItNDcxYi1iZmQ2LWVlZjMxNGJjNzAzNyJ9.{TEXT}."
    "s0h6KThzkfBBBkLspW1h84VsJZFTsPPqMDA7g1Md7p0"
)


def rsa_public(modulus: str) -> Key:
    return Key.rs256(RSAPublicNumbers(65537, int.from_bytes(decode(modulus))).public_key())


def point_public(x: str, y: str) -> Key:
    numbers = EllipticCurvePublicNumbers(int.from_bytes(decode(x)), int.from_bytes(decode(y)), SECP256R1())
    return Key.es256(numbers.public_key())


PUBLISHED: dict[str, tuple[str, Mapping[str | None, Key]]] = {
    "RFC 7515 A.1": (A1, {None: Key.hs256(decode(A1_SECRET))}),
    "RFC 7515 A.2": (A2, {None: rsa_public(A2_MODULUS)}),
    "RFC 7515 A.3": (A3, {None: point_public(*A3_POINT)}),
    "RFC 7520 4.4": (S44, {S44_KID: Key.hs256(decode(S44_SECRET))}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_example_verifies_with_its_key_and_with_no_other(name: str) -> None:
    token, keys = PUBLISHED[name]
    signed = take_apart(token)
    assert key_of(signed, KeySet(keys)) in keys.values()
    assert signed.payload == decode(token.split(".")[1])
    for other, (_, strange) in PUBLISHED.items():
        if other != name:
            with pytest.raises(Unauthenticated):
                key_of(signed, KeySet(strange))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_example_with_any_bit_of_its_signature_turned_is_refused(name: str) -> None:
    token, keys = PUBLISHED[name]
    head, payload, signature = token.split(".")
    octets = decode(signature)
    for bit in range(0, 8 * len(octets), 7):
        turned = bytearray(octets)
        turned[bit // 8] ^= 1 << bit % 8
        with pytest.raises(Unauthenticated):
            key_of(take_apart(f"{head}.{payload}.{encode(bytes(turned))}"), KeySet(keys))


def test_an_unsecured_example_is_refused() -> None:
    with pytest.raises(Unauthenticated):
        take_apart(A5_UNSECURED)


def test_an_example_whose_key_id_is_not_one_of_ours_is_refused_though_its_signature_is_right() -> None:
    assert rsa_public(S41_MODULUS).has_signed(f"{S41_HEADER}.{TEXT}".encode(), decode(S41_SIGNATURE))
    with pytest.raises(Unauthenticated):
        take_apart(f"{S41_HEADER}.{TEXT}.{S41_SIGNATURE}")


def test_a_signature_on_a_curve_is_two_numbers_of_32_bytes_and_nothing_else() -> None:
    token = sign_with(ec_key(), {"alg": "ES256"}, CLAIMS)
    head, payload, signature = token.split(".")
    keys = KeySet({None: public_key_of(ec_key())})
    assert key_of(take_apart(token), keys)
    octets = decode(signature)
    r, s = int.from_bytes(octets[:32]), int.from_bytes(octets[32:])
    order = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
    others = {
        "DER": encode_dss_signature(r, s),
        "both zero": bytes(64),
        "s zero": octets[:32] + bytes(32),
        "r zero": bytes(32) + octets[32:],
        "r is the order": order.to_bytes(32) + octets[32:],
        "longer by a zero": b"\0" + octets,
        "r and s of 48 bytes": r.to_bytes(48) + s.to_bytes(48),
        "one byte short": octets[:-1],
        "swapped": octets[32:] + octets[:32],
    }
    for other in others.values():
        forged = take_apart(f"{head}.{payload}.{encode(other)}")
        with pytest.raises(Unauthenticated):
            key_of(forged, keys)


@pytest.mark.parametrize("part", ["YQ==", "YQ=", "YR", "Y", "YWJj\n", "YW Jj", "YWJj+", "/w", "é", "ＹＱ", "YQ\0"])
def test_base64url_has_one_spelling(part: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        decode_canonical(part)


@pytest.mark.parametrize(("size_bytes", "fits"), [(384, True), (385, False)])
def test_a_header_of_512_characters_fits_and_no_longer_one(size_bytes: int, fits: bool) -> None:
    bare = json.dumps({"alg": "HS256", "typ": "at+jwt", "kid": "k" * 64, "cty": ""})
    header = bare.replace('"cty": "', '"cty": "' + "c" * (size_bytes - len(bare)))
    token = f"{encode(header.encode())}.e30.e30"
    if fits:
        assert take_apart(token).kid == "k" * 64
    else:
        with pytest.raises(Unauthenticated):
            take_apart(token)


class TakesAnything:
    """A library's key that finds every signature right."""

    def verify(self, message: bytes, signature: bytes) -> bool:
        return True


@pytest.mark.parametrize(("algorithm", "size_bytes"), [("HS256", 32), ("ES256", 64), ("RS256", 256)])
def test_a_signature_of_another_length_never_reaches_the_library(algorithm: str, size_bytes: int) -> None:
    key = Key(algorithm, TakesAnything(), size_bytes)
    assert key.has_signed(b"", bytes(size_bytes))
    assert not any(key.has_signed(b"", bytes(size)) for size in (0, 1, size_bytes - 1, size_bytes + 1, 2 * size_bytes))
