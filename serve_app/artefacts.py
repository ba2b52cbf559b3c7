"""Model folders from elsewhere, made into files that the registry can seal.

Two layouts are taken: the old `model.pth` with an optional `config.json` of five fields, and our own
`model.safetensors` with `config.json`. Whatever comes is measured before anything parses it; a pickle is read by
`torch.load(weights_only=True)` and in no other way, and only its tensors go on, in a new safetensors file.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from serve_app.contract import N_FEATURES, N_STEPS
from serve_app.engine.weights import expected_tensors, load_model, require_tensors
from serve_app.features import FEATURE_NAMES, fingerprint
from serve_app.model import HybridModel, ModelConfig
from serve_app.registry import (
    CONFIG,
    MANIFEST,
    MAX_JSON_BYTES,
    MAX_VERSION_BYTES,
    SIGNATURE,
    WEIGHTS,
    ArtefactRejected,
    Manifest,
    parse_manifest,
    parse_object,
    read_plain,
    read_sealed,
)

OLD_WEIGHTS = "model.pth"
CARD = "CARD.md"

MAX_ENTRIES = 4096  # of an archive; ours has one per tensor and a handful more

_FOR_PEOPLE = re.compile(r"CARD\.md|metrics\.json|[A-Za-z0-9][A-Za-z0-9_-]*\.png")
_SIZES = {field.name for field in fields(ModelConfig)}
_WRAPPERS = ("model_state_dict", "state_dict")  # what training scripts call the weights among their other state

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Import:
    """What a folder comes to.

    Attributes:
        files: File name → bytes, for `Registry.publish`.
        facts: The other arguments of `Registry.publish`: features, scaler and training.
        left_out: Files of the folder that do not go along.
    """

    files: dict[str, bytes]
    facts: dict[str, Any]
    left_out: tuple[str, ...]


class OldConfig(BaseModel):
    """The old `config.json`. The device is read and dropped: where a model runs is a setting, not a property of it."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())

    model_type: Literal["CNNLSTMHybridModel"] = "CNNLSTMHybridModel"
    input_dim: Literal[50] = 50
    output_dim: Literal[4] = 4  # three classes and one regression
    sequence_length: Literal[60] = 60
    device: Literal["cpu", "cuda"] = "cpu"


def import_folder(folder: Path, progress: Progress = lambda stage: None) -> Import:
    """Read a model folder, check that it can be served, and convert it.

    A folder with a manifest brings its facts along and must hold what the manifest seals. Without one nothing is
    known of the training, and that the model wants the features of this code is taken on trust; the card says so.

    Args:
        folder: Holds `model.pth` or `model.safetensors`.
        progress: Told what begins.

    Raises:
        ArtefactRejected: With the reason.
    """
    progress("reading")
    found, manifest, left_out = _read_folder(folder)
    if OLD_WEIGHTS in found:
        progress("converting")
        config = _old_config(found.get(CONFIG, b"{}"))
        weights = _convert(found[OLD_WEIGHTS], config)
    else:
        config, weights = parse_object(found[CONFIG], CONFIG), found[WEIGHTS]
    progress("running it once")
    model = load_model(config, weights)
    _require_answer(model)
    files = {name: data for name, data in found.items() if name != OLD_WEIGHTS}
    files[WEIGHTS] = weights
    files[CONFIG] = json.dumps(config, indent=2).encode() + b"\n" if OLD_WEIGHTS in found else found[CONFIG]
    files.setdefault(CARD, _card(found).encode())
    return Import(files, _facts(manifest, model), left_out)


def scaler_fingerprint(model: HybridModel) -> str:
    """SHA-256 of the normaliser: mean, then deviation, little-endian float32."""
    buffers = (model.normalise.mean, model.normalise.sd)
    return hashlib.sha256(b"".join(buffer.numpy().astype("<f4").tobytes() for buffer in buffers)).hexdigest()


# --- reading ------------------------------------------------------------------------------------------------------


def _read_folder(path: Path) -> tuple[dict[str, bytes], Manifest | None, tuple[str, ...]]:
    """The files that go along, the manifest where there is one, and the names of what stays behind."""
    try:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise ArtefactRejected(f"{path} cannot be read: {error.strerror}") from error
    try:
        names = set(os.listdir(folder))
        if MANIFEST in names:
            manifest = parse_manifest(read_plain(folder, MANIFEST, MAX_JSON_BYTES))
            _require_size(sum(seal.size_bytes for seal in manifest.files.values()))
            files = {name: read_sealed(folder, name, manifest) for name in manifest.files}
        else:
            manifest = None
            wanted = sorted(name for name in names if _wanted(name))
            _require_size(sum(os.stat(name, dir_fd=folder, follow_symlinks=False).st_size for name in wanted))
            files = {name: read_plain(folder, name, MAX_VERSION_BYTES) for name in wanted}
    finally:
        os.close(folder)
    _require_one_layout(files)
    return files, manifest, tuple(sorted(names - set(files) - {MANIFEST, SIGNATURE}))


def _wanted(name: str) -> bool:
    return name in (OLD_WEIGHTS, WEIGHTS, CONFIG) or _FOR_PEOPLE.fullmatch(name) is not None


def _require_size(size_bytes: int) -> None:
    if size_bytes > MAX_VERSION_BYTES:
        raise ArtefactRejected(f"the folder holds {size_bytes} bytes; at most {MAX_VERSION_BYTES} are taken")


