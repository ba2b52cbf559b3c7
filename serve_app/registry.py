"""The model registry: a folder of named, numbered, sealed versions; bytes in, bytes out.

    {root}/{name}/aliases.json                     {"stable": "2"}
    {root}/{name}/{version}/MANIFEST.json          SHA-256 and size of every other file here
    {root}/{name}/{version}/MANIFEST.json.sig      ed25519 signature over the manifest, where versions are signed
    {root}/{name}/{version}/model.safetensors      weights
    {root}/{name}/{version}/config.json            the model's architecture
    {root}/{name}/{version}/CARD.md, *.png         for people

A version appears whole or not at all and never changes afterwards; only a signature may be added. What `load`
returns are the very bytes that were checked: every file is opened once, relative to its folder, following no link,
and used from memory.

    RegistryError
    ├── NameRefused           a name, version or alias that could never be one
    ├── RegistryUnavailable   the root or a file in it cannot be read or written
    ├── VersionNotFound       no such model, version or alias
    ├── VersionExists         versions never change: publish under a new number
    └── ArtefactRejected      the version is there and must not be served; says why
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from serve_app import features
from serve_app.signing import SIGNATURE_BYTES, Signer, Verifier

LATEST = "latest"
WEIGHTS = "model.safetensors"
CONFIG = "config.json"
MANIFEST = "MANIFEST.json"
SIGNATURE = "MANIFEST.json.sig"
ALIASES = "aliases.json"

MAX_VERSION_BYTES = 512 * 1024**2
MAX_JSON_BYTES = 1024**2

_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
# A leading dot is no name, so nothing half-written is ever taken for a version.
_UNFINISHED = ".publishing-"
_REPLACEMENT = ".replacing-"


class RegistryError(Exception):
    """Base of everything the registry refuses; its text is one plain sentence for an operator."""


class NameRefused(RegistryError):
    pass


class RegistryUnavailable(RegistryError):
    pass


class VersionNotFound(RegistryError):
    pass


class VersionExists(RegistryError):
    pass


class ArtefactRejected(RegistryError):
    pass


Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class FileSeal(_Strict):
    """What a file's bytes must be."""

    sha256: Sha256
    size_bytes: Annotated[int, Field(ge=0)]


class Training(_Strict):
    """Where the weights came from: enough to train them again and to tell in from out of sample."""

    seed: int
    data_sha256: Sha256
    held_out_from: dict[str, date]


class Manifest(_Strict):
    """The seal of a version: a signature over this file's bytes is a signature over everything beside it."""

    schema_version: Annotated[int, Field(ge=1, le=1)] = 1
    name: str
    version: str
    created_at: datetime
    files: dict[str, FileSeal]
    feature_names: tuple[str, ...]
    features_fingerprint: Sha256
    scaler_fingerprint: Sha256
    training: Training | None  # None: it came from elsewhere, and how it was trained is not known


@dataclass(frozen=True, slots=True)
class Artefact:
    """A version in memory, checked.

    Attributes:
        name: Model name.
        version: Version, never an alias.
        config: Architecture of the model, as parsed from `config.json`.
        weights: The safetensors file.
        manifest: What the bytes were checked against.
    """

    name: str
    version: str
    config: dict[str, Any]
    weights: bytes
    manifest: Manifest


