"""What running on CUDA takes: precision and memory set before a model moves there, copies, a report, clean-up.

The device comes from a setting, never from what a host happens to have. On `cpu` all of this does nothing, and the
report is zeros.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from serve_app.contract import FloatArray

logger = logging.getLogger(__name__)

# Of a replica's own share, so that replicas which fill one GPU together leave a fifth of it for contexts and kernels.
MEMORY_SHARE = 0.8


def is_cuda(device: str) -> bool:
    """Whether a device by name is a CUDA device."""
    return device == "cuda" or device.startswith("cuda:")


def available(device: str) -> str:
    """The device itself, or `cpu` with a warning where this process has no CUDA."""
    if is_cuda(device) and not torch.cuda.is_available():
        logger.warning("%s is wanted and this process has no CUDA: running on cpu", device)
        return "cpu"
    return device


def memory_fraction(gpu_share: float) -> float:
    """Share of a GPU's memory that a process may allocate.

    Args:
        gpu_share: Share of the GPU that was set aside for this process, 0 (excluded) to 1.

    Raises:
        ValueError: Out of range.
    """
    if not 0 < gpu_share <= 1:
        raise ValueError(f"a GPU share must be above 0 and at most 1, not {gpu_share}")
    return MEMORY_SHARE * gpu_share


def prepare(device: str, gpu_share: float, *, exact: bool = False, library: Any = torch) -> None:
    """Set this process up for inference on a CUDA device; on cpu nothing is touched.

    TF32 rounds the inputs of products to 10 bits of mantissa, and cudnn.benchmark picks kernels by their measured
    time, so answers differ from cpu's, and between runs, in the last digits.

    Args:
        device: `cpu`, `cuda` or `cuda:N`.
        gpu_share: As for `memory_fraction`.
        exact: Kernels that are the same in every run, whatever they cost, and no TF32.
        library: PyTorch, or what stands for it in a test.
    """
    if not is_cuda(device):
        return
    library.backends.cuda.matmul.allow_tf32 = not exact
    library.backends.cudnn.allow_tf32 = not exact
    library.backends.cudnn.benchmark = not exact
    library.backends.cudnn.deterministic = exact
    # It refuses `cuda` without an index, which every other function takes for the current device.
    index = torch.device(device).index
    current = library.cuda.current_device() if index is None else index
    library.cuda.set_per_process_memory_fraction(memory_fraction(gpu_share), current)


def to_device(windows: FloatArray, device: str) -> Tensor:
    """Windows as a tensor on the device, by way of a pinned buffer: PyTorch keeps those and hands them out again."""
    tensor = torch.from_numpy(windows)
    return tensor.pin_memory().to(device, non_blocking=True) if is_cuda(device) else tensor


def to_host(answer: Iterable[Tensor], device: str) -> list[FloatArray]:
    """Every tensor of an answer as C-contiguous float32; from a GPU into pinned buffers, with one wait for all."""
    if not is_cuda(device):
        return [tensor.to(torch.float32).contiguous().numpy() for tensor in answer]
    arrays: list[FloatArray] = [_start_copy(tensor).numpy() for tensor in answer]
    torch.cuda.current_stream(device).synchronize()
    return arrays


def _start_copy(tensor: Tensor) -> Tensor:
    host = torch.empty(tensor.shape, dtype=torch.float32, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


# What PyTorch and numpy raise where a device has no memory left.
OUT_OF_MEMORY: tuple[type[Exception], ...] = (torch.OutOfMemoryError, MemoryError)


def release_memory(device: str) -> None:
    """Give the memory of unloaded models back to the GPU; call it once nothing refers to them any more."""
    if is_cuda(device):
        gc.collect()
        torch.cuda.empty_cache()


def memory_report(device: str) -> dict[str, float]:
    """Memory of the device in this process: `allocated_mb`, `reserved_mb`, `utilization_pct`; zeros without CUDA."""
    allocated = reserved = 0
    if is_cuda(device) and torch.cuda.is_available():
        allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    return {
        "allocated_mb": allocated / 1024**2,
        "reserved_mb": reserved / 1024**2,
        "utilization_pct": 100.0 * allocated / reserved if reserved else 0.0,
    }


def utilization_percent(device: str, library: Any = torch) -> float | None:
    """How busy the GPU is with the work of all its processes; None on cpu and where NVML cannot tell.

    Args:
        device: `cpu`, `cuda` or `cuda:N`.
        library: PyTorch, or what stands for it in a test.
    """
    if not is_cuda(device) or find_spec("pynvml") is None:
        return None
    try:
        return float(library.cuda.utilization(device))
    except Exception as error:  # NVML has errors of its own, and figures must not fail for want of one of them
        logger.warning("NVML does not tell how busy %s is: %s", device, error)
        return None
