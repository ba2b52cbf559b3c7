"""Old model files for tests: sound ones, and evil ones that would create a canary file if any code of theirs ran."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils import collect_env

from serve_app.model import HybridModel, ModelConfig

SMALL = {"channels": 4, "width": 8, "lstm_hidden": 8, "head_hidden": 8, "mc_samples": 4}


def random_state(**sizes: Any) -> dict[str, torch.Tensor]:
    """The tensors of a model with every weight random."""
    model = HybridModel(ModelConfig(**(sizes or SMALL)))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    return model.state_dict()


def saved(document: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(document, buffer)
    return buffer.getvalue()


class _Call:
    """Unpickles into a call."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self._reduced = function, args

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._reduced


def bare_pickle(canary: Path) -> bytes:
    return pickle.dumps(_Call(os.system, f"touch {canary}"))


def system_call(canary: Path) -> bytes:
    return saved({**random_state(), "highway.bias": _Call(os.system, f"touch {canary}")})


def trusted_looking_gadget(canary: Path) -> bytes:
    """A function of torch's own that runs a shell command: no list of bad modules would name it."""
    return saved({**random_state(), "highway.bias": _Call(collect_env.run, f"touch {canary}")})


def evaluation(canary: Path) -> bytes:
    return saved(
        {**random_state(), "highway.bias": _Call(eval, f"__import__('pathlib').Path({str(canary)!r}).touch()")}
    )


def truncated(_: Path) -> bytes:
    return saved(random_state())[:-300]


def torn_in_the_middle(_: Path) -> bytes:
    data = bytearray(saved(random_state()))
    data[len(data) // 2] ^= 0xFF
    return bytes(data)


def zip_bomb(_: Path, unpacked_bytes: int = 128 << 20) -> bytes:
    """A thousand bytes of zeros in each of its own."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
        with archive.open("archive/data/0", "w") as entry:
            for _ in range(unpacked_bytes >> 24):
                entry.write(bytes(1 << 24))
    return buffer.getvalue()


def lying_directory(_: Path) -> bytes:
    """The directory claims an entry of almost 4 GiB."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
    data = bytearray(buffer.getvalue())
    directory = data.rindex(b"PK\x01\x02")
    data[directory + 20 : directory + 28] = (0xFFFF0000).to_bytes(4, "little") * 2
    return bytes(data)


def stretched_tensor(_: Path) -> bytes:
    """4 bytes of memory that claim to be 4 TiB."""
    return saved({**random_state(), "highway.bias": torch.zeros(1).expand(1 << 40)})


def renamed_tensors(_: Path) -> bytes:
    return saved({name.replace("highway.bias", "highway.bais"): tensor for name, tensor in random_state().items()})


def wrong_shapes(_: Path) -> bytes:
    return saved({**random_state(), "highway.bias": torch.zeros(7)})


def wrong_dtype(_: Path) -> bytes:
    return saved({**random_state(), "highway.bias": torch.zeros(5, dtype=torch.float64)})


def without_values(_: Path) -> bytes:
    return saved({**random_state(), "highway.bias": torch.full((5,), torch.nan)})


def no_tensors(_: Path) -> bytes:
    return saved([1, 2, 3])


def empty(_: Path) -> bytes:
    return b""


# Each with the words of its refusal.
EVIL: dict[Callable[[Path], bytes], str] = {
    bare_pickle: "bare pickle",
    system_call: r"wants to call (posix|os)\.system",
    trusted_looking_gadget: r"wants to call torch\.utils\.collect_env\.run",
    evaluation: r"wants to call (\w+\.)?eval",
    truncated: "truncated",
    torn_in_the_middle: "damaged",
    zip_bomb: "could unpack to any size",
    lying_directory: "claim more bytes than the file has",
    stretched_tensor: r"highway\.bias is torch\.float32 \(1099511627776,\)",
    renamed_tensors: r"differ in tensors: highway\.bais, highway\.bias",
    wrong_shapes: r"highway\.bias is torch\.float32 \(7,\) and the config asks for torch\.float32 \(5,\)",
    wrong_dtype: r"highway\.bias is torch\.float64",
    without_values: "not finite",
    no_tensors: "no state dict",
    empty: "truncated",
}
