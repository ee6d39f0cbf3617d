"""The nearest centroid of every row: proposed by a fast product, decided exactly.

The engines differ in what proposes: `int8` the compiled kernel (8-bit products, several times as fast as float32),
`torch` a float32 product on CPU or GPU, `faiss` its flat index; `auto` takes the faster of the first two. A float32
product tells apart all but a few near-ties. Its rounding error has a rigorous bound (Higham, Accuracy and Stability of
Numerical Algorithms, section 3.1), so rows whose two best scores lie within it are known; they are decided by float64
distances, computed pair by pair. Hence labels depend on the row and the centroids alone: not on the block, the engine,
the device or the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from raycluster.clustering import kernel
from raycluster.features import device
from raycluster.types import UserError

Engine = Literal["auto", "int8", "torch", "faiss"]
Search = Callable[[NDArray[np.float32]], NDArray[np.int64]]

_TILE_ROWS = {"cpu": 256, "cuda": 1 << 16}
_TILE_SCORES = {"cpu": 1 << 21, "cuda": 1 << 26}
_FAISS_ROWS = 4096
_KERNEL_ROWS = 4096
_PAIR_ENTRIES = 1 << 20
# A product's inputs keep 24 bits of mantissa in full float32; torch may have been told to be content with 11 or 8.
_INPUT_ERROR = {"highest": 0.0, "high": 2.0**-10, "medium": 2.0**-7}


@dataclass(frozen=True, eq=False)
class Target:
    """Centroids made ready for a search. Distances are taken about their mean, where float32 cancels least.

    centroids: (K, D) float32. centre: (D,) float32. centred: (K, D) centroids - centre. offsets: (K,) -|centred|^2 / 2.
    reach: largest norm of centred.
    """

    centroids: NDArray[np.float32]
    centre: NDArray[np.float32]
    centred: torch.Tensor
    offsets: torch.Tensor
    reach: float

    def __reduce__(self) -> tuple[Any, ...]:
        return prepare, (self.centroids,)  # the rest costs less to compute than to send

    @cached_property
    def packed(self) -> kernel.Packed | None:
        """What the compiled kernel scans; None where there is no kernel or its error bounds do not hold."""
        instructions = kernel.support()
        if instructions is None:
            return None
        tables = self.centred.numpy(), self.offsets.numpy()
        return kernel.pack(self.centroids, self.centre, *tables, self.reach, instructions)


def prepare(centroids: NDArray[np.floating]) -> Target:
    """Make (K, D) centroids ready; do it once for many blocks."""
    exact = np.ascontiguousarray(centroids, np.float32)
    centre = exact.mean(axis=0, dtype=np.float64).astype(np.float32)
    centred = exact - centre
    squares = np.square(centred, dtype=np.float64).sum(axis=1)
    offsets = torch.from_numpy((-squares / 2).astype(np.float32))
    return Target(exact, centre, torch.from_numpy(centred), offsets, float(np.sqrt(squares.max())))


def nearest(
    values: NDArray[np.floating], centroids: NDArray[np.floating], *, engine: Engine = "auto"
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Label every row with its nearest centroid; the lowest of several equally near ones.

    values: (n, D) float32 or float16. centroids: (K, D). Gives labels (n,) and squared Euclidean distances (n,).
    Temporary memory is bounded whatever n and K. Raises UserError if widths differ or values are not finite.
    """
    exact = np.asarray(centroids, np.float32)
    if exact.ndim != 2 or not len(exact) or values.shape[1:] != exact.shape[1:]:
        raise UserError(f"centroids must be (K, {values.shape[1]}) like the rows of features; seen {exact.shape}")
    for name, array in (("features", values), ("centroids", exact)):
        if array.size and not np.isfinite(array.min() + array.max()):
            raise UserError(f"{name} hold NaN or infinite values; nothing is nearest to those")
    labels = assign(values, prepare(exact), engine)
    return labels, squared_distances(values, exact, labels).astype(np.float32)


def assign(
    values: NDArray[np.floating], target: Target, engine: Engine = "auto", previous: NDArray[np.int64] | None = None
) -> NDArray[np.int64]:
    """Labels (n,) of `nearest`, for finite values and centroids already prepared.

    previous: (n,) labels that may be right or nearly so (any number for none); they save time and change no label.
    """
    chosen = choose(engine)
    if chosen == "int8" and target.packed is not None:
        return _kernel_assign(values, target, target.packed, previous)
    search, size = _faiss_search(target) if chosen == "faiss" else _torch_search(target)
    labels = np.empty(len(values), np.int64)
    for start in range(0, len(values), size):
        labels[start : start + size] = search(values[start : start + size].astype(np.float32, copy=False))
    return labels


def choose(engine: Engine) -> Engine:
    """The engine that does the work here: `auto` becomes the fastest; without a kernel `int8` becomes `torch`."""
    if engine == "auto":
        return "int8" if device().type == "cpu" and kernel.support() in (kernel.AVX512, kernel.AVX2) else "torch"
    return "torch" if engine == "int8" and kernel.support() is None else engine


