"""Run by `test_int8_cuda` in its own process: Triton decides at import whether it interprets or compiles."""

from __future__ import annotations

import os
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import pad
from torch.utils._python_dispatch import TorchDispatchMode

from raycluster.clustering.search import int8_cuda, int8_torch, triton_kernel
from raycluster.clustering.search.centroids import PreparedCentroids, prepare, quantize_rows
from raycluster.clustering.search.float32 import float_search
from raycluster.clustering.search.triton_kernel import highest, pack_centroids, pack_rows
from tests.clustering.nasty import KINDS, naive, problem

WHERE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
SHAPES = [
    (1, 1, 1),
    (5, 3, 3),
    (129, 16, 32),
    (200, 300, 37),
    (150, 129, 100),
    (30, 2200, 9),
    (130, 140, 256),
    (50, 90, 300),
]


def _problem(num_rows: int, num_centroids: int, dim: int, kind: str = "none") -> tuple[np.ndarray, np.ndarray]:
    return problem(np.random.default_rng(num_rows + dim), num_rows, num_centroids, dim, kind)


def _labels(values: np.ndarray, prepared: PreparedCentroids) -> np.ndarray:
    search, size = int8_cuda.gpu_search(prepared, WHERE)
    assert size >= len(values)
    return search(values)


@pytest.mark.parametrize("shape", SHAPES)
def test_labels_are_those_of_float64(shape: tuple[int, int, int]) -> None:
    values, centroids = _problem(*shape)
    prepared = prepare(centroids)
    assert int8_cuda.can_search(prepared, WHERE) == (len(centroids) > 1)  # one is its own mean, too short to be rounded
    assert np.array_equal(_labels(values, prepared), naive(values, centroids))


@pytest.mark.parametrize("nasty", KINDS)
def test_nasty_rows_and_centroids(nasty: str) -> None:
    values, centroids = _problem(140, 600 if nasty == "same" else 70, 24, nasty)
    prepared = prepare(centroids)
    assert int8_cuda.can_search(prepared, WHERE)
    assert np.array_equal(_labels(values, prepared), naive(values, centroids))


def test_few_candidates_are_left_unless_hundreds_are_close() -> None:
    for nasty, few in ("none", True), ("same", False):
        values, centroids = _problem(140, 600, 24, nasty)
        pairs = int8_cuda._candidates(*_arguments(values, prepare(centroids)))
        assert (pairs is not None) == few
        if pairs is not None:
            assert pairs.rows.unique().tolist() == list(range(140)) and len(pairs.rows) < 150


class _Refused(TorchDispatchMode):
    """Raises for operations that raise on CUDA under deterministic algorithms, but not on a CPU."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if re.match(r"aten::(scatter_reduce|scatter_add|put_|index_reduce|histc|bincount|kthvalue)", function.name()):
            raise RuntimeError(f"{function.name()} does not have a deterministic implementation")
        return function(*args, **kwargs or {})


def test_it_works_under_deterministic_algorithms() -> None:
    values, centroids = _problem(140, 300, 24)
    prepared = prepare(centroids)
    torch.use_deterministic_algorithms(True)
    try:
        with _Refused():
            found = int8_cuda._candidates(*_arguments(values, prepared))
            assert np.array_equal(_labels(values, prepared), naive(values, centroids))
    finally:
        torch.use_deterministic_algorithms(False)
    assert found is not None and found.rows.unique().tolist() == list(range(140))


def _arguments(values: np.ndarray, prepared: PreparedCentroids) -> tuple[Any, ...]:
    rows = torch.tensor(values - prepared.centre, device=WHERE)
    return int8_cuda._to_device(prepared, WHERE), rows, quantize_rows(rows), prepared


def test_rows_in_any_layout() -> None:
    values, centroids = _problem(128, 70, 32)
    assert np.array_equal(_labels(np.asfortranarray(values), prepare(centroids)), naive(values, centroids))


def test_rows_whose_squares_leave_float32() -> None:
    values, centroids = _problem(140, 70, 24)
    values[3] *= np.float32(1e20)
    prepared = prepare(centroids)
    assert np.array_equal(_labels(values, prepared), float_search(prepared)[0](values))


def test_pairs_are_gathered_in_bounded_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8_cuda, "_GATHERED_VALUES", 1000)
    values, centroids = _problem(30, 70, 24)
    assert np.array_equal(_labels(values, prepare(centroids)), naive(values, centroids))


@pytest.mark.parametrize("programs", [1, 1024])
@pytest.mark.parametrize("shape", SHAPES[1:])
def test_highest_upper_ends_of_groups(
    shape: tuple[int, int, int], programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_kernel, "_PROGRAMS", programs)
    values, centroids = _problem(*shape)
    prepared = prepare(centroids)
    rows = torch.from_numpy(values - prepared.centre)
    quantized = quantize_rows(rows)
    moved = [type(one)(*(part.to(WHERE) for part in one)) for one in (quantized, prepared.quantized)]
    found = highest(pack_rows(moved[0]), pack_centroids(moved[1], prepared.offsets.to(WHERE))).cpu()
    num_groups = -(-len(centroids) // 16)
    assert found[:, num_groups:].isneginf().all()
    found = found[: len(values), :num_groups]

    def of_groups(scores: torch.Tensor) -> torch.Tensor:
        whole = pad(scores[:, : len(centroids)], (0, -len(centroids) % 16), value=-torch.inf)
        return whole.view(len(values), num_groups, 16).amax(dim=2)

    exact = rows.double() @ prepared.centred.double().T - prepared.centred.double().square().sum(dim=1) / 2
    assert (found >= of_groups(exact)).all()
    upper_bounds = of_groups(int8_torch._upper_bounds(quantized, prepared))
    size = 1e-6 * prepared.max_norm * (quantized.norms[:, None] + prepared.max_norm)
    assert (found <= upper_bounds + size).all()  # which takes the largest errors of all rows, the kernel those of 128
    if len(values) <= 128:
        assert (found >= upper_bounds - size).all()
