"""The epoch plan: which images each stream visits in which order, known before anything is read.

An epoch is a sequence of rows: shards in a seeded order, each sample repeated by its number of visits. It is cut into
contiguous streams of equal length, of which stream j supplies microbatch j of every step; inside a stream, rows are
shuffled within windows of neighbouring shards. The plan does not depend on the number of workers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from raycluster.seeding import generator
from raycluster.types import Chunk, ImageArray, ImageBlock, Shard


class StepRows(NamedTuple):
    """One microbatch. samples: (b,). images: (b, h, w, 3 or 2). errors: (b,). extra_views: each like images."""

    samples: NDArray[np.int64]
    images: ImageArray
    errors: NDArray[np.str_]
    extra_views: tuple[ImageArray, ...] = ()


def plan_epoch(
    counts: NDArray[np.int64],
    shards: Sequence[Shard],
    *,
    streams: int,
    microbatch: int,
    seed: int,
    epoch: int,
    window_shards: int,
    only: Sequence[int] | None = None,
) -> list[Chunk]:
    """One chunk per stream and window, ordered by the step that needs its first row, then by stream.

    counts: (N,) visits per sample, whose sum must be a multiple of streams * microbatch. shards: (start, stop) ids.
    only: streams to plan, None for all; the time and memory are then those of their rows.
    """
    total = int(counts.sum())
    if total % (streams * microbatch):
        raise ValueError(f"{total} rows do not fill {streams} streams with microbatches of {microbatch}")
    length, planned = total // streams, set(range(streams) if only is None else only)
    order = generator(seed, "shards", epoch).permutation(len(shards))
    chunks, row = [], 0
    for window in range(0, len(order), window_shards):
        spans = [shards[shard] for shard in order[window : window + window_shards]]
        stop = row + sum(int(counts[slice(*span)].sum()) for span in spans)
        wanted = planned.intersection(range(row // length, -(-stop // length)) if stop > row else ())
        samples, repeats = _rows(counts, spans if wanted else [])
        for stream in sorted(wanted):
            low, high = max(row, stream * length), min(stop, (stream + 1) * length)
            rows = low - row + generator(seed, "rows", epoch, stream, window).permutation(high - low)
            chunks.append(Chunk(stream, low - stream * length, epoch, samples[rows], repeats[rows]))
        row = stop
    return _in_order(chunks, microbatch)


def from_step(chunks: Sequence[Chunk], step: int, microbatch: int) -> list[Chunk]:
    """The rest of a plan from `step` on: the rows of each stream from step * microbatch."""
    done = step * microbatch
    rest = [_cut(chunk, max(chunk.start, done), chunk.start + len(chunk.samples)) for chunk in chunks]
    return _in_order([chunk for chunk in rest if len(chunk.samples)], microbatch)


def split_chunks(chunks: Sequence[Chunk], rows: int, microbatch: int) -> list[Chunk]:
    """The same plan in chunks of at most `rows` rows. The first step starts earlier; files are opened more often."""
    parts = [
        _cut(chunk, start, start + rows)
        for chunk in chunks
        for start in range(chunk.start, chunk.start + len(chunk.samples), rows)
    ]
    return _in_order(parts, microbatch)


def shard_chunks(
    shards: Sequence[Shard], epoch: int = 0, visits: int = 1, drawn: NDArray[np.bool_] | None = None
) -> list[Chunk]:
    """The plan of feature extraction: one chunk per shard, whose stream is the index of the shard.

    Samples are in order, and all visits of a sample follow one another. drawn: (N,) samples to extract, None for all.
    """
    return [_shard_chunk(shard, span, epoch, visits, drawn) for shard, span in enumerate(shards)]


def _shard_chunk(shard: int, span: Shard, epoch: int, visits: int, drawn: NDArray[np.bool_] | None) -> Chunk:
    samples = np.arange(*span, dtype=np.int64)
    if drawn is not None:
        samples = samples[drawn[slice(*span)]]
    return Chunk(shard, 0, epoch, samples.repeat(visits), np.tile(np.arange(visits, dtype=np.int32), len(samples)))


def steps(blocks: Iterable[ImageBlock], streams: Sequence[int], microbatch: int) -> Iterator[dict[int, StepRows]]:
    """One microbatch per stream and step: {stream: its rows}.

    blocks: of these streams, in the order of the plan or of a rest of it (`from_step`).
    """
    waiting = {stream: _Queue() for stream in streams}
    for block in blocks:
        waiting[block.stream].push(block)
        while all(queue.rows >= microbatch for queue in waiting.values()):
            yield {stream: queue.pop(microbatch) for stream, queue in waiting.items()}
    left = {stream: queue.rows for stream, queue in waiting.items() if queue.rows}
    assert not left, f"rows left over in streams {left}: blocks are missing, or the plan does not fill its last step"


class _Queue:
    """Rows of one stream that have arrived and are not used yet."""

    def __init__(self) -> None:
        self.rows = 0
        self._blocks: deque[ImageBlock] = deque()
        self._next: int | None = None

    def push(self, block: ImageBlock) -> None:
        assert self._next in (None, block.start), f"stream {block.stream} got row {block.start} instead of {self._next}"
        self._next = block.start + len(block.samples)
        self._blocks.append(block)
        self.rows += len(block.samples)

    def pop(self, count: int) -> StepRows:
        self.rows -= count
        taken: list[ImageBlock] = []
        while count:
            block = self._blocks.popleft()
            if len(block.samples) > count:
                self._blocks.appendleft(_part(block, count, len(block.samples)))
                block = _part(block, 0, count)
            taken.append(block)
            count -= len(block.samples)
        if len(taken) == 1:
            return StepRows(taken[0].samples, taken[0].images, taken[0].errors, taken[0].extra_views)
        return StepRows(
            np.concatenate([block.samples for block in taken]),
            np.concatenate([block.images for block in taken]),
            np.concatenate([block.errors for block in taken]),
            tuple(map(np.concatenate, zip(*(block.extra_views for block in taken), strict=True))),
        )


def _rows(counts: NDArray[np.int64], shards: Sequence[Shard]) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Samples in order, one row per visit, and the index of each visit."""
    ids = np.concatenate([np.arange(*span, dtype=np.int64) for span in [(0, 0), *shards]])
    visits = counts[ids]
    first = np.repeat(np.cumsum(visits) - visits, visits)
    return np.repeat(ids, visits), (np.arange(len(first)) - first).astype(np.int32)


def _cut(chunk: Chunk, start: int, stop: int) -> Chunk:
    rows = slice(max(start - chunk.start, 0), max(stop - chunk.start, 0))
    return Chunk(chunk.stream, start, chunk.epoch, chunk.samples[rows], chunk.repeats[rows])


def _in_order(chunks: list[Chunk], microbatch: int) -> list[Chunk]:
    return sorted(chunks, key=lambda chunk: (chunk.start // microbatch, chunk.stream, chunk.start))


def _part(block: ImageBlock, start: int, stop: int) -> ImageBlock:
    rows = slice(start, stop)
    extra_views = tuple(view[rows] for view in block.extra_views)
    return ImageBlock(
        block.stream, block.start + start, block.samples[rows], block.images[rows], block.errors[rows], extra_views
    )