class Registry:
    """Reads and publishes model versions under one root folder.

    Args:
        root: The folder of models; need not exist before the first `publish`.
        verifier: Where given, a version without a valid signature is refused.
        signer: Where given, what is published here is signed.
        max_version_bytes: A version whose files are larger together is refused before it is read.
    """

    def __init__(
        self,
        root: Path,
        *,
        verifier: Verifier | None = None,
        signer: Signer | None = None,
        max_version_bytes: int = MAX_VERSION_BYTES,
    ) -> None:
        self._root = root
        self._verifier = verifier
        self._signer = signer
        self._max_version_bytes = max_version_bytes

    def models(self) -> list[str]:
        """Names of all models, sorted."""
        with self._folder() as root:
            return sorted(entry for entry in os.listdir(root) if _is_name(entry) and _is_folder(root, entry))

    def versions(self, name: str) -> list[str]:
        """Published versions of a model: numbers in order, then other names.

        A folder without manifest is none, and one that cannot be looked into neither: the others can still be served.

        Raises:
            VersionNotFound: No such model.
        """
        found = [entry for entry in self._folders(name) if _fault_of(self._root / name / entry / MANIFEST) is None]
        return sorted(found, key=lambda version: (not version.isdecimal(), version.zfill(64)))

    def aliases(self, name: str) -> dict[str, str]:
        """Alias → version of a model; empty when none was set."""
        with self._folder(name) as model:
            if ALIASES not in os.listdir(model):
                return {}
            aliases = parse_object(read_plain(model, ALIASES, MAX_JSON_BYTES), ALIASES)
        if not all(_is_name(alias) and isinstance(to, str) and _is_name(to) for alias, to in aliases.items()):
            raise ArtefactRejected(f"{ALIASES} of {name} must map aliases to versions")
        return aliases

    def resolve(self, name: str, version_or_alias: str = LATEST) -> str:
        """Name the version that an alias stands for now; `latest` is an alias or else the highest number.

        Raises:
            NameRefused: Text that can be neither version nor alias.
            VersionNotFound: Nothing of that name is published.
            ArtefactRejected: The version cannot be read, or for `latest` none can and one is there.
        """
        _require_name(version_or_alias, "version")
        version = self.aliases(name).get(version_or_alias, version_or_alias)
        versions = self.versions(name)
        if version in versions:
            return version
        numbers = [candidate for candidate in versions if candidate.isdecimal()]
        if version == LATEST and numbers:
            return numbers[-1]
        self._require_readable(name, self._folders(name) if version == LATEST else [version])
        raise VersionNotFound(f"{name} has no published version {version}")

    def load(self, name: str, version_or_alias: str = LATEST) -> Artefact:
        """Read one version, checked against its manifest and against this code's features.

        Raises:
            NameRefused, RegistryUnavailable, VersionNotFound: As the names say.
            ArtefactRejected: A file is missing, unknown, too large, a link or not what was sealed, the signature is
                missing or wrong, or the model was trained on other features than this code computes.
        """
        version = self.resolve(name, version_or_alias)
        with self._folder(name, version) as folder:
            manifest = self._open_seal(folder, name, version)
            config = parse_object(read_sealed(folder, CONFIG, manifest), CONFIG)
            weights = read_sealed(folder, WEIGHTS, manifest)
        return Artefact(name, version, config, weights, manifest)

    def verify(self, name: str, version_or_alias: str = LATEST) -> Manifest:
        """Check every byte of a version, pictures included, and return its manifest.

        Raises:
            RegistryError: As `load`.
        """
        version = self.resolve(name, version_or_alias)
        with self._folder(name, version) as folder:
            manifest = self._open_seal(folder, name, version)
            for file in manifest.files:
                read_sealed(folder, file, manifest)
        return manifest

    def publish(
        self,
        name: str,
        *,
        files: Mapping[str, bytes],
        feature_names: Iterable[str],
        features_fingerprint: str,
        scaler_fingerprint: str,
        training: Mapping[str, Any] | None,
        version: str | None = None,
        created_at: datetime | None = None,
    ) -> str:
        """Seal files as a new version that appears in one step, or not at all.

        Args:
            name: Model name; its folder is made when missing.
            files: File name → bytes; `model.safetensors` and `config.json` at least.
            feature_names: The features in the order the model was trained on.
            features_fingerprint: `features.fingerprint()` at training time.
            scaler_fingerprint: SHA-256 of the normaliser's buffers, 64 hex digits.
            training: `seed`, `data_sha256` and `held_out_from` (symbol → first date that training never saw);
                None where that is not known.
            version: Version to publish as; None takes the next number.
            created_at: Time of publication; None is now.

        Returns:
            The version.

        Raises:
            NameRefused: A name, version or file name out of pattern, or a version named like an alias.
            VersionExists: That version is published.
            ArtefactRejected: The version could not be served: a required file is missing, the features differ, or
                a signature is required and the signer is missing or another one.
            RegistryUnavailable: The folder cannot be written.
        """
        _require_name(name, "model name")
        with self._locked(name) as home:
            version = self._new_version(name, version)
            document = {
                "name": name,
                "version": version,
                "created_at": created_at or datetime.now(UTC),
                "files": {file: _seal(data) for file, data in files.items()},
                "feature_names": tuple(feature_names),
                "features_fingerprint": features_fingerprint,
                "scaler_fingerprint": scaler_fingerprint,
                "training": None if training is None else dict(training),
            }
            sealed = json.dumps(document, default=str, indent=2).encode() + b"\n"
            self._check_manifest(parse_manifest(sealed), name, version)
            parse_object(files[CONFIG], CONFIG)
            # The manifest is the last file written, and the rename comes after all of them reached the disk.
            _write_folder(home, version, {**files, **self._signature_of(sealed), MANIFEST: sealed})
        return version

    def sign(self, name: str, version: str) -> None:
        """Add a signature to a published version, after checking all its files; an older signature is replaced.

        Raises:
            RegistryError: As `verify`, an old signature's faults excepted.
            ValueError: This registry has no signer.
        """
        if self._signer is None:
            raise ValueError("signing needs a private key")
        with self._locked(name, must_exist=True) as home, self._folder(name, version) as folder:
            sealed = read_plain(folder, MANIFEST, MAX_JSON_BYTES)
            manifest = self._open_manifest(folder, sealed, name, version)
            for file in manifest.files:
                read_sealed(folder, file, manifest)
            _write_file(home / version, SIGNATURE, self._signature_of(sealed)[SIGNATURE], aside=home)

    def set_alias(self, name: str, alias: str, version: str) -> None:
        """Let an alias stand for a published version, in one atomic step.

        Raises:
            NameRefused: The alias is a number or the name of a version.
            VersionNotFound: No such version.
        """
        _require_name(alias, "alias")
        with self._locked(name, must_exist=True) as home:
            versions = self.versions(name)
            if version not in versions:
                raise VersionNotFound(f"{name} has no published version {version}")
            if alias.isdecimal() or alias in versions:
                raise NameRefused(f"{alias} is the name of a version and cannot be an alias")
            _write_file(
                home, ALIASES, json.dumps({**self.aliases(name), alias: version}, indent=2).encode() + b"\n", aside=home
            )

    def _new_version(self, name: str, wanted: str | None) -> str:
        versions = self._folders(name)
        if wanted is None:
            return str(1 + max((int(version) for version in versions if version.isdecimal()), default=0))
        _require_name(wanted, "version")
        if wanted == LATEST or wanted in self.aliases(name):
            raise NameRefused(f"{wanted} is an alias and cannot be a version")
        if wanted in versions:
            raise VersionExists(f"{name} version {wanted} is there and never changes: take a new number")
        return wanted

    def _require_readable(self, name: str, versions: Iterable[str]) -> None:
        """Refuse a version that is not just missing: whoever looks for it should hear where it is and what is wrong."""
        for version in versions:
            folder = self._root / name / version
            fault = _fault_of(folder / MANIFEST)
            if fault is not None and not isinstance(fault, FileNotFoundError | NotADirectoryError):
                raise ArtefactRejected(f"{folder} cannot be read: {fault.strerror}")

    def _folders(self, name: str) -> list[str]:
        with self._folder(name) as model:
            return [entry for entry in os.listdir(model) if _is_name(entry) and _is_folder(model, entry)]

    def _open_seal(self, folder: int, name: str, version: str) -> Manifest:
        sealed = read_plain(folder, MANIFEST, MAX_JSON_BYTES)
        if self._verifier is not None:
            _require_signature(folder, sealed, self._verifier, f"{name} {version}")
        return self._open_manifest(folder, sealed, name, version)

    def _open_manifest(self, folder: int, sealed: bytes, name: str, version: str) -> Manifest:
        manifest = parse_manifest(sealed)
        self._check_manifest(manifest, name, version)
        _require_same_files(set(os.listdir(folder)) - {MANIFEST, SIGNATURE}, set(manifest.files))
        return manifest

    def _signature_of(self, sealed: bytes) -> dict[str, bytes]:
        """The signature as a file by its name; nothing where versions need none."""
        if self._signer is None:
            if self._verifier is not None:
                raise ArtefactRejected("versions must be signed here: publish with the private key")
            return {}
        signature = self._signer.sign(sealed)
        if self._verifier is not None and not self._verifier.accepts(signature, sealed):
            raise ArtefactRejected("the private key does not belong to the public key that is trusted here")
        return {SIGNATURE: signature}

    def _check_manifest(self, manifest: Manifest, name: str, version: str) -> None:
        if (manifest.name, manifest.version) != (name, version):
            raise ArtefactRejected(f"the manifest seals {manifest.name} {manifest.version}, not {name} {version}")
        for file in manifest.files:
            if not _FILE.fullmatch(file) or file in (MANIFEST, SIGNATURE, ALIASES):
                raise ArtefactRejected(f"the manifest names {file!r:.80}, which is no file name of a version")
        if missing := {WEIGHTS, CONFIG} - set(manifest.files):
            raise ArtefactRejected(f"{' and '.join(sorted(missing))} is missing")
        if sum(seal.size_bytes for seal in manifest.files.values()) > self._max_version_bytes:
            raise ArtefactRejected(f"the version is larger than {self._max_version_bytes} bytes")
        _require_same_features(manifest)

    @contextmanager
    def _folder(self, *names: str) -> Iterator[int]:
        """Open root/name/version as a directory descriptor, following no link below the root."""
        for name in names:
            _require_name(name, "name")
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        try:
            folder = os.open(self._root, flags)
        except OSError as error:
            raise RegistryUnavailable(f"the registry {self._root} cannot be read: {error.strerror}") from error
        try:
            for name in names:
                folder = _step_into(folder, name, flags | os.O_NOFOLLOW)
            yield folder
        finally:
            os.close(folder)

    @contextmanager
    def _locked(self, name: str, *, must_exist: bool = False) -> Iterator[Path]:
        """The model's folder, with every other writer of it shut out."""
        home = self._root / name
        if not must_exist:
            try:
                home.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise RegistryUnavailable(f"the registry cannot be written: {error.strerror}") from error
        with self._folder(name) as folder:
            fcntl.flock(folder, fcntl.LOCK_EX)  # released when the descriptor is closed
            try:
                yield home
            except OSError as error:
                raise RegistryUnavailable(f"the registry cannot be written: {error.strerror}") from error


