"""Which long secrets can be guessed all the same: those that all can read, common words, keyboard walks, patterns.

Words and walks are chosen so that a random secret, as `openssl rand` makes it, has one by chance less than once in a
million; the test computes it.
"""

from __future__ import annotations

import base64
import math
import re
from collections import Counter
from itertools import pairwise

_MIN_BITS_PER_BYTE = 3.5
_MAX_WALKED = 0.6  # share of steps to the same or a neighbouring key; of a random text it is some 0.15

# From documents and defaults, each to be found in many repositories; looked for in lower case, wherever they stand.
_WELL_KNOWN = tuple(
    text.lower()
    for text in (
        b"09d25e094faa6ca2556c818166b7a9563b93f7099f6f0f4caa6cf63b88e8d3e7",  # FastAPI's tutorial
        b"192b9bdd22ab9ed4d12e236c78afcb9a393ec15f71bbf5dc987d54727823bcbf",  # Flask's
        b"a-string-secret-at-least-256-bits-long",  # jwt.io
        b"AyM1SysPpbyDfgZld3umj1qzKObwVMkoqQ-EstJQLr_T-1qS0gZH75aKtMN3Yj0iPS4hcgUuTwjAzZr1Z9CAow",  # RFC 7515, A.1
        b"hJtXIZ2uSN5kbQfbtTNWbpdmhkV8FJG-Onbc6mxCcYg",  # RFC 7520, 3.5
        b"AAPapAv4LbFbiVawEjagUBluYqN5rhna-8nuldDvOx8",  # RFC 7520, 3.6
        b"404E635266556A586E3272357538782F413F4428472B4B6250645367566B5970",  # tutorials for Spring
        b"3cfa76ef14937c1c0ea519f8fc057a80fcd04a7420f8e8bcd0a7567c272e007b",
        b"9a4f2c8d3b7a1e6f45c8a0b3f267d8b1d4e6f3c8a9d2b5f8e3a9c8b5f6v8a3d9",
        b"3EK6FD+o0+c7tzBNVfjpMkNDi2yARAAKzQlk8O2IKoxQu4nF7EdAh8s3TwpHwrdWT6R",  # Hasura
        b"UpNVntn3cDxHJpq99YMc1T1AQgQpc8kfYTuRgBiYa15BLrx8etQoXz3gZv1/u2oq",  # Supabase
        b"your-super-secret-jwt-token-with-at-least-32-characters-long",
        b"sk-9f73s3ljTXVcMT3Blb3ljTqtsKiGHXVcMT3BlbkFJLK7U",  # Dify
        b"VGhpc0lzTXlDdXN0b21TZWNyZXRLZXkwMTIzNDU2Nzg=",  # Nacos
        b"reallyreallyreallyreallyverysafe",  # PostgREST
        b"django-insecure-",  # what Django puts before those that it makes for development
    )
)

# Which letter a digit or sign is written for; `l` is read as `i`, because `1` stands for both.
_LEET = str.maketrans("0134578@$!|l", "oieastbasiii")
_UNLIKE_LETTERS = re.compile(r"[^a-z]")
# Of six letters only the two worst, most of what is left to chance; none that hexadecimal digits spell easily.
_WORDS = tuple(
    word.translate(_LEET)
    for word in (
        *("secret", "qwerty", "example", "default", "letmein", "trustno"),
        *("changeme", "changethis", "changeit", "replaceme", "replacethis", "placeholder", "donotuse", "donotshare"),
        *("password", "passphrase", "passwort", "motdepasse", "contrasena", "wachtwoord"),
        *("development", "insecure", "production", "testtest", "foobarbaz", "helloworld", "localhost", "keyboardcat"),
        *("administrator", "adminadmin", "rootroot", "roottoor", "superuser"),
        *("signingkey", "privatekey", "encryptionkey", "accesstoken", "authtoken", "jsonwebtoken", "jwttoken"),
        *("verylong", "reallylong", "bitslong", "characterslong", "thisisavery", "thisisnot", "keepthissafe"),
        *("quickbrownfox", "thelazydog", "loremipsum", "correcthorse", "batterystaple", "opensesame"),
        *("abcdefgh", "iloveyou", "sunshine", "princess", "superman", "starwars"),
    )
)

_SHIFTED = str.maketrans('!@#$%^&*()_+{}:"|<>?~', "1234567890-=[];'\\,./`")
# Rows of the American keyboard, and how far each is set in, in keys.
_ROWS = (("`1234567890-=", -1.0), ("qwertyuiop[]\\", 0.5), ("asdfghjkl;'", 0.75), ("zxcvbnm,./", 1.25))
_KEYS = {key: (row, indent + place) for row, (keys, indent) in enumerate(_ROWS) for place, key in enumerate(keys)}


def is_guessable(secret: bytes) -> bool:
    """Whether somebody would come upon the secret sooner than by trying all of its length.

    Args:
        secret: 32 bytes or more, else everything can be said of it.
    """
    text = secret.decode("utf-8", "replace")
    return _is_well_known(secret) or _holds_a_word(text) or _is_walk(text) or _is_regular(secret)


def _is_well_known(secret: bytes) -> bool:
    """Also as the bytes that a key in base64url stands for."""
    readings = secret.lower(), base64.urlsafe_b64encode(secret).rstrip(b"=").lower()
    return any(known in reading for known in _WELL_KNOWN for reading in readings)


def folds(text: str) -> tuple[str, str]:
    """The text as letters alone: with digits and signs read as the letters that they look like, and without them."""
    lower = text.lower()
    return (
        _UNLIKE_LETTERS.sub("", lower.translate(_LEET)),
        _UNLIKE_LETTERS.sub("", lower).translate(_LEET),
    )


def _holds_a_word(text: str) -> bool:
    return any(word in fold for fold in folds(text) for word in _WORDS)


def _is_walk(text: str) -> bool:
    """Whether the text was typed by letting a finger run over the keyboard."""
    keys = text.lower().translate(_SHIFTED)
    return sum(are_neighbours(*step) for step in pairwise(keys)) >= _MAX_WALKED * (len(keys) - 1)


def are_neighbours(one: str, other: str) -> bool:
    """Whether two keys touch, or are the same."""
    if one not in _KEYS or other not in _KEYS:
        return False
    (row, place), (other_row, other_place) = _KEYS[one], _KEYS[other]
    return abs(row - other_row) <= 1 and abs(place - other_place) <= 1


def _is_regular(secret: bytes) -> bool:
    """Whether the secret is a shorter text again and again, of few different bytes, or a walk along the alphabet."""
    repeats = any(secret[period:] == secret[:-period] for period in range(1, len(secret) // 2 + 1))
    steps = bytes((second - first) % 256 for first, second in pairwise(secret))
    return repeats or min(_bits_per_byte(secret), _bits_per_byte(steps)) < _MIN_BITS_PER_BYTE


def _bits_per_byte(secret: bytes) -> float:
    """Shannon entropy of the byte frequencies (Shannon 1948, eq. 4)."""
    counts = Counter(secret).values()
    return -sum(count / len(secret) * math.log2(count / len(secret)) for count in counts)
