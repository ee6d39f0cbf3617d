"""The search of engine="torch" on a GPU with 8-bit tensor cores: several times as fast as a float32 product.

The bounds are those of `int8_search`. A kernel written in Triton computes the upper ends of all scores, but stores only
the highest of each group of 16 centroids. Groups that reach the best float32 score are computed in float32,
near-ties in float64.
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


class _DeviceCentroids(NamedTuple):
    """Centroids on the device, padded to whole groups. centre: (D,). members: (groups, GROUP, D) float32, about it.
    offsets: (groups, GROUP), -infinity where there is no centroid. packed: as the kernel reads them.
    """

    centre: torch.Tensor
    members: torch.Tensor
    offsets: torch.Tensor
    packed: Any


def can_search(prepared: PreparedCentroids, where: torch.device) -> bool:
    """Whether the error bounds hold for these centroids, and the kernel works on that device."""
    with _trial:  # so that one thread compiles it, and logs why that failed
        return prepared.fit_int8 and _works(where, len(prepared.centre))


def gpu_search(prepared: PreparedCentroids, where: torch.device) -> tuple[Search, int]:
    """A search by 8-bit products on a device, and its number of rows per call."""
    on_device = prepared.device_cache.get(where)
    if on_device is None:
        on_device = prepared.device_cache[where] = _to_device(prepared, where)

    def search(tile: NDArray[np.float32]) -> NDArray[np.int64]:
        rows = torch.tensor(np.ascontiguousarray(tile), device=where).sub_(on_device.centre)
        return label_rows(tile, rows, quantize_rows(rows), prepared, partial(_candidates, on_device))

    num_groups, dim = on_device.members.shape[0], on_device.members.shape[2]
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
            raise ArithmeticError("the kernel gives other labels than float32 products")
    except Exception as error:  # Triton and the compilers it calls raise errors of many types
        log.warning("k-means by float32 products on a GPU, several times slower, same results: %s", error)
        return False
    return True


def _to_device(prepared: PreparedCentroids, where: torch.device) -> _DeviceCentroids:
    from raycluster.clustering.search.triton_kernel import pack_centroids  # needs Triton

    centre, offsets = torch.tensor(prepared.centre, device=where), prepared.offsets.to(where)
    centred = torch.tensor(prepared.centroids, device=where).sub_(centre)
    missing = -len(offsets) % GROUP
    members = pad(centred, (0, 0, 0, missing)).view(-1, GROUP, len(centre))
    padded = pad(offsets, (0, missing), value=-torch.inf).view(-1, GROUP)
    quantized = [quantize_rows(part) for part in centred.split(max(1, _TILE_VALUES // len(centre)))]
    packed = pack_centroids(QuantizedRows(*map(torch.cat, zip(*quantized, strict=True))), offsets)
    return _DeviceCentroids(centre, members, padded, packed)


def _candidates(
    on_device: _DeviceCentroids, rows: torch.Tensor, quantized: QuantizedRows, prepared: PreparedCentroids
) -> Pairs | None:
    """The centroids that may be nearest by their float32 scores; None if they are in too many groups."""
    from raycluster.clustering.search.triton_kernel import highest, pack_rows

    group_bounds = highest(pack_rows(quantized), on_device.packed)[: len(rows), : len(on_device.members)]
    error_bound, likely = prepared.score_error(quantized.norms), group_bounds.argmax(dim=1)
    first = _scores(rows, torch.arange(len(rows), device=rows.device), likely, on_device)
    reached = group_bounds >= (first.amax(dim=1) - 2.5 * error_bound)[:, None]
    if int(reached.sum()) > _SURVIVORS * len(rows):
        return None
    row_ids, groups = torch.nonzero(reached, as_tuple=True)
    known = groups == likely[row_ids]
    scores = first[row_ids]
    scores[~known] = _scores(rows, row_ids[~known], groups[~known], on_device)
    # Not scatter_reduce_, which raises on CUDA under torch.use_deterministic_algorithms.
    group_bounds.fill_(-torch.inf)[row_ids, groups] = scores.amax(dim=1)
    best = group_bounds.amax(dim=1)
    which, member = torch.nonzero(scores >= (best - error_bound)[row_ids, None], as_tuple=True)
    return Pairs(row_ids[which], groups[which] * GROUP + member)


def _scores(
    rows: torch.Tensor, row_ids: torch.Tensor, groups: torch.Tensor, on_device: _DeviceCentroids
) -> torch.Tensor:
    """Scores in float32 of the members of some groups, (p, GROUP). row_ids: (p,) rows."""
    size = max(1, _GATHERED_VALUES // on_device.members[0].numel())
    products = [
        torch.bmm(on_device.members[some_groups], rows[some_rows, :, None])[..., 0]
        for some_rows, some_groups in zip(row_ids.split(size), groups.split(size), strict=True)
    ]
    return torch.cat(products) + on_device.offsets[groups]
