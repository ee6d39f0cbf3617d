"""Process-wide PyTorch and allocator settings that affect rounding and speed."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

_DEBUGGING: Any = torch.utils.deterministic  # whose attributes are hidden from type checkers
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # names in malloc.h of the GNU C library


def prepare_process() -> None:
    """Configure a process that trains or extracts features; call once, before its first use of torch.

    Keeps freed memory in the process (activations are freed and allocated at every step, and page faults can take
    longer than the arithmetic) and gives cuBLAS the workspace that it needs to be deterministic.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
        if mallopt is not None:
            mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
            mallopt(_M_MMAP_MAX, 0)


@contextmanager
def reproducible(threads: int, *, exact: bool, tf32: bool = False) -> Iterator[None]:
    """Bitwise identical results in every run on the same kind of hardware; restores all settings on exit.

    Changes settings of the process, so at most one thread may be inside. threads: of CPU kernels; set in both modes,
    since it may change the order of their sums. exact: also require deterministic kernels. tf32: CUDA convolutions and
    matrix products of float32 values may round their inputs to TensorFloat-32 (10 bits); otherwise neither does,
    whereas PyTorch by default lets convolutions do so.
    """
    with _threads(threads), float32_precision(tf32=tf32), _deterministic() if exact else nullcontext():
        yield


@contextmanager
def _threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def float32_precision(*, tf32: bool) -> Iterator[None]:
    """Whether CUDA may round float32 inputs of convolutions and matrix products to TensorFloat-32; restored on exit."""
    cudnn = torch.backends.cudnn
    convolutions, products = cudnn.allow_tf32, torch.get_float32_matmul_precision()
    cudnn.allow_tf32 = tf32
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        yield
    finally:
        cudnn.allow_tf32 = convolutions
        torch.set_float32_matmul_precision(products)


@contextmanager
def _deterministic() -> Iterator[None]:
    cudnn = torch.backends.cudnn
    algorithms = torch.are_deterministic_algorithms_enabled()
    filling, benchmark = _DEBUGGING.fill_uninitialized_memory, cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    _DEBUGGING.fill_uninitialized_memory = False  # a debugging aid that costs a pass over every tensor
    cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(algorithms)
        _DEBUGGING.fill_uninitialized_memory = filling
        cudnn.benchmark = benchmark
