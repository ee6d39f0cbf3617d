"""Passes over all rows that answer the queries of all heads; results are integers, so exact in any order."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from raycluster.clustering import row_cache
from raycluster.clustering.sinkhorn.native import candidates, marginals, plan, product
from raycluster.clustering.sinkhorn.sparse import Candidates, CandidateWindow, Classifier, Plan
from raycluster.types import Block, Features

_ROWS = 256  # per chunk where candidates are not kept
_SAMPLED = 256
# Distances below the best score, 8 to an octave from 1/4 to 2^28.
GAPS = 2.0 ** (np.arange(-16, 8 * 28) / 8)

T = TypeVar("T")
Response: TypeAlias = "tuple[NDArray[np.int64], ...]"


class Query(NamedTuple):
    """A solver's query about one head.

    `marginals` at window.scaling + shift: shares, slopes (K,), [value] (see `native`). `product`: the
    derivative of the marginals there along `vector` (K,). `gaps`: histogram of the gaps of scores to the best of their
    row, of about 250 rows drawn by sample id, and the number of rows. window_id, point: change with window, shift.
    kept: whether candidates and plan are kept in the row cache; if not, they are computed in every pass.
    """

    kind: Literal["marginals", "product", "gaps"]
    head: int
    window: CandidateWindow
    window_id: int
    kept: bool
    shift: NDArray[np.float64]
    point: int = 0
    negligible: float = 40.0
    scale: float = 1.0
    value_scale: float = 1.0
    vector: NDArray[np.float64] | None = None


class Passes:
    """Passes over features that answer queries about heads. token: names their values in the row cache."""

    def __init__(self, features: Features, heads: list[Classifier], token: str) -> None:
        self.features, self.heads, self.token = features, heads, token
        self._cached_windows: set[tuple[int, int]] = set()

    def answer(self, queries: list[Query]) -> list[Response]:
        """The answers, in one pass. Heads are sent only where candidates must be computed."""
        cached = {(query.head, query.window_id) for query in queries if query.kept}
        send_heads = len(cached) < len(queries) or not cached <= self._cached_windows
        *found, lost = self._fold_queries(queries, send_heads)
        if int(lost[0][0]):  # evicted, or lost with a machine: compute candidates again
            *found, lost = self._fold_queries(queries, True)
        self._cached_windows |= cached
        return found

    def _fold_queries(self, queries: list[Query], send_heads: bool) -> tuple[Response, ...]:
        heads = self.heads if send_heads else None
        return self.features.fold(_responses, self.token, queries, heads, combine=_add)

    def gather(self, function: Callable[..., list[T]], queries: list[Query], *args: Any) -> list[T]:
        """`function(block, token, queries, heads, *args)` of pieces of the rows, in any order."""
        return self.features.fold(function, self.token, queries, self.heads, *args, combine=operator.add)

    def clear(self) -> None:
        """Evict the values of these passes from the row cache."""
        self.features.fold(_clear_cache, self.token)


def _clear_cache(block: Block, token: str) -> tuple[int]:
    row_cache.clear(token)
    return (0,)


def _add(left: tuple[Response, ...], right: tuple[Response, ...]) -> tuple[Response, ...]:
    return tuple(tuple(a + b for a, b in zip(*pair, strict=True)) for pair in zip(left, right, strict=True))


def _responses(block: Block, token: str, queries: list[Query], heads: list[Classifier] | None) -> tuple[Response, ...]:
    found, lost = [], 0
    for query in queries:
        head = None if heads is None else heads[query.head]
        if query.kind == "gaps":
            assert head is not None
            found.append(_score_gap_histogram(block, head, query.window, query.shift))
            continue
        total: Response | None = None
        for part in _plans(block, token, query, head):
            one = _sums(part, query)
            total = one if total is None else tuple(a + b for a, b in zip(total, one, strict=True))
        lost += total is None
        found.append(total or _zeros(query))
    return (*found, (np.array([lost]),))


class _CachedPlan(NamedTuple):
    window_id: int
    candidates: Candidates
    point: int = -1
    plan: Plan | None = None


def block_candidates(block: Block, token: str, query: Query, head: Classifier | None) -> Iterator[Candidates]:
    """The candidates of a block, cached ones if they are of this window; none without a head to compute them."""
    found = _cache_get(block, token, query)
    if found:
        yield found.candidates
    elif head is not None and query.kept:
        _cache_put(block, token, query, None)
        cached = candidates(block.values, head, query.window)
        _cache_put(block, token, query, _CachedPlan(query.window_id, cached))
        yield cached
    elif head is not None:
        for start in range(0, max(len(block.values), 1), _ROWS):
            yield candidates(block.values[start : start + _ROWS], head, query.window)


def _plans(block: Block, token: str, query: Query, head: Classifier | None) -> Iterator[Plan]:
    found = _cache_get(block, token, query)
    if found and found.plan and found.point == query.point:
        yield found.plan
        return
    for part in block_candidates(block, token, query, head):
        cached = plan(part, query.shift, query.negligible, query.value_scale)
        if query.kept:
            _cache_put(block, token, query, _CachedPlan(query.window_id, part, query.point, cached))
        yield cached


def _cache_get(block: Block, token: str, query: Query) -> _CachedPlan | None:
    found: _CachedPlan | None = (row_cache.get(token, block.samples) or {}).get(query.head)
    return found if found and query.kept and found.window_id == query.window_id else None


def _cache_put(block: Block, token: str, query: Query, value: _CachedPlan | None) -> None:
    row_cache.put(token, block.samples, {**(row_cache.get(token, block.samples) or {}), query.head: value})


def _sums(part: Plan, query: Query) -> Response:
    if query.vector is not None:
        return (product(part, query.vector, query.scale),)
    return (*marginals(part, len(query.shift), query.scale), np.array([part.value]))


def _zeros(query: Query) -> Response:
    zeros = np.zeros(len(query.shift), np.int64)
    return (zeros, zeros, np.zeros(1, np.int64)) if query.vector is None else (zeros,)


def _score_gap_histogram(
    block: Block, head: Classifier, window: CandidateWindow, shift: NDArray[np.float64]
) -> Response:
    """shift[0]: the total number of rows."""
    drawn = block.samples.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(40)
    rows = block.values[drawn < _SAMPLED / shift[0] * 2**24]
    found = candidates(rows, head, window._replace(depth=np.inf))
    counts = np.bincount(np.searchsorted(GAPS, -found.score), minlength=len(GAPS) + 1)
    return counts, np.array([len(rows)])
