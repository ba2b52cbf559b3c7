from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from serve_app import features
from serve_app.registry import SIGNATURE, ArtefactRejected, Registry
from serve_app.signing import KeyRefused, Signer, Verifier, generate

NAME = "cnn_lstm"


def publish(registry: Registry, weights: bytes = b"weights") -> str:
    facts: dict[str, Any] = {
        "feature_names": features.FEATURE_NAMES,
        "features_fingerprint": features.fingerprint(),
        "scaler_fingerprint": "0" * 64,
        "training": None,
    }
    return registry.publish(NAME, files={"model.safetensors": weights, "config.json": b"{}"}, **facts)


def keys(folder: Path) -> tuple[Signer, Verifier]:
    folder.mkdir(exist_ok=True)
    generate(folder / "registry.key", folder / "registry.pub")
    return Signer.from_file(folder / "registry.key"), Verifier.from_file(folder / "registry.pub")


@pytest.fixture
def signer(tmp_path: Path) -> Signer:
    return keys(tmp_path / "keys")[0]


def test_a_signed_version_loads_where_a_signature_is_required(tmp_path: Path, signer: Signer) -> None:
    registry = Registry(tmp_path / "models", verifier=signer.verifier, signer=signer)
    version = publish(registry)
    reader = Registry(tmp_path / "models", verifier=signer.verifier)
    assert reader.load(NAME).weights == b"weights"
    assert reader.verify(NAME).version == version
    assert Registry(tmp_path / "models").load(NAME).weights == b"weights", "without a key the signature is no stranger"


def test_an_unsigned_version_is_refused_there_until_it_is_signed(tmp_path: Path, signer: Signer) -> None:
    version = publish(Registry(tmp_path / "models"))
    registry = Registry(tmp_path / "models", verifier=signer.verifier, signer=signer)
    for read in (registry.load, registry.verify):
        with pytest.raises(ArtefactRejected, match="not signed"):
            read(NAME)
    registry.sign(NAME, version)
    assert registry.load(NAME).version == version


def test_every_hash_right_and_the_signature_wrong_is_refused(tmp_path: Path, signer: Signer) -> None:
    intruder, _ = keys(tmp_path / "intruder")
    publish(Registry(tmp_path / "models", signer=intruder))
    Registry(tmp_path / "models").verify(NAME)
    with pytest.raises(ArtefactRejected, match="signature over the manifest"):
        Registry(tmp_path / "models", verifier=signer.verifier).load(NAME)


def test_a_signature_of_one_version_is_none_of_another(tmp_path: Path, signer: Signer) -> None:
    registry = Registry(tmp_path / "models", verifier=signer.verifier, signer=signer)
    first, second = publish(registry), publish(registry, b"other")
    home = tmp_path / "models" / NAME
    shutil.copy(home / first / SIGNATURE, home / second / SIGNATURE)
    with pytest.raises(ArtefactRejected, match="signature over the manifest"):
        registry.load(NAME, second)


@pytest.mark.parametrize("signature", [b"", b"\x00" * 63, b"\x00" * 64, b"\x00" * 65])
def test_a_signature_of_any_size_that_is_none_is_refused(tmp_path: Path, signer: Signer, signature: bytes) -> None:
    version = publish(Registry(tmp_path / "models"))
    (tmp_path / "models" / NAME / version / SIGNATURE).write_bytes(signature)
    with pytest.raises(ArtefactRejected):
        Registry(tmp_path / "models", verifier=signer.verifier).load(NAME)


def test_what_is_checked_first_is_the_signature(tmp_path: Path, signer: Signer) -> None:
    version = publish(Registry(tmp_path / "models", signer=signer))
    (tmp_path / "models" / NAME / version / "MANIFEST.json").write_bytes(b"{" * 1000)
    with pytest.raises(ArtefactRejected, match="signature"):
        Registry(tmp_path / "models", verifier=signer.verifier).load(NAME)


def test_a_damaged_version_is_not_signed(tmp_path: Path, signer: Signer) -> None:
    registry = Registry(tmp_path / "models", signer=signer)
    version = publish(Registry(tmp_path / "models"))
    (tmp_path / "models" / NAME / version / "model.safetensors").write_bytes(b"weightz")
    with pytest.raises(ArtefactRejected, match="not the file that was published"):
        registry.sign(NAME, version)
    assert not (tmp_path / "models" / NAME / version / SIGNATURE).exists()


def test_nothing_is_published_that_could_not_be_served(tmp_path: Path, signer: Signer) -> None:
    other, _ = keys(tmp_path / "other")
    with pytest.raises(ArtefactRejected, match="must be signed"):
        publish(Registry(tmp_path / "models", verifier=signer.verifier))
    with pytest.raises(ArtefactRejected, match="does not belong"):
        publish(Registry(tmp_path / "models", verifier=signer.verifier, signer=other))
    assert Registry(tmp_path / "models").versions(NAME) == []


def test_keys_are_written_once_and_the_private_one_for_its_owner_only(tmp_path: Path) -> None:
    keys(tmp_path)
    assert (tmp_path / "registry.key").stat().st_mode & 0o777 == 0o600
    with pytest.raises(KeyRefused, match="exists"):
        generate(tmp_path / "registry.key", tmp_path / "other.pub")
    assert not (tmp_path / "other.pub").exists()


def test_a_key_in_the_wrong_place_is_told(tmp_path: Path) -> None:
    keys(tmp_path)
    private, public = tmp_path / "registry.key", tmp_path / "registry.pub"
    with pytest.raises(KeyRefused, match="is a private key"):
        Verifier.from_file(private)
    with pytest.raises(KeyRefused, match="can be opened by others"):
        Signer.from_file(public)
    public.chmod(0o600)
    with pytest.raises(KeyRefused, match="no private key"):
        Signer.from_file(public)
    with pytest.raises(KeyRefused, match="cannot read"):
        Verifier.from_file(tmp_path / "none")
    private.chmod(0o640)
    with pytest.raises(KeyRefused, match="chmod 600"):
        Signer.from_file(private)


def test_a_key_of_another_kind_is_refused(tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    encoding, spki = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    (tmp_path / "ec.pub").write_bytes(key.public_key().public_bytes(encoding, spki))
    with pytest.raises(KeyRefused, match="another kind"):
        Verifier.from_file(tmp_path / "ec.pub")
    (tmp_path / "none.pub").write_bytes(b"hello")
    with pytest.raises(KeyRefused, match="no public key"):
        Verifier.from_file(tmp_path / "none.pub")
