"""Features gathered during training instead of a pass over all images: of each sample those of its latest visit.

They are the inputs of the heads in one or several views of the image, augmented, in training mode, with the weights of
that step. Which visit is the latest follows from the epoch plan alone, and rows are written with every checkpoint.
Hence neither the number of workers nor interruptions change the features that a round is assigned from.
"""

from __future__ import annotations

import io
import re
from collections import deque
from collections.abc import Iterator, Sequence
from hashlib import sha256
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from raycluster.io import storage
from raycluster.io.npz import read_npz
from raycluster.runtime.workers import Workers
from raycluster.types import Block, FeatureRequest

KEPT_EPOCHS = 2  # before a checkpoint, whose features are kept
_NAME = re.compile(r"step-(\d{9})-[0-9a-f]{16}\.npz$")


class FeatureRows(NamedTuple):
    """samples: (n,) int64. times: (n,) int64, later visits have larger ones. values: (n, D) float16."""

    samples: NDArray[np.int64]
    times: NDArray[np.int64]
    values: NDArray[np.float16]


class OnlineFeatureBank:
    """The features this worker gathered: a forward pre-hook of the heads. `register_batch` precedes each forward pass.

    folder: URI where rows are written. request: what is kept: of its first `visits` views, the input of the heads side
    by side. num_views: that a step shows of each image. copies: rows per image that the network sees in a view; the
    first one is kept.
    """

    def __init__(self, folder: str, request: FeatureRequest, *, num_views: int = 1, copies: int = 1) -> None:
        self._folder, self._request, self._num_views, self._copies = folder, request, num_views, copies
        self._views: list[NDArray[np.float16]] = []  # of the forward pass that is under way
        self._passes = 0  # of the heads, one for each view
        self._expected: deque[tuple[NDArray[np.int64], NDArray[np.int64]]] = deque()
        self._rows: list[FeatureRows] = []
        self._written = 0  # number of `_rows` that are in files

    def register_batch(self, samples: NDArray[np.int64], first_time: int) -> None:
        """Announce the next microbatch: (n,) sample ids; its rows have consecutive times from `first_time`."""
        self._expected.append((samples, first_time + np.arange(len(samples))))

    def __call__(self, heads: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Keep the input of the heads: (rows, D), in one of the views."""
        view, visits = self._passes % self._num_views, self._request.visits
        self._passes += 1
        if view < visits:
            values = inputs[0].detach()[:: self._copies]
            values = values.relu() if self._request.kind == "activations" else values
            self._views.append(values.cpu().half().numpy())
        if view == visits - 1:
            self._keep(np.hstack(self._views))
            self._views = []

    def _keep(self, values: NDArray[np.float16]) -> None:
        while len(values):
            samples, times = self._expected.popleft()
            here, values = values[: len(samples)], values[len(samples) :]
            self._rows.append(FeatureRows(samples, times, here))

    def write(self, position: int) -> None:
        """Write the rows gathered since the last write. position: optimiser steps of the run so far."""
        if self._written < len(self._rows):
            buffer = io.BytesIO()
            np.savez(buffer, **_latest(self._rows[self._written :])._asdict())
            name = f"step-{position:09d}-{sha256(buffer.getvalue()).hexdigest()[:16]}.npz"
            storage.write_bytes(storage.join(self._folder, name), buffer.getvalue())
            self._rows = [_latest(self._rows)]
            self._written = 1

    def read(self, workers: Workers, position: int) -> None:
        """Read the rows written up to `position`, sharded over the workers, and delete later ones. Collective.

        Raises UserError if a file is damaged.
        """
        workers.run_on_rank_zero(prune, self._folder, position + 1, 10**9)
        for uri in workers.shard(_files(self._folder)):
            self._rows.append(FeatureRows(**read_npz(uri, FeatureRows._fields)))
        self._written = len(self._rows)

    def put(
        self,
        workers: Workers,
        version: str,
        shards: Sequence[tuple[int, int]],
        left_out: NDArray[np.int64],
        *,
        oldest: int = 0,
    ) -> list[int]:
        """Put the rows of all shards whose samples were all visited; returns the other shards. Collective.

        version: of the features. shards: (start, stop) sample ids. left_out: ids of samples without features. oldest:
        time of the first visit that counts, since files of earlier ones may have been deleted.
        """
        mine = _latest(self._rows)
        latest = np.full(shards[-1][1], -1, np.int64)
        for samples, times in workers.all_gather([(mine.samples, mine.times)]):
            np.maximum.at(latest, samples, times)
        latest[latest < oldest] = -1
        starts = np.array([start for start, _ in shards])
        unknown = np.setdiff1d(np.flatnonzero(latest < 0), left_out)
        rest = np.unique(np.searchsorted(starts, unknown, side="right") - 1)
        broken = np.isin(mine.samples, left_out)  # unreadable: black in training
        # Several workers may hold parts of a shard, so block numbers are unique per worker.
        (number,) = workers.shard(range(len(workers.all_gather([None]))))
        blocks = {
            len(shards) * (1 + number) + shard: block
            for shard, block in _blocks(mine, (mine.times == latest[mine.samples]) & ~broken, starts)
            if shard not in rest
        }
        keys = workers.all_gather(sorted(blocks))
        while missing := workers.missing(version, keys):
            for key in blocks.keys() & set(missing):
                workers.put(version, key, blocks[key])
        return rest.tolist()


def _latest(rows: Sequence[FeatureRows]) -> FeatureRows:
    """The latest row of each sample, ordered by sample id."""
    if not rows:
        return FeatureRows(np.empty(0, np.int64), np.empty(0, np.int64), np.empty((0, 1), np.float16))
    samples, times, values = (np.concatenate(parts) for parts in zip(*rows, strict=True))
    order = np.lexsort((times, samples))
    last = order[np.append(np.diff(samples[order]) > 0, True)]
    return FeatureRows(samples[last], times[last], values[last])


def _blocks(rows: FeatureRows, kept: NDArray[np.bool_], starts: NDArray[np.int64]) -> Iterator[tuple[int, Block]]:
    """(shard, its kept rows). rows: ordered by sample id. kept: (n,) mask. starts: first sample id of each shard."""
    edges = np.append(np.searchsorted(rows.samples, starts), len(rows.samples))
    for shard, (start, stop) in enumerate(pairwise(edges.tolist())):
        at = start + np.flatnonzero(kept[start:stop])
        if len(at):
            yield shard, Block(rows.samples[at], rows.values[at])


def _files(folder: str) -> list[str]:
    files = storage.list_files(folder) if storage.exists(folder) else []
    return sorted(uri for uri in files if _NAME.search(uri.split("?")[0]))


def _position(uri: str) -> int:
    match = _NAME.search(uri.split("?")[0])
    assert match
    return int(match[1])


def prune(folder: str, first: int, stop: int) -> None:
    """Delete the files written at positions in [first, stop)."""
    for uri in _files(folder):
        if first <= _position(uri) < stop:
            storage.delete(uri)
