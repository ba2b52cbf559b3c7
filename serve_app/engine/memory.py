"""Memory that forward passes free stays with the process."""

from __future__ import annotations

import ctypes

# Of glibc's `mallopt`, from its malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3

KEPT_BYTES = 64 << 20  # many times what a forward pass takes
LARGEST_BLOCK_BYTES = 32 << 20  # glibc takes no more


def keep_freed_memory() -> None:
    """Let glibc keep up to 64 MiB of freed memory of each thread instead of giving it back to the kernel at once.

    By default the intermediate values of each pass in PyTorch are given back and fetched anew: some 500 to 1000 page
    faults at 32 windows, a tenth to a fifth of the pass. Holds for the whole process; other C libraries are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, LARGEST_BLOCK_BYTES)
        mallopt(_TRIM_THRESHOLD, KEPT_BYTES)
