"""`sluice serve` with secrets and key files that are no good: one line that does not print them, and exit code 78."""

from __future__ import annotations

import base64
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization

from app.cli import main
from app.settings import Settings, variable_of
from tests.app.auth.signing import ec_key, encode_integer, jwks, public_jwk, rsa_key
from tests.app.cli.command import EX_CONFIG, SECRET, assert_one_plain_line, sluice

PEM = rsa_key().public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
SSH = ec_key().public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)

SECRETS = {
    "one letter": "a",
    "short": "Xq9-vB3_kLm2",
    "31 bytes": SECRET[:31],
    "one letter many times": "k" * 64,
    "two letters": "kq" * 32,
    "digits in order": "12345678901234567890123456789012",
    "the alphabet": "abcdefghijklmnopqrstuvwxyzabcdefghijklmnopqrstuvwxyz"[:20] * 2,
    "secret": "secret" * 8,
    "changeme": "changeme-changeme-changeme-changeme",
    "your-256-bit-secret": "your-256-bit-secret-your-256-bit-secret",
    "a password": "correct-horse-battery-password-2024-staple",
    "supersecret": "SuperSecretKeyForJwtSigning1234567890",
    "a development key": "development-key-do-not-use-9f8e7d6c5b4a",
    "FastAPI's tutorial": "09d25e094faa6ca2556c818166b7a9563b93f7099f6f0f4caa6cf63b88e8d3e7",
    "a sentence": "The quick brown fox jumps over the lazy dog",
    "a walk over the keyboard": "zaq12wsxcde34rfvbgt56yhnmju78ik,",
    "leet": "s3cr3t-s3cr3t-k3y-f0r-jwt-s1gn1ng!",
    "a public key": PEM.decode(),
    "an SSH key": SSH.decode(),
    "spaces": " " * 48,
}


def secret_file(content: bytes, mode: int = 0o600) -> Callable[[Path], dict[str, str]]:
    def make(folder: Path) -> dict[str, str]:
        (folder / "secret").write_bytes(content)
        (folder / "secret").chmod(mode)
        return {"jwt_secret_file": str(folder / "secret")}

    return make


def key_file(content: bytes, mode: int = 0o644, **settings: str) -> Callable[[Path], dict[str, str]]:
    def make(folder: Path) -> dict[str, str]:
        (folder / "jwks").write_bytes(content)
        (folder / "jwks").chmod(mode)
        return {"jwt_jwks_file": str(folder / "jwks"), **settings}

    return make


def pipe(folder: Path) -> dict[str, str]:
    os.mkfifo(folder / "secret", 0o600)
    return {"jwt_secret_file": str(folder / "secret")}


