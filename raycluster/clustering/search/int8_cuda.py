"""The search of engine="torch" on a GPU whose tensor cores multiply bytes: several times a float32 product.

The bounds are those of `byte_search`. A kernel written in Triton computes the upper ends of all scores, but stores only
the highest of each group of 16 centroids. The groups that reach the float32 score of the best in sight are computed in
float32, all 16 of them, near-ties of these in float64.
"""

from __future__ import annotations

import logging
import threading
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import pad

from raycluster.clustering.search.centroids import PreparedCentroids, QuantizedRows, prepare, quantize_rows
from raycluster.clustering.search.float32 import Search, float_search
from raycluster.clustering.search.int8_torch import GROUP, Pairs, label_rows

_TILE_ROWS = 1 << 16
_TILE_GROUPS = 1 << 26  # of all rows together, likewise the values: 256 MB and 64 MB
_TILE_VALUES = 1 << 24
_GATHERED_VALUES = 1 << 24
_SURVIVORS = 16  # groups per row; with more, float32 products of everything cost less

log = logging.getLogger(__name__)
_trial = threading.Lock()


class _Held(NamedTuple):
    """A target on the device, in whole groups. centre: (D,). members: (groups, GROUP, D) centroids - centre, float32.
    offsets: (groups, GROUP), -infinity where there is no centroid. packed: what the kernel reads.
    """

    centre: torch.Tensor
    members: torch.Tensor
    offsets: torch.Tensor
    packed: Any


def can_search(prepared: PreparedCentroids, where: torch.device) -> bool:
    """Whether the error bounds hold for these centroids, and the kernel works on that device."""
    with _trial:  # else several threads might compile it, and tell why it cannot be
        return prepared.fit_int8 and _works(where, len(prepared.centre))


def gpu_search(prepared: PreparedCentroids, where: torch.device) -> tuple[Search, int]:
    """A search by products of bytes on a device, and the number of rows it wants at a time."""
    held = prepared.held.get(where)
    if held is None:
        held = prepared.held[where] = _hold(prepared, where)

    def search(tile: NDArray[np.float32]) -> NDArray[np.int64]:
        rows = torch.tensor(np.ascontiguousarray(tile), device=where).sub_(held.centre)
        return label_rows(tile, rows, quantize_rows(rows), prepared, partial(_candidates, held))

    num_groups, dim = held.members.shape[0], held.members.shape[2]
    return search, max(64, min(_TILE_ROWS, _TILE_GROUPS // num_groups, _TILE_VALUES // dim))


@lru_cache(maxsize=64)
def _works(where: torch.device, dim: int) -> bool:
    """Whether the kernel compiles there, and leads to the labels that float32 products lead to; the log says why not.
    Vectors of another length are another kernel.
    """
    rng = np.random.default_rng(0)
    tile, centroids = (rng.standard_normal((count, dim), np.float32) for count in (200, 300))
    prepared = prepare(centroids)
    try:
        if not np.array_equal(gpu_search(prepared, where)[0](tile), float_search(prepared)[0](tile)):
            raise ArithmeticError("the kernel compiled for it finds other labels")
    except Exception as error:  # Triton and what it calls raise whatever they like
        log.warning("k-means by float32 products on a GPU, several times slower, same results: %s", error)
        return False
    return True


def _hold(prepared: PreparedCentroids, where: torch.device) -> _Held:
    from raycluster.clustering.search.triton_kernel import pack_centroids  # needs Triton

    centre, offsets = torch.tensor(prepared.centre, device=where), prepared.offsets.to(where)
    centred = torch.tensor(prepared.centroids, device=where).sub_(centre)
    missing = -len(offsets) % GROUP
    members = pad(centred, (0, 0, 0, missing)).view(-1, GROUP, len(centre))
    padded = pad(offsets, (0, missing), value=-torch.inf).view(-1, GROUP)
    quantized = [quantize_rows(part) for part in centred.split(max(1, _TILE_VALUES // len(centre)))]
    packed = pack_centroids(QuantizedRows(*map(torch.cat, zip(*quantized, strict=True))), offsets)
    return _Held(centre, members, padded, packed)


def _candidates(held: _Held, rows: torch.Tensor, quantized: QuantizedRows, prepared: PreparedCentroids) -> Pairs | None:
    """The centroids that may be nearest by their float32 scores; None if groups that hold some are very many."""
    from raycluster.clustering.search.triton_kernel import highest, pack_rows

    tops = highest(pack_rows(quantized), held.packed)[: len(rows), : len(held.members)]
    error_bound, likely = prepared.score_error(quantized.norms), tops.argmax(dim=1)
    first = _scores(rows, torch.arange(len(rows), device=rows.device), likely, held)
    reached = tops >= (first.amax(dim=1) - 2.5 * error_bound)[:, None]
    if int(reached.sum()) > _SURVIVORS * len(rows):
        return None
    places, groups = torch.nonzero(reached, as_tuple=True)
    known = groups == likely[places]
    scores = first[places]
    scores[~known] = _scores(rows, places[~known], groups[~known], held)
    # Not scatter_reduce_, which CUDA refuses where deterministic algorithms are asked for.
    tops.fill_(-torch.inf)[places, groups] = scores.amax(dim=1)
    best = tops.amax(dim=1)
    which, member = torch.nonzero(scores >= (best - error_bound)[places, None], as_tuple=True)
    return Pairs(places[which], groups[which] * GROUP + member)


def _scores(rows: torch.Tensor, places: torch.Tensor, groups: torch.Tensor, held: _Held) -> torch.Tensor:
    """Scores in float32 of the members of some groups, (p, GROUP). places: (p,) rows."""
    size = max(1, _GATHERED_VALUES // held.members[0].numel())
    products = [
        torch.bmm(held.members[those], rows[one, :, None])[..., 0]
        for one, those in zip(places.split(size), groups.split(size), strict=True)
    ]
    return torch.cat(products) + held.offsets[groups]
