"""The GPU search on machines without a GPU: interpreted, and compiled without being run."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raycluster.clustering.search import int8_cuda
from raycluster.clustering.search.centroids import prepare

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
SHARED = 99 * 1024  # bytes for a block of threads on the GPUs that have least, of those of compute capability 8 and 12


@pytest.mark.parametrize("how", ["interpreted", "compiled"])
def test_gpu_cases(how: str) -> None:
    """Triton decides at import whether it interprets, so each way runs in its own process."""
    if how == "compiled" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        str(Path(__file__).with_name("gpu_cases.py")),
    ]
    hidden = {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"} if how == "interpreted" else {}
    done = subprocess.run(command, env={**os.environ, **hidden}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("dim", [32, 256, 384])
@pytest.mark.parametrize(
    ("capability", "instruction"),
    [
        (80, r"mma\.sync\.\S+\.s32\.s8\.s8"),
        (90, r"wgmma\.mma_async\.\S+\.s32\.s8\.s8"),
        (100, r"tcgen05\.mma\S+kind::i8"),
    ],
)
def test_it_compiles_for_tensor_cores(capability: int, instruction: str, dim: int) -> None:
    kernel = _compile(capability, dim)
    assert re.search(instruction, kernel.asm["ptx"])
    assert kernel.metadata.shared <= (SHARED if capability == 80 else 2 * SHARED)


def test_one_line_says_why_it_cannot_be_used(caplog: pytest.LogCaptureFixture) -> None:
    """Here because the device is no GPU, elsewhere because Triton is missing or does not support the GPU."""
    prepared = prepare(np.eye(5, dtype=np.float32))
    with caplog.at_level(logging.WARNING):
        assert not any(int8_cuda.can_search(prepared, torch.device("cpu")) for _ in range(3))
    assert len(caplog.records) == 1 and "same results" in caplog.text


def test_without_triton(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "raycluster.clustering.search.triton_kernel", raising=False)
    prepared = prepare(np.eye(6, dtype=np.float32))
    assert not int8_cuda.can_search(prepared, torch.device("cpu"))
    assert len(caplog.records) == 1 and "triton" in caplog.text


def _compile(capability: int, dim: int) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from raycluster.clustering.search import triton_kernel

    kinds = ["*i8", "*fp32", "*i8", "*fp32", "*fp32", "i32", "i32", "i32"]
    constants = triton_kernel.constants(dim)
    names = triton_kernel._highest.arg_names
    source = ASTSource(
        triton_kernel._highest,
        dict(zip(names, [*kinds, *["constexpr"] * len(constants)], strict=True)),
        constants,
        {(place,): [["tt.divisibility", 16]] for place in range(len(kinds))},
    )
    return compile(source, target=GPUTarget("cuda", capability, 32), options=triton_kernel.options(dim))
