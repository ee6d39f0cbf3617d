"""Features gathered while training, in place of a pass over all images: of each sample those of its latest visit.

They are what the heads read there: of the augmented picture, in training mode, with the weights of that moment. Which
visit is the latest follows from the epoch plan alone, and rows are written beside every checkpoint, so that neither
workers nor interruptions change what a round is assigned from.
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
from raycluster.runtime.workers import Workers
from raycluster.types import Block

_NAME = re.compile(r"step-(\d{9})-[0-9a-f]{16}\.npz$")


class FeatureRows(NamedTuple):
    """samples: (n,) int64. times: (n,) int64, later visits have larger ones. values: (n, D) float16."""

    samples: NDArray[np.int64]
    times: NDArray[np.int64]
    values: NDArray[np.float16]


class OnlineFeatureBank:
    """What this worker gathered. Call it before each forward pass of the heads, as a hook; `register_batch` says who is there.

    folder: where rows are written. copies: rows that the network sees of one image, of which the first counts.
    """

    def __init__(self, folder: str, *, copies: int = 1) -> None:
        self._folder, self._copies = folder, copies
        self._expected: deque[tuple[NDArray[np.int64], NDArray[np.int64]]] = deque()
        self._rows: list[FeatureRows] = []
        self._written = 0  # how many of `_rows` lie in files

    def register_batch(self, samples: NDArray[np.int64], first_time: int) -> None:
        """The next microbatch that goes through the network; its rows have consecutive times."""
        self._expected.append((samples, first_time + np.arange(len(samples))))

    def __call__(self, heads: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Keep what the heads are about to read: (rows, D) before its ReLU."""
        values = inputs[0].detach()[:: self._copies].relu().cpu().half().numpy()
        while len(values):
            samples, times = self._expected.popleft()
            here, values = values[: len(samples)], values[len(samples) :]
            self._rows.append(FeatureRows(samples, times, here))

    def write(self, position: int) -> None:
        """Write what is new; position: optimiser steps done in the run."""
        if self._written < len(self._rows):
            buffer = io.BytesIO()
            np.savez(buffer, **_latest(self._rows[self._written :])._asdict())
            name = f"step-{position:09d}-{sha256(buffer.getvalue()).hexdigest()[:16]}.npz"
            storage.write_bytes(storage.join(self._folder, name), buffer.getvalue())
            self._rows = [_latest(self._rows)]
            self._written = 1

    def read(self, workers: Workers, position: int) -> None:
        """Share out what was written until `position`; what was written later will happen again. Collective."""
        workers.run_on_rank_zero(prune, self._folder, position + 1, 10**9)
        for uri in workers.shard(_files(self._folder)):
            with np.load(io.BytesIO(storage.read_bytes(uri))) as saved:
                self._rows.append(FeatureRows(saved["samples"], saved["times"], saved["values"]))
        self._written = len(self._rows)

    def put(
        self, workers: Workers, version: str, shards: Sequence[tuple[int, int]], left_out: NDArray[np.int64]
    ) -> list[int]:
        """Hand over all rows of shards whose every sample was visited; returns the other shards. Collective.

        left_out: sample ids of which there never are features.
        """
        mine = _latest(self._rows)
        latest = np.full(shards[-1][1], -1, np.int64)
        for samples, times in workers.all_gather([(mine.samples, mine.times)]):
            np.maximum.at(latest, samples, times)
        starts = np.array([start for start, _ in shards])
        unknown = np.setdiff1d(np.flatnonzero(latest < 0), left_out)
        rest = np.unique(np.searchsorted(starts, unknown, side="right") - 1)
        broken = np.isin(mine.samples, left_out)  # what was black in training
        # Several workers may hold parts of a shard, so each has numbers of its own for its blocks.
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
    """One row of each sample, in the order of the samples."""
    if not rows:
        return FeatureRows(np.empty(0, np.int64), np.empty(0, np.int64), np.empty((0, 1), np.float16))
    samples, times, values = (np.concatenate(parts) for parts in zip(*rows, strict=True))
    order = np.lexsort((times, samples))
    last = order[np.append(np.diff(samples[order]) > 0, True)]
    return FeatureRows(samples[last], times[last], values[last])


def _blocks(rows: FeatureRows, kept: NDArray[np.bool_], starts: NDArray[np.int64]) -> Iterator[tuple[int, Block]]:
    """The rows that are kept, by shard. rows: in the order of the samples. starts: first sample of each shard."""
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
    """Delete what was written at the positions from `first` to before `stop`."""
    for uri in _files(folder):
        if first <= _position(uri) < stop:
            storage.delete(uri)