GOOD = public_jwk(rsa_key(), "k1")
PRIVATE = {**GOOD, "d": encode_integer(rsa_key().private_numbers().d)}
P384 = {"kty": "EC", "crv": "P-384", "kid": "k", "x": "A" * 64, "y": "A" * 64, "alg": "ES256"}
FILES: dict[str, Callable[[Path], dict[str, str]]] = {
    "a secret file that is not there": lambda folder: {"jwt_secret_file": str(folder / "nowhere")},
    "a folder as secret file": lambda folder: {"jwt_secret_file": str(folder)},
    "a pipe as secret file": pipe,
    "a secret file open to the group": secret_file(SECRET.encode(), 0o640),
    "a secret file open to all": secret_file(SECRET.encode(), 0o604),
    "an empty secret file": secret_file(b""),
    "a secret file of spaces": secret_file(b" " * 64 + b"\n"),
    "a weak secret file": secret_file(b"password" * 8),
    "zeros in the secret file": secret_file(bytes(64)),
    "a key file that is not there": lambda folder: {"jwt_jwks_file": str(folder / "nowhere")},
    "a folder as key file": lambda folder: {"jwt_jwks_file": str(folder)},
    "a key file that others may write": key_file(jwks(GOOD), 0o664),
    "a key file in PEM": key_file(PEM),
    "an empty key file": key_file(b""),
    "half a key file": key_file(jwks(GOOD)[:200]),
    "a key file without keys": key_file(jwks()),
    "RSA of 1024 bits": key_file(jwks(public_jwk(rsa_key(1024), "k1"))),
    "a private key": key_file(jwks(PRIVATE)),
    "a shared secret as key": key_file(
        jwks({"kty": "oct", "kid": "k1", "k": base64.b64encode(SECRET.encode()).decode()})
    ),
    "a curve that is not the algorithm's": key_file(jwks(P384)),
    "two keys of one id": key_file(jwks(GOOD, GOOD)),
    "keys and a secret": key_file(jwks(GOOD), jwt_secret=SECRET),
    "keys by file and by URL": key_file(jwks(GOOD), jwt_jwks_url="https://issuer.example/keys"),
    "keys over plain http": lambda _: {"jwt_jwks_url": "http://issuer.example/keys"},
    "keys from a file URL": lambda _: {"jwt_jwks_url": "file:///etc/passwd"},
    "keys from nowhere": lambda _: {"jwt_jwks_url": "https:///keys"},
    "a URL with a password": lambda _: {"jwt_jwks_url": f"https://user:{SECRET}@issuer.example/keys"},
    "a URL with a line end": lambda _: {"jwt_jwks_url": "https://issuer.example/keys\r\nX: y"},
    "certificates that are none": lambda folder: {
        "jwt_jwks_url": "https://issuer.example/keys",
        "jwt_jwks_ca_file": str(folder / "nowhere"),
    },
    "nothing at all": lambda _: {},
}


@pytest.fixture
def refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[dict[str, str]], str]:
    """The line with which the command, in this process, refuses to start with these settings."""

    def run(values: dict[str, str]) -> str:
        for field in Settings.model_fields:
            monkeypatch.delenv(variable_of(field), raising=False)
        for field, value in values.items():
            monkeypatch.setenv(variable_of(field), value)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["sluice", "serve", "--port", "0"])
        with pytest.raises(SystemExit) as end:
            main()
        said = capsys.readouterr()
        assert end.value.code == EX_CONFIG, said.err
        assert said.out == ""
        assert said.err.startswith("sluice: ")
        assert said.err.count("\n") == 1
        assert len(said.err) < 600
        return said.err

    return run


def assert_unsaid(line: str, *texts: Any) -> None:
    """No part of a secret, of eight characters or more, is in the line."""
    for text in texts:
        for at in range(0, max(1, len(text) - 8), 4):
            assert len(text) < 8 or text[at : at + 8] not in line, line


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_that_could_be_guessed_is_refused_unprinted(
    name: str, refusal: Callable[[dict[str, str]], str]
) -> None:
    line = refusal({"jwt_secret": SECRETS[name]})
    assert "secret" in line
    if name not in {"secret", "supersecret", "your-256-bit-secret"}:  # they are made of the words that explain
        assert_unsaid(line, SECRETS[name])


@pytest.mark.parametrize("name", FILES)
def test_a_file_or_url_that_is_no_good_is_refused_unprinted(
    name: str, tmp_path: Path, refusal: Callable[[dict[str, str]], str]
) -> None:
    values = FILES[name](tmp_path)
    line = refusal(values)
    assert_unsaid(line, SECRET, GOOD["n"], PRIVATE["d"], PEM.decode()[40:])


def test_the_same_holds_for_the_command_as_a_process(tmp_path: Path) -> None:
    (tmp_path / "jwks").write_text(json.dumps({"keys": [PRIVATE]}))
    weak = sluice("serve", cwd=tmp_path, GATEWAY_JWT_SECRET="hunter2" * 6)
    assert_one_plain_line(weak, EX_CONFIG, "guess")
    assert "hunter2" not in weak.stderr
    assert_one_plain_line(
        sluice("serve", cwd=tmp_path, GATEWAY_JWT_JWKS_FILE=str(tmp_path / "jwks")), EX_CONFIG, "public keys only"
    )