def _require_one_layout(files: Mapping[str, bytes]) -> None:
    weights = {OLD_WEIGHTS, WEIGHTS} & set(files)
    if len(weights) != 1:
        raise ArtefactRejected(f"the folder must hold {OLD_WEIGHTS} or {WEIGHTS}; it has {len(weights)} of the two")
    if WEIGHTS in files and CONFIG not in files:
        raise ArtefactRejected(f"{CONFIG} is missing beside {WEIGHTS}")


# --- the old layout -----------------------------------------------------------------------------------------------


def _old_config(data: bytes) -> dict[str, Any]:
    """The model's config: the five old fields are checked, sizes of our own model may stand beside them."""
    document = parse_object(data, CONFIG)
    sizes = {name: document.pop(name) for name in _SIZES & set(document)}
    try:
        OldConfig.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ArtefactRejected(f"{CONFIG} is refused at {where}: {first['msg']}") from error
    try:
        return ModelConfig.from_dict(sizes).to_dict()
    except (ValueError, TypeError) as error:
        raise ArtefactRejected(f"{CONFIG} describes no model that this code can build: {error}") from error


def _convert(data: bytes, config: Mapping[str, Any]) -> bytes:
    """`model.pth` as safetensors of exactly the tensors that the config asks for."""
    expected = expected_tensors(config)
    _require_size(sum(tensor.nbytes for tensor in expected.values()))
    tensors = _state_of(_unpickle(_rewrite(data)))
    # Before anything is copied: a tensor in a pickle may claim any shape over a few bytes of memory.
    require_tensors(expected, tensors)
    return safetensors.torch.save({name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()})


def _rewrite(data: bytes) -> io.BytesIO:
    """The archive written anew from its measured entries, so that torch reads exactly what was measured."""
    fresh = io.BytesIO()
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(fresh, "w", zipfile.ZIP_STORED) as copy:
            entries = archive.infolist()
            _require_plain(entries, len(data))
            for entry in entries:
                copy.writestr(entry.filename, archive.read(entry))  # checks the entry's CRC
    except (zipfile.BadZipFile, EOFError, ValueError, RuntimeError, NotImplementedError, struct.error) as error:
        raise ArtefactRejected(
            f"{OLD_WEIGHTS} is no whole archive as torch.save writes it: truncated, damaged or a bare pickle"
        ) from error
    fresh.seek(0)
    return fresh


def _require_plain(entries: list[zipfile.ZipInfo], size_bytes: int) -> None:
    if len(entries) > MAX_ENTRIES or len({entry.filename for entry in entries}) < len(entries):
        raise ArtefactRejected(f"{OLD_WEIGHTS} has more than {MAX_ENTRIES} entries, or two of one name")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ArtefactRejected(f"{OLD_WEIGHTS} is compressed, as torch.save never does: it could unpack to any size")
    if sum(entry.file_size for entry in entries) > size_bytes:
        raise ArtefactRejected(f"the entries of {OLD_WEIGHTS} claim more bytes than the file has")


def _unpickle(archive: io.BytesIO) -> object:
    try:
        return torch.load(archive, map_location="cpu", weights_only=True)
    except Exception as error:  # what a hostile pickle makes the reader raise is a closed set to nobody
        forbidden = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"wants to call {forbidden[1]}" if forbidden else f"holds more than tensors ({type(error).__name__})"
        raise ArtefactRejected(f"{OLD_WEIGHTS} {what}; only weights are read") from error


def _state_of(checkpoint: object) -> dict[str, Tensor]:
    """The tensors by name, also where they are wrapped among a training script's other state."""
    if isinstance(checkpoint, Mapping):
        for wrapper in _WRAPPERS:
            if isinstance(checkpoint.get(wrapper), Mapping):
                checkpoint = checkpoint[wrapper]
                break
    if not isinstance(checkpoint, Mapping) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in checkpoint.items()
    ):
        raise ArtefactRejected(f"{OLD_WEIGHTS} holds no state dict: names and tensors")
    for name, tensor in checkpoint.items():
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise ArtefactRejected(f"{name:.80} of {OLD_WEIGHTS} is no plain tensor with values")
    return dict(checkpoint)


# --- what goes on -------------------------------------------------------------------------------------------------


def _require_answer(model: HybridModel) -> None:
    windows = torch.randn((2, N_FEATURES, N_STEPS), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        answer = model.fold().predict(windows, return_features=True)
    if not all(tensor.isfinite().all() for tensor in answer.values() if tensor is not None):
        raise ArtefactRejected("the model's answer to an ordinary window is not finite")


def _facts(manifest: Manifest | None, model: HybridModel) -> dict[str, Any]:
    if manifest is None:
        return {
            "feature_names": FEATURE_NAMES,
            "features_fingerprint": fingerprint(),
            "scaler_fingerprint": scaler_fingerprint(model),
            "training": None,
        }
    return {
        "feature_names": manifest.feature_names,
        "features_fingerprint": manifest.features_fingerprint,
        "scaler_fingerprint": manifest.scaler_fingerprint,
        "training": None if manifest.training is None else manifest.training.model_dump(mode="json"),
    }


def _card(found: Mapping[str, bytes]) -> str:
    source = OLD_WEIGHTS if OLD_WEIGHTS in found else WEIGHTS
    digest = hashlib.sha256(found[source]).hexdigest()
    return (
        f"# Imported model\n\nFrom `{source}`, {len(found[source])} bytes, SHA-256 `{digest}`.\n\n"
        "How and on what it was trained is not known here. That it wants the features of this code, in their order\n"
        "and definition, was taken on trust when it was published. No figure of its quality was checked.\n"
    )
