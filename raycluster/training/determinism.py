"""Settings of the process that decide about bits and speed, not about algorithms."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_DEBUGGING: Any = torch.utils.deterministic  # whose attributes are hidden from type checkers
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # names in malloc.h of the GNU C library


def prepare_process() -> None:
    """Call once, before the first use of torch in a process that trains or extracts features.

    Keeps freed memory instead of handing it back to the system (activations are freed and asked for again at every
    step; fetching fresh pages can take longer than the arithmetic), and lets cuBLAS be reproducible.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
        if mallopt is not None:
            mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
            mallopt(_M_MMAP_MAX, 0)


@contextmanager
def reproducible(threads: int, *, exact: bool) -> Iterator[None]:
    """The same bits every time while it lasts, on the same kind of hardware; afterwards all is as before.

    Not for several threads of one process at a time: some of these settings belong to the process.

    threads: of the calling thread's kernels, set in both modes, since it may decide the order of their sums. exact:
    also insist on deterministic kernels.
    """
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    filling, benchmark = _DEBUGGING.fill_uninitialized_memory, torch.backends.cudnn.benchmark
    torch.set_num_threads(threads)
    if exact:
        torch.use_deterministic_algorithms(True)
        _DEBUGGING.fill_uninitialized_memory = False  # a debugging aid that costs a pass over every tensor
        torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])
        _DEBUGGING.fill_uninitialized_memory = filling
        torch.backends.cudnn.benchmark = benchmark