def open_registry(root: Path, *, key_file: Path | None = None, signing_key_file: Path | None = None) -> Registry:
    """A registry with the keys of these files.

    Args:
        root: The folder of models.
        key_file: Public key; where given, only signed versions are read.
        signing_key_file: Private key; where given, what is published is signed.

    Raises:
        KeyRefused: A file is no key of its kind.
    """
    return Registry(
        root,
        verifier=None if key_file is None else Verifier.from_file(key_file),
        signer=None if signing_key_file is None else Signer.from_file(signing_key_file),
    )


def _is_name(text: str) -> bool:
    return _NAME.fullmatch(text) is not None and ".." not in text


def _require_name(text: str, what: str) -> None:
    if not _is_name(text):
        raise NameRefused(f"{text!r:.80} is no {what}: lower-case letters, digits, '_', '-' and single '.'")


def _is_folder(parent: int, name: str) -> bool:
    try:
        return stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode)
    except OSError:  # gone since the folder was listed, or not for us to see
        return False


def _fault_of(path: Path) -> OSError | None:
    """Why a file cannot be found, None where it can."""
    try:
        path.stat()
    except OSError as error:
        return error
    return None


def _step_into(parent: int, name: str, flags: int) -> int:
    """Open a folder inside an open folder; returns the child's descriptor and closes the parent's."""
    try:
        child = os.open(name, flags, dir_fd=parent)
    except FileNotFoundError as error:
        raise VersionNotFound(f"the registry has no {name}") from error
    except OSError as error:
        raise ArtefactRejected(f"{name} is not a plain folder of the registry: {error.strerror}") from error
    os.close(parent)
    return child


