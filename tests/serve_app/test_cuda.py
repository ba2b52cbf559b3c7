"""What would be set on a CUDA device is decided without one; that a device obeys needs one to be seen."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from serve_app import cuda
from serve_app.resources import SIZES


class Recorder:
    """Stands for PyTorch: keeps what was set on it."""

    def __init__(self, utilization: Any = 37) -> None:
        self.backends = SimpleNamespace(
            cuda=SimpleNamespace(matmul=SimpleNamespace(allow_tf32=False)),
            cudnn=SimpleNamespace(allow_tf32=False, benchmark=False, deterministic=False),
        )
        self.fractions: list[tuple[float, int]] = []
        self._utilization = utilization
        self.cuda = SimpleNamespace(
            current_device=lambda: 2,
            set_per_process_memory_fraction=lambda fraction, index: self.fractions.append((fraction, index)),
            utilization=self._read,
        )

    def _read(self, device: str) -> int:
        if isinstance(self._utilization, Exception):
            raise self._utilization
        return int(self._utilization)

    @property
    def fast(self) -> tuple[bool, bool, bool]:
        cudnn = self.backends.cudnn
        return self.backends.cuda.matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark


def test_replicas_that_fill_a_gpu_take_four_fifths_of_its_memory_together() -> None:
    for size in SIZES.values():
        if size.num_gpus:
            replicas = round(1 / size.num_gpus)
            assert replicas * cuda.memory_fraction(size.num_gpus) == pytest.approx(0.8)


@pytest.mark.parametrize("share", [0.0, -0.5, 1.01, float("nan")])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="GPU share"):
        cuda.memory_fraction(share)


@pytest.mark.parametrize(("device", "index"), [("cuda", 2), ("cuda:1", 1)])
def test_a_cuda_device_gets_tf32_benchmark_and_its_fraction(device: str, index: int) -> None:
    library = Recorder()
    cuda.prepare(device, 0.5, library=library)
    assert library.fast == (True, True, True)
    assert library.fractions == [(0.4, index)]


def test_in_exact_mode_a_cuda_device_gets_neither_tf32_nor_kernels_by_the_clock() -> None:
    library = Recorder()
    cuda.prepare("cuda", 0.5, exact=True, library=library)
    assert library.fast == (False, False, False)
    assert library.backends.cudnn.deterministic


def test_on_cpu_nothing_is_touched() -> None:
    library = Recorder()
    cuda.prepare("cpu", 0.5, library=library)
    assert library.fast == (False, False, False)
    assert library.fractions == []
    cuda.release_memory("cpu")
    assert cuda.memory_report("cpu") == {"allocated_mb": 0, "reserved_mb": 0, "utilization_pct": 0}
    assert cuda.utilization_percent("cpu", library) is None


def test_the_real_library_has_the_settings_that_are_made() -> None:
    # A typo would set an attribute that nobody reads.
    assert torch.backends.cuda.matmul.allow_tf32 in (True, False)
    assert torch.backends.cudnn.allow_tf32 in (True, False)
    assert torch.backends.cudnn.benchmark in (True, False)
    assert torch.backends.cudnn.deterministic in (True, False)
    assert all(callable(getattr(torch.cuda, name)) for name in vars(Recorder().cuda))


def test_how_busy_a_gpu_is_comes_from_nvml_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "find_spec", lambda name: object())
    assert cuda.utilization_percent("cuda:0", Recorder()) == 37.0
    assert cuda.utilization_percent("cuda:0", Recorder(RuntimeError("driver not loaded"))) is None
    monkeypatch.setattr(cuda, "find_spec", lambda name: None)
    assert cuda.utilization_percent("cuda:0", Recorder()) is None


def test_on_cpu_windows_are_not_copied_and_answers_stay_float32() -> None:
    windows = np.ones((2, 50, 60), np.float32)
    assert np.shares_memory(cuda.to_device(windows, "cpu").numpy(), windows)
    (array,) = cuda.to_host([torch.ones(2, dtype=torch.float64)], "cpu")
    assert array.dtype == np.float32
