"""The compiled passes of `sinkhorn.c`, with plain numpy ones where there is no compiler.

`candidates` computes logits of rows and keeps the relevant clusters, `plan` their shares at a scaling; the others are
sums over rows. Within one implementation results are bitwise identical however rows are grouped; the two differ in the
last bits of logits.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from raycluster.clustering.search import int8_cpu
from raycluster.clustering.sinkhorn import reference
from raycluster.clustering.sinkhorn.sparse import PANEL, Candidates, CandidateWindow, Classifier, Plan
from raycluster.types import UserError


def candidates(values: NDArray[np.floating], head: Classifier, window: CandidateWindow) -> Candidates:
    """Of rows (n, D), or (n, K) logits. Raises UserError if a logit overflows."""
    rows = np.ascontiguousarray(values, np.float32)
    library = _library()
    with np.errstate(all="ignore"):  # checked below
        found = reference.candidates(rows, head, window) if library is None else _candidates(rows, head, window)
    if not (np.isfinite(found.top).all() and np.isfinite(found.norm).all()):
        raise UserError("a head gives logits that overflow: the network diverged (lower the learning rate)")
    return found


def plan(found: Candidates, shift: NDArray[np.float64], negligible: float, value_scale: float) -> Plan:
    """Of the rows of some candidates at the scaling window.scaling + shift (K,), without shares below e^-negligible."""
    library = _library()
    if library is None:
        return reference.plan(found, shift, negligible, value_scale)
    num_rows, capacity = len(found.top), len(found.cluster) + PANEL
    first, cluster, share = np.zeros(num_rows + 1, np.int64), np.empty(capacity, np.int32), np.empty(capacity)
    most = int(np.diff(found.first).max(initial=0))
    inputs = [_at(array) for array in (found.first, found.cluster, found.score)]
    structure, outputs = (
        _Candidates(num_rows, most, *inputs, negligible),
        [_at(array) for array in (first, cluster, share)],
    )
    value = library.sinkhorn_shares(ctypes.byref(structure), _at(shift), value_scale, support(), *outputs)
    count = int(first[-1])
    return Plan(first, cluster[:count].copy(), share[:count].copy(), value)


def marginals(found: Plan, num_clusters: int, scale: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Sums over rows of shares (K,) and of share * (1 - share) (K,), each times scale and rounded."""
    library = _library()
    if library is None:
        return reference.marginals(found, num_clusters, scale)
    sums = np.zeros((2, num_clusters), np.int64)
    inputs = _at(found.cluster), _at(found.share), len(found.share)
    library.sinkhorn_marginals(*inputs, scale, support(), _at(sums[0]), _at(sums[1]))
    return sums[0], sums[1]


def product(found: Plan, vector: NDArray[np.float64], scale: float) -> NDArray[np.int64]:
    """Derivative of the marginals along `vector` (K,), |vector| <= 1, as in `marginals`."""
    library = _library()
    if library is None:
        return reference.product(found, vector, scale)
    result = np.zeros(len(vector), np.int64)
    inputs = _at(found.first), _at(found.cluster), _at(found.share), len(found.first) - 1
    library.sinkhorn_product(*inputs, _at(vector), scale, support(), _at(result))
    return result


class _Head(ctypes.Structure):
    _fields_ = (
        [(name, ctypes.c_int64) for name in ("num_clusters", "dim")]
        + [(name, ctypes.c_void_p) for name in ("packed", "bias", "scaling")]
        + [(name, ctypes.c_double) for name in ("sharpness", "depth")]
    )


class _Candidates(ctypes.Structure):
    _fields_ = (
        [(name, ctypes.c_int64) for name in ("num_rows", "most")]
        + [(name, ctypes.c_void_p) for name in ("first", "cluster", "score")]
        + [("negligible", ctypes.c_double)]
    )


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    source = Path(__file__).with_name("sinkhorn.c")
    library = int8_cpu.load(source, "sinkhorn without its compiled kernel, many times slower")
    if library is None or library.sinkhorn_support() == 0:
        return None
    pointer, whole, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
    library.sinkhorn_candidates.argtypes = [pointer, whole, pointer, whole, *[pointer] * 5]
    library.sinkhorn_candidates.restype = whole
    library.sinkhorn_shares.argtypes = [pointer, pointer, real, whole, *[pointer] * 3]
    library.sinkhorn_shares.restype = whole
    library.sinkhorn_marginals.argtypes = [pointer, pointer, whole, real, whole, pointer, pointer]
    library.sinkhorn_marginals.restype = None
    library.sinkhorn_product.argtypes = [pointer, pointer, pointer, whole, pointer, real, whole, pointer]
    library.sinkhorn_product.restype = None
    return library


@lru_cache(maxsize=1)
def support() -> int:
    """The vector instructions the compiled passes use here: 2 AVX-512, 1 AVX2, 0 none: numpy is used."""
    library = _library()
    return 0 if library is None else int(library.sinkhorn_support())


def _candidates(rows: NDArray[np.float32], head: Classifier, window: CandidateWindow) -> Candidates:
    library, (num_rows, dim), num_clusters = _library(), rows.shape, len(head.bias)
    assert library is not None
    bias = np.zeros(-(-num_clusters // PANEL) * PANEL, np.float32)
    bias[:num_clusters] = head.bias
    scaling = np.ascontiguousarray(window.scaling)
    packed = None if head.packed is None else _at(head.packed)
    structure = _Head(num_clusters, dim, packed, _at(bias), _at(scaling), window.sharpness, window.depth)
    first = np.zeros(num_rows + 1, np.int64)
    capacity = num_rows * num_clusters + PANEL  # pages that are not written to are not allocated
    cluster, score = np.empty(capacity, np.int32), np.empty(capacity)
    tops = np.empty((2, num_rows))
    outputs = [_at(array) for array in (first, cluster, score, tops[0], tops[1])]
    count = library.sinkhorn_candidates(_at(rows), num_rows, ctypes.byref(structure), support(), *outputs)
    if count < 0:
        raise MemoryError("no memory left for the candidates of sinkhorn")
    return Candidates(first, cluster[:count].copy(), score[:count].copy(), tops[0], tops[1])


def _at(array: NDArray[np.generic]) -> int:
    assert array.flags.c_contiguous
    return array.ctypes.data