def read_plain(folder: int, file: str, limit_bytes: int) -> bytes:
    """Read a plain file of an open folder whole, following no link.

    Args:
        folder: Descriptor of the folder.
        file: Name in it.
        limit_bytes: A larger file is refused.

    Raises:
        ArtefactRejected: Missing, unreadable, too large, or a link, pipe or device.
    """
    try:
        # Without NONBLOCK a named pipe in the folder would hold the opener for ever.
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    except OSError as error:
        raise ArtefactRejected(f"{file} cannot be opened as a plain file: {error.strerror}") from error
    with open(descriptor, "rb") as stream:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ArtefactRejected(f"{file} is not a plain file")
        data = stream.read(limit_bytes + 1)
    if len(data) > limit_bytes:
        raise ArtefactRejected(f"{file} is larger than {limit_bytes} bytes")
    return data


def read_sealed(folder: int, file: str, manifest: Manifest) -> bytes:
    """Read a file of an open folder that must be what the manifest sealed. Raises `ArtefactRejected`."""
    seal = manifest.files[file]
    data = read_plain(folder, file, seal.size_bytes)
    if _seal(data) != seal.model_dump():
        raise ArtefactRejected(f"{file} is not the file that was published: its size or SHA-256 differs")
    return data


def _require_signature(folder: int, sealed: bytes, verifier: Verifier, what: str) -> None:
    """Checked on the very bytes of the manifest, before anything parses them."""
    if SIGNATURE not in os.listdir(folder):
        raise ArtefactRejected(f"{what} is not signed, and only signed versions are served here")
    if not verifier.accepts(read_plain(folder, SIGNATURE, SIGNATURE_BYTES), sealed):
        raise ArtefactRejected(f"the signature over the manifest of {what} is not one of the trusted key")


