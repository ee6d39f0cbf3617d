"""One pass over all rows that answers what the solvers of all heads ask; only whole numbers come back."""

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

_ROWS = 256  # whose candidates are held at a time where they are not kept
_SAMPLED = 256
# Distances below the best score, 8 to an octave from 1/4 to 2^28.
GAPS = 2.0 ** (np.arange(-16, 8 * 28) / 8)

T = TypeVar("T")
Response: TypeAlias = "tuple[NDArray[np.int64], ...]"


class Query(NamedTuple):
    """What a solver wants to know of one head.

    `marginals` at place.scaling + shift: shares, slopes (K,), [value] (see `sinkhorn_kernel`). `product`: the
    derivative of the marginals there along `vector` (K,). `score_gap_histogram`: how many scores of about 250 rows, drawn by sample
    id, lie how far below the best of their row, and of how many rows. place_id, point: change with place, shift.
    kept: whether candidates and plan are kept where the rows are; if not, they are computed in every pass.
    """

    kind: Literal["marginals", "product", "gaps"]
    head: int
    place: CandidateWindow
    place_id: int
    kept: bool
    shift: NDArray[np.float64]
    point: int = 0
    negligible: float = 40.0
    scale: float = 1.0
    value_scale: float = 1.0
    vector: NDArray[np.float64] | None = None


class Passes:
    """Passes over features that answer what is asked of their heads. token: names what is kept of them."""

    def __init__(self, features: Features, heads: list[Classifier], token: str) -> None:
        self.features, self.heads, self.token = features, heads, token
        self._made: set[tuple[int, int]] = set()

    def answer(self, queries: list[Query]) -> list[Response]:
        """The answers, in one pass. Heads travel only where candidates must be made."""
        made = {(query.head, query.place_id) for query in queries if query.kept}
        travel = len(made) < len(queries) or not made <= self._made
        *found, lost = self._ask(queries, travel)
        if int(lost[0][0]):  # with a machine: its candidates are made again from what they depend on
            *found, lost = self._ask(queries, True)
        self._made |= made
        return found

    def _ask(self, queries: list[Query], travel: bool) -> tuple[Response, ...]:
        heads = self.heads if travel else None
        return self.features.fold(_answers, self.token, queries, heads, combine=_add)

    def gather(self, function: Callable[..., list[T]], queries: list[Query], *args: Any) -> list[T]:
        """`function(block, token, asks, heads, *args)` of pieces of the rows, in no certain order."""
        return self.features.fold(function, self.token, queries, self.heads, *args, combine=operator.add)

    def forget(self) -> None:
        """Free the memory of what was kept."""
        self.features.fold(_forget, self.token)


def _forget(block: Block, token: str) -> tuple[int]:
    row_cache.forget(token)
    return (0,)


def _add(left: tuple[Response, ...], right: tuple[Response, ...]) -> tuple[Response, ...]:
    return tuple(tuple(a + b for a, b in zip(*pair, strict=True)) for pair in zip(left, right, strict=True))


def _answers(block: Block, token: str, queries: list[Query], heads: list[Classifier] | None) -> tuple[Response, ...]:
    found, lost = [], 0
    for query in queries:
        head = None if heads is None else heads[query.head]
        if query.kind == "gaps":
            assert head is not None
            found.append(_score_gap_histogram(block, head, query.place, query.shift))
            continue
        total: Response | None = None
        for part in _plans(block, token, query, head):
            one = _sums(part, query)
            total = one if total is None else tuple(a + b for a, b in zip(total, one, strict=True))
        lost += total is None
        found.append(total or _nothing(query))
    return (*found, (np.array([lost]),))


class _Kept(NamedTuple):
    place_id: int
    candidates: Candidates
    point: int = -1
    plan: Plan | None = None


def chosen(block: Block, token: str, query: Query, head: Classifier | None) -> Iterator[Candidates]:
    """The candidates of a block, from those that are kept if they are of this place; none if they cannot be made."""
    found = _recall(block, token, query)
    if found:
        yield found.candidates
    elif head is not None and query.kept:
        _keep(block, token, query, None)
        made = candidates(block.values, head, query.place)
        _keep(block, token, query, _Kept(query.place_id, made))
        yield made
    elif head is not None:
        for start in range(0, max(len(block.values), 1), _ROWS):
            yield candidates(block.values[start : start + _ROWS], head, query.place)


def _plans(block: Block, token: str, query: Query, head: Classifier | None) -> Iterator[Plan]:
    found = _recall(block, token, query)
    if found and found.plan and found.point == query.point:
        yield found.plan
        return
    for part in chosen(block, token, query, head):
        made = plan(part, query.shift, query.negligible, query.value_scale)
        if query.kept:
            _keep(block, token, query, _Kept(query.place_id, part, query.point, made))
        yield made


def _recall(block: Block, token: str, query: Query) -> _Kept | None:
    found: _Kept | None = (row_cache.get(token, block.samples) or {}).get(query.head)
    return found if found and query.kept and found.place_id == query.place_id else None


def _keep(block: Block, token: str, query: Query, value: _Kept | None) -> None:
    row_cache.put(token, block.samples, {**(row_cache.get(token, block.samples) or {}), query.head: value})


def _sums(part: Plan, query: Query) -> Response:
    if query.vector is not None:
        return (product(part, query.vector, query.scale),)
    return (*marginals(part, len(query.shift), query.scale), np.array([part.value]))


def _nothing(query: Query) -> Response:
    zeros = np.zeros(len(query.shift), np.int64)
    return (zeros, zeros, np.zeros(1, np.int64)) if query.vector is None else (zeros,)


def _score_gap_histogram(
    block: Block, head: Classifier, place: CandidateWindow, shift: NDArray[np.float64]
) -> Response:
    """shift[0]: the number of rows in all."""
    drawn = block.samples.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(40)
    rows = block.values[drawn < _SAMPLED / shift[0] * 2**24]
    found = candidates(rows, head, place._replace(depth=np.inf))
    counts = np.bincount(np.searchsorted(GAPS, -found.score), minlength=len(GAPS) + 1)
    return counts, np.array([len(rows)])
