"""The N x D feature matrix in blocks of rows: algorithms only fold, map and collect over it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, reduce
from hashlib import blake2b
from queue import SimpleQueue
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from raycluster.types import Block, Features, UserError

T = TypeVar("T")

_CHUNK_ROWS = {"cpu": 2048, "cuda": 1 << 16}  # large enough to amortise kernel launches on a GPU
# Threads that share one total: combining is cheap, and totals may be large.
_THREADS_PER_TOTAL = 4
_NUM_EXAMPLES = 5
_BLOCK_ROWS = 1 << 11  # of gathered rows
_MIN_MEMORY_BUDGET = 2 * 2**20


def add(left: Any, right: Any) -> Any:
    """The default ``combine``: tuples of numbers or arrays, added element by element."""
    return tuple(a + b for a, b in zip(left, right, strict=True))


class LocalFeatures:
    """Features whose blocks are in this process; operations run on as many threads as torch has.

    Blocks may hold any real numbers; values other than float16 and float32 are converted to float32 in each operation,
    so no second copy is kept. Raises UserError if there are no rows, widths differ, or a sample id occurs twice.
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        self._blocks = list(blocks)
        dims = sorted({block.values.shape[1] for block in self._blocks})
        self.num_rows = sum(len(block.samples) for block in self._blocks)
        if self.num_rows == 0 or len(dims) != 1:
            raise UserError(
                f"features must be rows of one width; seen: {self.num_rows} rows of widths {dims} in "
                f"{len(self._blocks)} blocks. Check that the data set is not empty and every block is of one layer"
            )
        self.dim = dims[0]
        self.memory_budget = max(_MIN_MEMORY_BUDGET, sum(block.values.nbytes for block in self._blocks) // 100)
        known, _ = self._index()
        repeated = known[1:][known[1:] == known[:-1]]
        if len(repeated):
            raise UserError(f"sample ids must occur once; {repeated[0]} occurs again: one shard was given twice?")

    def _index(self) -> tuple[NDArray[np.int64], NDArray[np.intp] | None]:
        """All sample ids, ascending, and their rows, None if they are in order. Not kept, to save memory."""
        samples = np.concatenate([block.samples for block in self._blocks])
        if not (samples[1:] < samples[:-1]).any():
            return samples, None
        order = np.argsort(samples, kind="stable")
        return samples[order], order

    def fold(self, function: Callable[..., T], *args: Any, combine: Callable[[T, T], T] = add) -> T:
        """See `Features.fold`."""
        pieces = deque(piece for block in self._blocks for piece in _split_block(block))
        threads = min(torch.get_num_threads(), len(pieces))
        totals: SimpleQueue[list[T]] = SimpleQueue()
        num_totals = -(-threads // _THREADS_PER_TOTAL)
        for _ in range(num_totals):
            totals.put([])
        thread_map(lambda _: _fold_some(pieces, totals, function, args, combine), range(threads))
        return reduce(combine, [total for _ in range(num_totals) for total in totals.get()])

    def map(self, function: Callable[..., NDArray[np.floating]], *args: Any) -> LocalFeatures:
        """See `Features.map`."""
        values = self.collect(function, *args)
        return LocalFeatures([Block(b.samples, new) for b, new in zip(self._blocks, values, strict=True)])

    def collect(self, function: Callable[..., T], *args: Any) -> list[T]:
        """See `Features.collect`."""
        return thread_map(lambda block: function(_floats(block), *args), self._blocks)

    def map_jobs(self, function: Callable[..., T], jobs: Sequence[tuple[Any, ...]]) -> list[T]:
        """See `Features.map_jobs`."""
        return [function(self, *job) for job in jobs]

    def rows(self, samples: NDArray[np.int64]) -> NDArray[np.float32]:
        """See `Features.rows`. Raises UserError for an unknown sample id."""
        known, order = self._index()
        position = np.searchsorted(known, samples).clip(max=self.num_rows - 1)
        unknown = np.asarray(samples)[known[position] != samples]
        if len(unknown):
            raise UserError(f"no features of sample {unknown[0]} ({len(unknown)} such samples): were they extracted?")
        starts = np.cumsum([0] + [len(block.samples) for block in self._blocks])
        rows = position if order is None else order[position]
        result = np.empty((len(rows), self.dim), np.float32)
        inside = np.searchsorted(starts, rows, side="right") - 1
        for index in np.unique(inside):
            block, places = self._blocks[index], np.flatnonzero(inside == index)
            for start in range(0, len(places), _CHUNK_ROWS["cpu"]):
                part = places[start : start + _CHUNK_ROWS["cpu"]]
                with np.errstate(over="ignore"):  # as in `_floats`
                    result[part] = block.values[rows[part] - starts[index]]
        return result

    def merged_in_float32(self) -> bool:
        """Whether rows that differ become equal as float32. Digests every row of a type that float32 cannot hold."""
        wide = [block.values for block in self._blocks if not np.can_cast(block.values.dtype, np.float32)]
        return len(_distinct(wide)) > len(_distinct([values.astype(np.float32) for values in wide]))


def sample_ids(features: Features) -> NDArray[np.int64]:
    """(N,) the sample id of each row, in the order of the blocks."""
    return np.concatenate(features.collect(_samples))


def gather(features: Features, samples: NDArray[np.int64]) -> LocalFeatures:
    """Some rows, in this process. samples: their ids, each once."""
    values, cuts = features.rows(samples), range(_BLOCK_ROWS, len(samples), _BLOCK_ROWS)
    return LocalFeatures([Block(*part) for part in zip(np.split(samples, cuts), np.split(values, cuts), strict=True)])


def rows_by_label(labels: NDArray[np.integer], num_labels: int) -> list[NDArray[np.intp]]:
    """For each label below `num_labels`, where it stands, ascending."""
    return np.split(np.argsort(labels, kind="stable"), np.cumsum(np.bincount(labels, minlength=num_labels))[:-1])


class FeatureStats(NamedTuple):
    """Size and range of features. low, high: (D,) float32 smallest and largest value of each column."""

    num_rows: int
    low: NDArray[np.float32]
    high: NDArray[np.float32]


def feature_stats(features: Features) -> FeatureStats:
    """Measure features in one pass. Raises UserError naming sample ids if a value is NaN or infinite in float32."""
    num_rows, low, high, num_broken, examples = features.fold(_block_stats, combine=_join_stats)
    if num_broken:
        raise UserError(
            f"{num_broken} of {num_rows} rows of features hold values that are NaN or infinite in float32, first "
            f"samples {examples.tolist()}: leave them out; if a network computed them, it diverged (lower the learning "
            "rate, or train in fp32 or bf16)"
        )
    return FeatureStats(num_rows, low, high)


def check_labelled(values: NDArray[np.floating], labels: ArrayLike) -> NDArray[np.int64]:
    """Labels (N,) as int64; UserError unless values are (N, D), N >= 1, finite, and every row has a class >= 0."""
    classes = np.asarray(labels)
    if values.ndim != 2 or classes.shape != values.shape[:1] or not len(classes):
        raise UserError(f"features must be (N, D) with N labels, N >= 1; seen {values.shape} and {classes.shape}")
    if not np.issubdtype(classes.dtype, np.integer) or classes.min() < 0:
        raise UserError(
            f"every row needs a class, an integer >= 0; seen {classes.dtype} with "
            f"{int((~(classes >= 0)).sum())} of {len(classes)} missing. Leave rows without a label out"
        )
    broken = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if len(broken):
        raise UserError(f"{len(broken)} of {len(values)} rows are not finite, the first is row {broken[0]}")
    return classes.astype(np.int64)


def device() -> torch.device:
    """The device that computes on blocks: a GPU visible to this process, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def thread_map(function: Callable[[Any], T], items: Sequence[Any]) -> list[T]:
    """A `map` over as many threads as torch has. The caller works from the end, the pool from the start."""
    # Each thread computes with one thread of torch, so that they do not compete for cores. Setting its own count also
    # changes the count of threads started later, so it is restored.
    count, indices = torch.get_num_threads(), range(len(items))
    pool = _thread_pool(count - 1) if min(count, len(items)) > 1 else None
    futures = [pool.submit(_single_threaded, function, items, index) for index in indices] if pool else []
    try:
        if not futures:
            return [_single_threaded(function, items, index) for index in indices]
        return [
            _single_threaded(function, items, index) if futures[index].cancel() else futures[index].result()
            for index in reversed(indices)
        ][::-1]
    finally:
        for future in futures:
            if not future.cancel():
                future.exception()  # waits
        torch.set_num_threads(count)


@lru_cache(maxsize=1)
def _thread_pool(num_threads: int) -> ThreadPoolExecutor:
    """A pool that is kept: each thread that ends leaves some MB of memory behind."""
    return ThreadPoolExecutor(num_threads)


def _single_threaded(function: Callable[[Any], T], items: Sequence[Any], index: int) -> T:
    torch.set_num_threads(1)
    return function(items[index])


def _distinct(matrices: list[NDArray[Any]]) -> set[bytes]:
    """Digests of the distinct rows; adding 0 makes -0.0 and 0.0 equal."""
    zeroed = (values + values.dtype.type(0) for values in matrices)
    return {blake2b(row.tobytes(), digest_size=16).digest() for values in zeroed for row in values}


def _samples(block: Block) -> NDArray[np.int64]:
    return block.samples


def _split_block(block: Block) -> Iterator[Block]:
    size = _CHUNK_ROWS[device().type]
    for start in range(0, len(block.samples), size):
        part = slice(start, start + size)
        yield Block(block.samples[part], block.values[part])


def _floats(block: Block) -> Block:
    """A block as functions see it: float16 and float32 as they are, other types as float32."""
    if block.values.dtype in (np.float16, np.float32):
        return block
    with np.errstate(over="ignore"):  # `feature_stats` reports values that overflow
        return Block(block.samples, block.values.astype(np.float32))


def _fold_some(
    pieces: deque[Block],
    totals: SimpleQueue[list[T]],
    function: Callable[..., T],
    args: Any,
    combine: Callable[[T, T], T],
) -> None:
    """Fold pieces into any free total, until no piece is left."""
    while pieces:
        try:
            piece = pieces.popleft()
        except IndexError:
            return
        result = function(_floats(piece), *args)
        total = totals.get()
        try:
            total[:] = [combine(total[0], result)] if total else [result]
        finally:
            totals.put(total)


def _block_stats(block: Block) -> tuple[Any, ...]:
    values = block.values.astype(np.float32, copy=False)
    low, high = values.min(axis=0, initial=np.inf), values.max(axis=0, initial=-np.inf)
    if not len(values) or np.isfinite(low + high).all():
        return len(values), low, high, 0, block.samples[:0]
    broken = block.samples[~np.isfinite(values).all(axis=1)]
    return len(values), low, high, len(broken), np.sort(broken)[:_NUM_EXAMPLES]


def _join_stats(left: tuple[Any, ...], right: tuple[Any, ...]) -> tuple[Any, ...]:
    return (
        left[0] + right[0],
        np.minimum(left[1], right[1]),
        np.maximum(left[2], right[2]),
        left[3] + right[3],
        np.sort(np.concatenate([left[4], right[4]]))[:_NUM_EXAMPLES],
    )
