"""The model as a graph of PyTorch's own: what runs in PyTorch itself, and what the other engines are made from.

PyTorch marks tracing as deprecated in favour of `torch.export`. For this model `torch.export` takes 4 s where a trace
takes 0.1 s, and what comes of it runs slower; `docs/adr/0004-engines.md` has the figures. Python and PyTorch are pinned
to versions that trace, and this module is the one place to change.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.jit import TracerWarning  # type: ignore[attr-defined]  # public by its documentation

from serve_app.contract import N_FEATURES, N_STEPS
from serve_app.model import HybridModel, Mixture

# Neither 1 nor a size that means something else in the model, so that no axis can be taken for a constant.
TRACED_BATCH = 11
ONNX_OPSET = 20


class Graph(nn.Module):
    """`HybridModel.mixture` as a module: windows[B,F,T], weights[M] → the fields of `Mixture`.

    Attributes:
        example: Inputs to trace it with.
    """

    inputs = ("windows", "weights")
    outputs = Mixture._fields

    def __init__(self, model: HybridModel) -> None:
        super().__init__()
        self.eval()
        self.model = model
        self.example = (
            torch.zeros(TRACED_BATCH, N_FEATURES, N_STEPS),
            model.member_weights(use_ensemble=True).detach(),
        )

    def forward(self, windows: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.model.mixture(windows, weights))


def trace(module: nn.Module, example: Sequence[Tensor]) -> torch.jit.ScriptModule:
    """A module's operations in order, for any batch size; the module is on the cpu."""
    with torch.no_grad(), _known_warnings_ignored():
        return torch.jit.trace(module, tuple(example), check_trace=False)  # type: ignore[no-untyped-call, no-any-return]


def frozen(traced: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    """A trace with its weights made constants, which lets PyTorch compute ahead what depends on them alone."""
    with _known_warnings_ignored():
        return torch.jit.freeze(traced)  # type: ignore[no-any-return]


def to_onnx(module: nn.Module, example: Sequence[Tensor], inputs: Sequence[str], outputs: Sequence[str]) -> bytes:
    """A module's operations in ONNX's format; the first axis of the first input and of all outputs is free."""
    file = io.BytesIO()
    with torch.no_grad(), _known_warnings_ignored():
        torch.onnx.export(
            module,
            tuple(example),
            file,  # type: ignore[arg-type]  # buffers are taken too
            input_names=inputs,
            output_names=outputs,
            dynamic_axes={name: {0: "B"} for name in (inputs[0], *outputs)},
            opset_version=ONNX_OPSET,
            dynamo=False,  # by tracing; the other way takes 8 s and needs two more libraries
        )
    return file.getvalue()


@contextmanager
def _known_warnings_ignored() -> Iterator[None]:
    """That tracing is deprecated, and that the LSTM compares sizes, which do not depend on the batch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", TracerWarning)
        warnings.filterwarnings("ignore", "Exporting a model to ONNX with a batch_size other than 1", UserWarning)
        yield