def _seal(data: bytes) -> dict[str, Any]:
    return {"sha256": hashlib.sha256(data).hexdigest(), "size_bytes": len(data)}


def parse_object(data: bytes, file: str) -> dict[str, Any]:
    """A JSON object, without NaN and infinities; `file` names it in the refusal. Raises `ArtefactRejected`."""
    try:
        document = json.loads(data, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ArtefactRejected(f"{file} is not JSON") from error
    if not isinstance(document, dict):
        raise ArtefactRejected(f"{file} must hold a JSON object")
    return document


def _refuse_constant(text: str) -> None:
    raise ValueError(text)


def parse_manifest(data: bytes) -> Manifest:
    """A manifest by its bytes. Raises `ArtefactRejected`."""
    try:
        return Manifest.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ArtefactRejected(f"{MANIFEST} is invalid at {where or 'its start'}: {first['msg']}") from error


def _require_same_files(present: set[str], sealed: set[str]) -> None:
    if missing := sealed - present:
        raise ArtefactRejected(f"files of the manifest are missing: {', '.join(sorted(missing))}")
    if unknown := present - sealed:
        raise ArtefactRejected(f"files that the manifest does not know: {', '.join(sorted(unknown))[:200]}")


def _require_same_features(manifest: Manifest) -> None:
    if manifest.feature_names != tuple(features.FEATURE_NAMES):
        raise ArtefactRejected("the model was trained on other features, or on these in another order")
    if manifest.features_fingerprint != features.fingerprint():
        raise ArtefactRejected("the model was trained on other definitions of these features: train it again")


def _write_folder(home: Path, name: str, files: Mapping[str, bytes]) -> None:
    """Make a folder with its files appear in one step."""
    for stale in home.glob(f"{_UNFINISHED}*"):  # we hold the lock, so whoever wrote it is gone
        shutil.rmtree(stale)
    unfinished = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=home))
    try:
        for file, data in files.items():
            _write_synced(unfinished / file, data)
        unfinished.chmod(0o755)
        _sync(unfinished)
        unfinished.rename(home / name)
    except BaseException:
        shutil.rmtree(unfinished)
        raise
    _sync(home)


def _write_file(folder: Path, name: str, data: bytes, *, aside: Path) -> None:
    """Replace a file in one step; until then it is written aside, where no reader counts files."""
    unfinished = aside / f"{_REPLACEMENT}{name}"
    _write_synced(unfinished, data)
    unfinished.rename(folder / name)
    _sync(folder)


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
