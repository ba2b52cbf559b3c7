"""What is refused as guessable, and how seldom that hits a random secret."""

from __future__ import annotations

import base64
import math
import secrets
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest

from app import guessable
from app.guessable import are_neighbours, folds, is_guessable

RFC_7515 = "AyM1SysPpbyDfgZld3umj1qzKObwVMkoqQ-EstJQLr_T-1qS0gZH75aKtMN3Yj0iPS4hcgUuTwjAzZr1Z9CAow"

GUESSABLE = [
    "09d25e094faa6ca2556c818166b7a9563b93f7099f6f0f4caa6cf63b88e8d3e7",
    "09D25E094FAA6CA2556C818166B7A9563B93F7099F6F0F4CAA6CF63B88E8D3E7",
    "prod-09d25e094faa6ca2556c818166b7a9563b93f7099f6f0f4caa6cf63b88e8d3e7",
    "a-string-secret-at-least-256-bits-long",
    RFC_7515,
    "UpNVntn3cDxHJpq99YMc1T1AQgQpc8kfYTuRgBiYa15BLrx8etQoXz3gZv1/u2oq",
    "your-super-secret-jwt-token-with-at-least-32-characters-long",
    "django-insecure-x7#kq2v9z@p4m^w8c1r5t&b6n3j0hgfd",
    "reallyreallyreallyreallyverysafe",
    # words
    "this-is-a-very-long-secret-for-jwt-tokens",
    "thisisaveryverylongsecretforjwt!",
    "The quick brown fox jumps over the lazy dog",
    "administrator-admin-root-toor-1234",
    "s3cr3t-s3cr3t-k3y-f0r-jwt-s1gn1ng!",
    "Xk29-p@$$w0rd-of-the-desk-Vq81-zZ7",
    "my_5UP3R_53CR37_of-acme-and-co-2026",
    "acme-s.e.c.r.e.t-2026-Zx81-Vq04-Lm7",
    "acme-pa55-2-w0rd-2026-Zx81-Vq04-Lm7",
    "q1w2e3r4t5y6-acme-desk-2026-Vq81-zZ",
    "Correct-Horse-Battery-Staple-2026!",
    "CHANGE_ME_before_you_go_to_market!",
    "1l0v3y0u-mum-and-dad-and-the-dog-22",
    # walks
    "zaq12wsxcde34rfvbgt56yhnmju78ik,",
    "!QAZ2wsx#EDC4rfv%TGB6yhn&UJM8ik,",
    "1qaz2wsx3edc4rfv5tgb6yhn7ujm8ik,",
    "asdfghjkl;'zxcvbnm,./poiuytrew[]",
    "1122334455667788990qqwweerrttyyu",
]


@pytest.mark.parametrize("text", GUESSABLE)
def test_what_people_choose_is_guessable(text: str) -> None:
    assert len(text) >= 32
    assert is_guessable(text.encode())


def test_a_well_known_key_is_known_as_its_bytes_too() -> None:
    assert is_guessable(base64.urlsafe_b64decode(RFC_7515 + "=="))


def test_random_secrets_are_not() -> None:
    for _ in range(200):
        assert not is_guessable(secrets.token_urlsafe(48).encode())
        assert not is_guessable(base64.b64encode(secrets.token_bytes(48)))
        assert not is_guessable(secrets.token_bytes(48))
        assert not is_guessable(secrets.token_hex(48).encode())


# How seldom: one kind of random secret by what each of its characters is drawn from, and how many there are.

LETTERS = string.ascii_letters + string.digits
BYTES = [chr(number) if number < 128 else "\ufffd" for number in range(256)]
RANDOM: dict[str, tuple[Sequence[str], int]] = {
    "base64 of 32 bytes": (LETTERS + "+/", 43),
    "base64 of 48 bytes": (LETTERS + "+/", 64),
    "base64url of 32 bytes": (LETTERS + "-_", 43),
    "base64url of 48 bytes": (LETTERS + "-_", 64),
    "hex of 32 bytes": (string.digits + "abcdef", 64),
    "hex of 48 bytes": (string.digits + "abcdef", 96),
    "capital hex of 48 bytes": (string.digits + "ABCDEF", 96),
    "32 bytes": (BYTES, 32),
    "48 bytes": (BYTES, 48),
}


def expected_words(alphabet: Sequence[str], length: int) -> float:
    """How many words stand in a random text on average: no less than the chance that one does."""
    alike, plain = ([fold for character in alphabet if (fold := folds(character)[way])] for way in range(2))
    # Where no digit is read as a letter both ways find the same word.
    both = [fold if character.isalpha() else "" for character in alphabet if (fold := folds(character)[0])]
    expected = sum(expected_in(kept, length, len(alphabet)) for kept in (alike, plain))
    return expected - expected_in(both, length, len(alphabet))


def expected_in(kept: list[str], length: int, n_characters: int) -> float:
    """How many words stand in so many random characters, of those that are kept of an alphabet of this size."""
    letters, share = Counter(kept), len(kept) / n_characters
    return sum(
        math.comb(length, left)
        * share**left
        * (1 - share) ** (length - left)
        * (left - len(word) + 1)
        * math.prod(letters[letter] / len(kept) for letter in word)
        for word in guessable._WORDS
        for left in range(len(word), length + 1)
    )


def chance_of_a_walk(alphabet: Sequence[str], length: int) -> float:
    """Exactly, by how many steps to a neighbour were made so far and where the finger is now."""
    keys = [character.lower().translate(guessable._SHIFTED) for character in alphabet]
    touches = np.array([[are_neighbours(one, other) for other in keys] for one in keys]) / len(keys)
    apart = 1 / len(keys) - touches
    by_steps = np.zeros((length, len(keys)))
    by_steps[0] = 1 / len(keys)
    for _ in range(length - 1):
        moved = by_steps @ touches
        by_steps = by_steps @ apart
        by_steps[1:] += moved[:-1]
    return float(by_steps[math.ceil(guessable._MAX_WALKED * (length - 1)) :].sum())


@pytest.mark.parametrize("kind", RANDOM)
def test_a_random_secret_has_a_word_or_is_a_walk_less_than_once_in_a_million(kind: str) -> None:
    words, walk = expected_words(*RANDOM[kind]), chance_of_a_walk(*RANDOM[kind])
    print(f"{kind}: a word {words:.1e}, a walk {walk:.1e}")
    assert words + walk < 1e-6
