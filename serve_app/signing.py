"""Signatures of registry versions: ed25519 (RFC 8032) over the manifest, which holds the hash of every other file.

registry.key   private key, PKCS #8 PEM, 0600: signs; stays with whoever publishes, never on a serving machine
registry.pub   public key, PEM: verifies; its path is `GATEWAY_REGISTRY_KEY_FILE` wherever models are loaded
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

SIGNATURE_BYTES = 64

_MAX_KEY_BYTES = 4096


class KeyRefused(ValueError):
    """A key file is missing, open to others, or holds no key of the kind that is needed."""


class Verifier:
    """Tells whether a signature was made with the private key that belongs to a public one."""

    def __init__(self, key: Ed25519PublicKey) -> None:
        self._key = key

    @classmethod
    def from_file(cls, path: Path) -> Verifier:
        """Read a public key.

        Raises:
            KeyRefused: No such file, or it holds no ed25519 public key.
        """
        data = _read(path)
        if b"PRIVATE KEY" in data:
            raise KeyRefused(f"{path} is a private key: it belongs to the publisher; give the public one")
        try:
            key = serialization.load_pem_public_key(data)
        except (ValueError, UnsupportedAlgorithm) as error:
            raise KeyRefused(f"{path} holds no public key") from error
        if not isinstance(key, Ed25519PublicKey):
            raise KeyRefused(f"{path} holds a public key of another kind; `sluice registry keygen` makes ed25519 keys")
        return cls(key)

    def accepts(self, signature: bytes, message: bytes) -> bool:
        """Whether this signature is this key's over this message."""
        try:
            self._key.verify(signature, message)
        except InvalidSignature:
            return False
        return True


class Signer:
    """Signs with a private key."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key

    @classmethod
    def from_file(cls, path: Path) -> Signer:
        """Read a private key that only its owner may read.

        Raises:
            KeyRefused: No such file, one that others may open, or it holds no ed25519 private key.
        """
        data = _read(path, secret=True)
        try:
            key = serialization.load_pem_private_key(data, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise KeyRefused(f"{path} holds no private key, or an encrypted one") from error
        if not isinstance(key, Ed25519PrivateKey):
            raise KeyRefused(f"{path} holds a private key of another kind; `sluice registry keygen` makes ed25519 keys")
        return cls(key)

    @property
    def verifier(self) -> Verifier:
        return Verifier(self._key.public_key())

    def sign(self, message: bytes) -> bytes:
        """The 64 bytes of the signature."""
        return self._key.sign(message)


def generate(private: Path, public: Path) -> None:
    """Write a new pair of keys; never over a file that is there.

    Raises:
        KeyRefused: A file is there already or cannot be written.
    """
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    _write_new(private, pem, 0o600)
    _write_new(
        public,
        key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo),
        0o644,
    )


def _read(path: Path, *, secret: bool = False) -> bytes:
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode  # of the very file that is read, not of its name
            data = file.read(_MAX_KEY_BYTES)
    except OSError as error:
        raise KeyRefused(f"cannot read the key file {path}: {error.strerror}") from error
    if secret and stat.S_IMODE(mode) & 0o077:
        raise KeyRefused(f"the private key {path} can be opened by others; run: chmod 600 {path}")
    return data


def _write_new(path: Path, data: bytes, mode: int) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except OSError as error:
        raise KeyRefused(f"cannot write {path}: {error.strerror}") from error
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
