"""The nearest centroid of every row: candidates by a fast product, decided exactly.

Engines differ in how candidates are proposed: `int8` by the compiled kernel (8-bit products, several times as fast as
float32), `torch` by 8-bit products where the processor or the GPU has fast ones, else by float32, `faiss` by its flat
index; `auto` takes the faster of the first two. Proposals have a proven error bound; rows within it are decided by
float64 distances, pair by pair. Hence labels depend on the row and the centroids alone, not on the block, the engine,
the device or the number of threads.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from raycluster.clustering.search import int8_cpu, int8_cuda
from raycluster.clustering.search.centroids import PreparedCentroids, prepare
from raycluster.clustering.search.float32 import Search, faiss_search, float_search, in_tiles
from raycluster.clustering.search.int8_torch import can_search, int8_search
from raycluster.clustering.search.rerank import squared_distances
from raycluster.features.matrix import device
from raycluster.types import UserError

Engine = Literal["auto", "int8", "torch", "faiss"]

_KERNEL_ROWS = 4096


def nearest(
    values: NDArray[np.floating], centroids: NDArray[np.floating], *, engine: Engine = "auto"
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Label every row with its nearest centroid, of equal distances the lowest.

    values: (n, D) float32 or float16. centroids: (K, D). Returns labels (n,) int64 and squared Euclidean distances (n,)
    float32. Temporary memory does not grow with n and K. Raises UserError if widths differ or values are not finite.
    """
    exact = np.asarray(centroids, np.float32)
    if exact.ndim != 2 or not len(exact) or values.shape[1:] != exact.shape[1:]:
        raise UserError(f"centroids must be (K, {values.shape[1]}) like the rows of features; seen {exact.shape}")
    for name, array in (("features", values), ("centroids", exact)):
        if array.size and not np.isfinite(array.min() + array.max()):
            raise UserError(f"{name} hold NaN or infinite values; remove these rows")
    labels = assign(values, prepare(exact), engine)
    return labels, squared_distances(values, exact, labels).astype(np.float32)


def assign(
    values: NDArray[np.floating],
    prepared: PreparedCentroids,
    engine: Engine = "auto",
    previous: NDArray[np.int64] | None = None,
) -> NDArray[np.int64]:
    """Labels (n,) of `nearest`, for finite values and centroids already prepared.

    previous: (n,) labels of an earlier step (any number for none), a hint that saves time and changes no label.
    """
    resolved = resolve_engine(engine)
    if resolved == "int8" and prepared.packed is not None:
        return _kernel_assign(values, prepared, prepared.packed, previous)
    return in_tiles(values, *(faiss_search(prepared) if resolved == "faiss" else _torch_search(prepared)))


def resolve_engine(engine: Engine) -> Engine:
    """The engine to use here: the fastest for `auto`; `torch` for `int8` where there is no compiled kernel.

    Raises UserError for an unknown engine.
    """
    if engine not in get_args(Engine):
        raise UserError(f"engine must be one of {', '.join(get_args(Engine))}; seen {engine!r}")
    if engine == "auto":
        return "int8" if device().type == "cpu" and int8_cpu.support() in (int8_cpu.AVX512, int8_cpu.AVX2) else "torch"
    return "torch" if engine == "int8" and int8_cpu.support() is None else engine


def _kernel_assign(
    values: NDArray[np.floating],
    prepared: PreparedCentroids,
    packed: int8_cpu.PackedCentroids,
    previous: NDArray[np.int64] | None,
) -> NDArray[np.int64]:
    labels = np.empty(len(values), np.int64)
    for start in range(0, len(values), _KERNEL_ROWS):
        part = slice(start, start + _KERNEL_ROWS)
        tile = values[part].astype(np.float32, copy=False)
        labels[part], undecided = int8_cpu.search(tile, packed, None if previous is None else previous[part])
        if undecided:
            rows = np.flatnonzero(labels[part] < 0)
            labels[start + rows] = assign(tile[rows], prepared, "torch")
    return labels


def _torch_search(prepared: PreparedCentroids) -> tuple[Search, int]:
    where = device()
    if where.type == "cuda" and int8_cuda.can_search(prepared, where):
        return int8_cuda.gpu_search(prepared, where)
    return int8_search(prepared) if can_search(prepared) else float_search(prepared)