def _kernel_assign(
    values: NDArray[np.floating], target: Target, packed: kernel.Packed, previous: NDArray[np.int64] | None
) -> NDArray[np.int64]:
    labels = np.empty(len(values), np.int64)
    for start in range(0, len(values), _KERNEL_ROWS):
        part = slice(start, start + _KERNEL_ROWS)
        tile = values[part].astype(np.float32, copy=False)
        labels[part], undecided = kernel.search(tile, packed, None if previous is None else previous[part])
        if undecided:
            open_rows = np.flatnonzero(labels[part] < 0)
            labels[start + open_rows] = assign(tile[open_rows], target, "torch")
    return labels


def squared_distances(
    values: NDArray[np.floating], centroids: NDArray[np.float32], labels: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Squared distance (n,) of each row to the centroid its label names, in float64."""
    return pair_distances(values, np.arange(len(values)), centroids, labels)


def _torch_search(target: Target) -> tuple[Search, int]:
    """A search by product scores x.c - |c|^2 / 2, and the number of rows it wants at a time."""
    where = device()
    centred, offsets = target.centred.to(where), target.offsets.to(where)

    def search(tile: NDArray[np.float32]) -> NDArray[np.int64]:
        rows = torch.from_numpy(tile - target.centre).to(where)
        scores = torch.addmm(offsets, rows, centred.T)
        best, labels = _argmax(scores)
        scores.scatter_(1, labels, -torch.inf)
        second = scores.amax(dim=1, keepdim=True)
        norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        slack = product_error(tile.shape[1]) * target.reach * (norm + target.reach / 2) + tile.shape[1] * 2.0**-125
        # Negated, so that what overflowed to NaN counts as too close; likewise the candidates.
        doubtful = (~(best - second > slack))[:, 0]
        result: NDArray[np.int64] = labels[:, 0].cpu().numpy()
        if doubtful.any():
            scores.scatter_(1, labels, best)
            candidates = ~(scores[doubtful] < (best - slack)[doubtful])
            chosen = doubtful.cpu().numpy()
            result[chosen] = _decide(tile[chosen], target.centroids, candidates.cpu().numpy())
        return result

    size = min(_TILE_ROWS[where.type], max(64, _TILE_SCORES[where.type] // len(target.centroids)))
    return search, size


def _faiss_search(target: Target) -> tuple[Search, int]:
    """The same search with faiss's flat index as the proposer."""
    import faiss  # takes a second to load, and few ask for it

    index = faiss.IndexFlatL2(len(target.centre))
    index.add(target.centred.numpy())
    decide, _ = _torch_search(target)

    def search(tile: NDArray[np.float32]) -> NDArray[np.int64]:
        rows = tile - target.centre
        threads = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(torch.get_num_threads())
        distances, columns = index.search(rows, min(2, index.ntotal))
        faiss.omp_set_num_threads(threads)
        labels: NDArray[np.int64] = columns[:, 0].copy()
        slack = product_error(index.d) * (np.linalg.norm(rows, axis=1) + target.reach) ** 2 + index.d * 2.0**-125
        doubtful = ~(distances[:, -1] - distances[:, 0] > slack)
        if doubtful.any():
            labels[doubtful] = decide(tile[doubtful])
        return labels

    return search, _FAISS_ROWS


def _argmax(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest score of each row and its column, both (n, 1); any column among equals."""
    if scores.device.type == "cpu":  # numpy's search is vectorised, ten times as fast as torch's
        columns = torch.from_numpy(scores.numpy().argmax(axis=1))[:, None]
    else:
        columns = scores.argmax(dim=1, keepdim=True)
    return scores.gather(1, columns), columns


def product_error(dim: int) -> float:
    """Twice the relative error of a float32 product over dim terms, summed in any order, inputs centred beforehand."""
    rounding = (dim + 8) * 2.0**-24
    return 2.04 * (rounding + 2 * _INPUT_ERROR[torch.get_float32_matmul_precision()])


def _decide(
    tile: NDArray[np.float32], centroids: NDArray[np.float32], candidates: NDArray[np.bool_]
) -> NDArray[np.int64]:
    """Nearest candidate of each row, the lowest among equals. candidates: (n, K), at least one in each row."""
    rows, columns = np.nonzero(candidates)
    distances = pair_distances(tile, rows, centroids, columns)
    starts = np.flatnonzero(np.diff(rows, prepend=-1))
    least = np.minimum.reduceat(distances, starts)
    lowest: NDArray[np.int64] = np.minimum.reduceat(np.where(distances == least[rows], columns, len(centroids)), starts)
    return lowest


def pair_distances(
    values: NDArray[np.floating], rows: NDArray[np.intp], centroids: NDArray[np.float32], columns: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Squared distance of the row and the centroid of each pair, in float64; the same in any company."""
    result = np.empty(len(rows), np.float64)
    size = max(1, _PAIR_ENTRIES // values.shape[1])
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        difference = values[rows[part]].astype(np.float64) - centroids[columns[part]]
        result[part] = np.square(difference, out=difference).sum(axis=1)
    return result
