"""The N x D feature matrix, wherever its blocks lie: algorithms only fold, map and collect over it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, reduce
from queue import SimpleQueue
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from raycluster.types import Block, Features, UserError

T = TypeVar("T")

_CHUNK_ROWS = {"cpu": 2048, "cuda": 1 << 16}  # so many that starting kernels on a GPU takes little of the time
# Threads that share one total: combining is short beside computing, and totals may be large.
_THREADS_PER_TOTAL = 4
_NUM_EXAMPLES = 5
_MIN_MEMORY_BUDGET = 2 * 2**20


def add(left: Any, right: Any) -> Any:
    """The usual ``combine``: tuples of numbers or arrays, added element by element."""
    return tuple(a + b for a, b in zip(left, right, strict=True))


class LocalFeatures:
    """Features whose blocks lie in this process; as many threads as torch has share the blocks out.

    Blocks may hold any real numbers; they become floats where they are used, so memory stays what it was. Raises
    UserError if there are no rows, if blocks disagree about D, or if a sample id occurs twice.
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
        """All sample ids, ascending, and the rows they belong to, None if they are in order. Not worth its memory."""
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
        _thread_map(lambda _: _fold_some(pieces, totals, function, args, combine), range(threads))
        return reduce(combine, [total for _ in range(num_totals) for total in totals.get()])

    def map(self, function: Callable[..., NDArray[np.floating]], *args: Any) -> LocalFeatures:
        """See `Features.map`."""
        values = self.collect(function, *args)
        return LocalFeatures([Block(b.samples, new) for b, new in zip(self._blocks, values, strict=True)])

    def collect(self, function: Callable[..., T], *args: Any) -> list[T]:
        """See `Features.collect`."""
        return _thread_map(lambda block: function(_floats(block), *args), self._blocks)

    def map_jobs(self, function: Callable[..., T], jobs: Sequence[tuple[Any, ...]]) -> list[T]:
        """See `Features.map_jobs`."""
        return [function(self, *job) for job in jobs]

    def rows(self, samples: NDArray[np.int64]) -> NDArray[np.float32]:
        """See `Features.rows`. Raises UserError for an unknown sample id."""
        known, order = self._index()
        place = np.searchsorted(known, samples).clip(max=self.num_rows - 1)
        unknown = np.asarray(samples)[known[place] != samples]
        if len(unknown):
            raise UserError(f"no features of sample {unknown[0]} ({len(unknown)} such samples): were they extracted?")
        starts = np.cumsum([0] + [len(block.samples) for block in self._blocks])
        where = place if order is None else order[place]
        result = np.empty((len(where), self.dim), np.float32)
        for index, block in enumerate(self._blocks):
            mine = np.flatnonzero((where >= starts[index]) & (where < starts[index + 1]))
            for part in np.array_split(mine, -(-len(mine) // _CHUNK_ROWS["cpu"]) or 1):
                result[part] = _floats(Block(block.samples, block.values[where[part] - starts[index]])).values
        return result


class FeatureStats(NamedTuple):
    """Size and range of features. low, high: (D,) float32 smallest and largest value of each column."""

    num_rows: int
    low: NDArray[np.float32]
    high: NDArray[np.float32]


def feature_stats(features: Features) -> FeatureStats:
    """Measure features in one pass; UserError naming sample ids if a value is NaN or infinite."""
    num_rows, low, high, num_broken, examples = features.fold(_survey, combine=_join_surveys)
    if num_broken:
        raise UserError(
            f"{num_broken} of {num_rows} rows of features hold NaN or infinite values, first samples "
            f"{examples.tolist()}: the network diverged (lower the learning rate, or train in fp32 or bf16)"
        )
    return FeatureStats(num_rows, low, high)


def check_labelled(values: NDArray[np.floating], labels: ArrayLike) -> NDArray[np.int64]:
    """Labels (N,) as int64; UserError unless values are (N, D), N >= 1, finite, and every row has a class >= 0."""
    classes = np.asarray(labels)
    if values.ndim != 2 or classes.shape != values.shape[:1] or not len(classes):
        raise UserError(f"features must be (N, D) with N labels, N >= 1; seen {values.shape} and {classes.shape}")
    if not np.issubdtype(classes.dtype, np.integer) or classes.min() < 0:
        raise UserError(
            f"every row needs a class that is a whole number >= 0; seen {classes.dtype} with "
            f"{int((~(classes >= 0)).sum())} of {len(classes)} missing. Leave rows without a label out"
        )
    broken = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if len(broken):
        raise UserError(f"{len(broken)} of {len(values)} rows are not finite, the first is row {broken[0]}")
    return classes.astype(np.int64)


def device() -> torch.device:
    """Where kernels on blocks compute: the GPU this process may see, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _thread_map(function: Callable[[Any], T], items: Sequence[Any]) -> list[T]:
    """A `map` over as many threads as torch has. This one works from the end, those of the pool from the start."""
    # The products inside a kernel run on one thread each, so the threads do not fight for cores. A thread that sets its
    # own count also changes the count of threads born later, hence the restoring.
    count, places = torch.get_num_threads(), range(len(items))
    pool = _thread_pool(count - 1) if min(count, len(items)) > 1 else None
    futures = [pool.submit(_single_threaded, function, items, place) for place in places] if pool else []
    try:
        if not futures:
            return [_single_threaded(function, items, place) for place in places]
        return [
            _single_threaded(function, items, place) if futures[place].cancel() else futures[place].result()
            for place in reversed(places)
        ][::-1]
    finally:
        for future in futures:
            if not future.cancel():
                future.exception()  # waits
        torch.set_num_threads(count)


@lru_cache(maxsize=1)
def _thread_pool(num_threads: int) -> ThreadPoolExecutor:
    """Threads that stay: those that come and go leave memory behind, each some MB."""
    return ThreadPoolExecutor(num_threads)


def _single_threaded(function: Callable[[Any], T], items: Sequence[Any], place: int) -> T:
    torch.set_num_threads(1)
    return function(items[place])


def _split_block(block: Block) -> Iterator[Block]:
    size = _CHUNK_ROWS[device().type]
    for start in range(0, len(block.samples), size):
        part = slice(start, start + size)
        yield Block(block.samples[part], block.values[part])


def _floats(block: Block) -> Block:
    """What functions are given: float16 and float32 as they are, else float32, of the rows in use only."""
    if block.values.dtype in (np.float16, np.float32):
        return block
    with np.errstate(over="ignore"):  # becomes infinite, and is named as such
        return Block(block.samples, block.values.astype(np.float32))


def _fold_some(
    pieces: deque[Block],
    totals: SimpleQueue[list[T]],
    function: Callable[..., T],
    args: Any,
    combine: Callable[[T, T], T],
) -> None:
    """Fold pieces into whichever total is free, until no piece is left."""
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


def _survey(block: Block) -> tuple[Any, ...]:
    values = block.values.astype(np.float32, copy=False)
    low, high = values.min(axis=0, initial=np.inf), values.max(axis=0, initial=-np.inf)
    if not len(values) or np.isfinite(low + high).all():
        return len(values), low, high, 0, block.samples[:0]
    broken = block.samples[~np.isfinite(values).all(axis=1)]
    return len(values), low, high, len(broken), np.sort(broken)[:_NUM_EXAMPLES]


def _join_surveys(left: tuple[Any, ...], right: tuple[Any, ...]) -> tuple[Any, ...]:
    return (
        left[0] + right[0],
        np.minimum(left[1], right[1]),
        np.maximum(left[2], right[2]),
        left[3] + right[3],
        np.sort(np.concatenate([left[4], right[4]]))[:_NUM_EXAMPLES],
    )
