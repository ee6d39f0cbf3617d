"""K-means (Lloyd 1982; Caron et al. 2018) in fewer and faster iterations, the same bits however rows are dealt out."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from secrets import token_hex
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from raycluster.clustering import row_cache
from raycluster.clustering.fixed_point import (
    ClusterSums,
    Labelled,
    Sums,
    means,
    merge,
    parts,
    select,
    spans,
    spread,
    spread_scale,
    sum_scale,
    total,
)
from raycluster.clustering.kmeans import incremental
from raycluster.clustering.kmeans.init import Init, donors, halve, start, too_few
from raycluster.clustering.kmeans.result import KMeans, unit_rows
from raycluster.clustering.search.assign import Engine, assign, choose
from raycluster.clustering.search.centroids import Target, prepare
from raycluster.clustering.search.rerank import squared_distances
from raycluster.features.matrix import Extent, Features, extent
from raycluster.seeding import generator
from raycluster.types import Block, UserError

# Heavy-ball momentum (Polyak 1964): half the steps to the same objective. Not from the first, which leaps from rows to
# means and would overshoot; and the last is Lloyd's, so that centroids are means of rows.
_MOMENTUM = 0.7
_FIRST_PLAIN = 2
_LAST_PLAIN = 1
_UNIT = 1e-6

_Found: TypeAlias = "tuple[list[tuple[NDArray[np.int64], NDArray[np.int32]]], int]"


class State(NamedTuple):
    """All that the steps to come depend on, as a start of another call: the same result as if never interrupted.

    iteration: steps done. centroids, velocity: (K, D) float32. sizes: (K,) of the step before, or empty.
    """

    iteration: int
    centroids: NDArray[np.float32]
    velocity: NDArray[np.float32]
    sizes: NDArray[np.int64]
    inertia: list[float]
    num_repaired: int


class Progress(NamedTuple):
    """One step. inertia: before it. changed: share of rows that got another label than before, 1 at first.

    rate: rows per second. state: to go on from.
    """

    iteration: int
    inertia: float
    changed: float
    seconds: float
    rate: float
    state: State


def kmeans(
    features: Features,
    num_clusters: int,
    *,
    iterations: int = 20,
    seed: int = 0,
    init: Init | State = "random",
    engine: Engine = "auto",
    plain: bool = False,
    spherical: bool = False,
    report: Callable[[Progress], None] | None = None,
) -> KMeans:
    """Cluster rows by at most `iterations` steps (fewer at a fixed point), then one exact assignment.

    init: `random` distinct rows drawn by sample id; `k-means++` (its scalable form); (K, D) floats for centroids; or
    integer labels indexed by sample id (< 0: none), whose means are the start; or the `State` of an earlier call with
    the same arguments, which goes on. Steps have guarded momentum; `plain` ones
    are Lloyd's, whose inertia never rises. spherical: rows and centroids are divided by their norm (Dhillon and Modha
    2001). Centroids and labels are bit-identical for any blocks in any order, and for any engine. A cluster that loses
    its rows takes over part of a large one (faiss's split); none is empty at the end.
    Raises UserError if values are not finite or there are fewer distinct rows than clusters.
    """
    if num_clusters < 1 or iterations < 0:
        raise UserError(f"num_clusters must be >= 1 and iterations >= 0; seen {num_clusters} and {iterations}")
    size = extent(features)
    if size.num_rows < num_clusters:
        raise UserError(f"{size.num_rows} rows cannot fill {num_clusters} clusters; lower num_clusters or add images")
    if spherical and features.fold(_off_unit, combine=_largest)[0] > _UNIT:
        features = features.map(_on_sphere)
        size = extent(features)
    descent = _Descent(features, size, engine, token_hex(8), _normalised if spherical else _unchanged)
    try:
        steps = _Steps(plain, iterations, seed, report)
        return _finish(descent, _iterate(descent, _begin(descent, num_clusters, init, seed), steps))
    finally:
        features.fold(_forget, descent.name)


def _unchanged(centroids: NDArray[np.float32]) -> NDArray[np.float32]:
    return centroids


def _normalised(centroids: NDArray[np.float32]) -> NDArray[np.float32]:
    return unit_rows(centroids)


@dataclass(frozen=True)
class _Descent:
    """What stays the same from step to step. name: of this clustering, for what is kept where the rows are."""

    features: Features
    size: Extent
    engine: Engine
    name: str
    project: Callable[[NDArray[np.float32]], NDArray[np.float32]]


def _begin(descent: _Descent, num_clusters: int, init: Init | State, seed: int) -> State:
    """A state that may be written over."""
    if isinstance(init, State):
        return init._replace(centroids=init.centroids.copy(), velocity=init.velocity.copy())
    found = start(descent.features, num_clusters, init, size=descent.size, seed=seed, engine=descent.engine)
    centroids = descent.project(found[0])
    return State(0, centroids, np.zeros_like(centroids), np.empty(0, np.int64), [], found[1])


class _Steps(NamedTuple):
    plain: bool
    iterations: int
    seed: int
    report: Callable[[Progress], None] | None


class _Task(NamedTuple):
    """What rows are labelled and summed by. scale: of sums. unit: of squared distances. step: of the clustering."""

    target: Target
    scale: float
    unit: float
    engine: Engine
    name: str
    step: int


class _Pace(NamedTuple):
    """How centroids are to move. sizes: (K,). swings: (K,) which keep their velocity. pairs: what `donors` gave."""

    sizes: NDArray[np.int64]
    swings: NDArray[np.bool_]
    pairs: list[tuple[int, int]]
    inertia: list[float]
    changed: float


def _iterate(descent: _Descent, state: State, steps: _Steps) -> State:
    """Steps one by one; centroids and velocity of the state are written over."""
    num_rows = descent.size.num_rows
    for iteration in range(state.iteration, steps.iterations):
        began = time.perf_counter()
        pace = _advance(descent, state, steps)
        # The new centroids lie where the velocity was, for rows may ask for the old ones until all have moved.
        velocity = np.subtract(state.velocity, state.centroids, out=state.centroids)
        centroids, moved = state.velocity, bool(velocity.any())
        _repair(descent, centroids, velocity, pace.pairs)
        repaired = state.num_repaired + len(pace.pairs)
        state = State(iteration + 1, centroids, velocity, pace.sizes, pace.inertia, repaired)
        seconds = time.perf_counter() - began
        if steps.report:
            kept = state._replace(centroids=centroids.copy(), velocity=velocity.copy())
            rate = num_rows / seconds
            steps.report(Progress(iteration + 1, pace.inertia[-1], pace.changed, seconds, rate, kept))
        if not moved and not pace.pairs:
            break
    return state


def _advance(descent: _Descent, state: State, steps: _Steps) -> _Pace:
    """Write over the velocity with the means of rows and, with momentum, what lies beyond; centroids stay."""
    task = _task(descent, state.centroids, state.iteration, _moved(state))
    first, *others = spans(len(state.centroids), descent.features)
    if others:  # what a search needs and totals need not be there at the same time
        first, others = slice(0, 0), [first, *others]
    sums = _sums(descent, _label_and_sum, task, first)
    pace = _pace(state, steps, task.unit, sums.others)
    _shift(descent, state, task.scale, pace, first, sums.totals)
    task = task._replace(target=prepare(state.centroids))  # searched again only where labels were lost: unpacked
    for span in others:
        del sums  # its totals make room for the next
        sums = _sums(descent, _sum, task, span)
        _shift(descent, state, task.scale, pace, span, sums.totals)
    return pace


def _task(
    descent: _Descent, centroids: NDArray[np.float32], step: int, moved: NDArray[np.int64] | None = None
) -> _Task:
    size = descent.size
    unit = spread_scale(size, centroids)
    return _Task(prepare(centroids, moved), sum_scale(size), unit, descent.engine, descent.name, step)


def _moved(state: State) -> NDArray[np.int64] | None:
    """The centroids that the last step moved, if few; velocity does not show those that it gave to empty clusters."""
    known = state.iteration and state.sizes.all()
    return incremental.few(np.asarray(state.velocity.any(axis=1))) if known else None


def _sums(descent: _Descent, function: Callable[..., Sums], task: _Task, span: slice) -> ClusterSums:
    return total(descent.features.fold(function, task, span, combine=merge))


def _pace(state: State, steps: _Steps, unit: float, tallies: tuple[NDArray[np.int64], int, int, int]) -> _Pace:
    sizes, apart, changed, compared = tallies
    iteration, inertia = state.iteration, [*state.inertia, apart / unit]
    pairs = donors(sizes, generator(steps.seed, "kmeans split", iteration + 1))
    # Sizes that stay say that labels stay: what is left to do is to bring centroids to the means.
    rising, settled = inertia[-1] > min(inertia), np.array_equal(sizes, state.sizes)
    lloyds = iteration < _FIRST_PLAIN or iteration >= steps.iterations - _LAST_PLAIN
    swings = np.full(len(sizes), not (steps.plain or rising or settled or lloyds))
    swings[[cluster for pair in pairs for cluster in pair]] = False
    return _Pace(sizes, swings, pairs, inertia, changed / compared if compared else 1.0)


def _shift(descent: _Descent, state: State, scale: float, pace: _Pace, span: slice, totals: NDArray[np.int64]) -> None:
    """Write the new centroids of a span over its velocity."""
    for part, inner in parts(span):
        velocity, swings = state.velocity[part], pace.swings[part]
        updated = means(totals[inner], pace.sizes[part], scale, state.centroids[part])
        updated[swings] += velocity[swings] * np.float32(_MOMENTUM)
        velocity[:] = descent.project(updated)


def _repair(
    descent: _Descent, centroids: NDArray[np.float32], velocity: NDArray[np.float32], pairs: list[tuple[int, int]]
) -> None:
    """Give each empty cluster half of another, in place. pairs: empty ones and who is halved for them."""
    if pairs:
        clusters = np.unique(pairs)
        halve(centroids, pairs)
        centroids[clusters] = descent.project(centroids[clusters])
        velocity[clusters] = 0


def _label_and_sum(block: Block, task: _Task, span: slice) -> Labelled:
    """Sums of the clusters of a span; and of all: sizes, squared distances, rows labelled anew, of so many known."""
    labels, changed, compared = _label(block, task)
    apart = spread(block.values, labels, task.unit, task.target.centroids, choose(task.engine) == "int8")
    sizes = np.bincount(labels, minlength=len(task.target.centroids))
    return _labelled(block, labels, task, span, (sizes, apart, changed, compared))


def _sum(block: Block, task: _Task, span: slice) -> Labelled:
    """Sums of the clusters of a span."""
    return _labelled(block, _label(block, task)[0], task, span, ())


def _labelled(block: Block, labels: NDArray[np.int64], task: _Task, span: slice, others: tuple[Any, ...]) -> Labelled:
    values, labels = select(block.values, labels, span)
    return Labelled(values, labels, span.stop - span.start, task.scale, choose(task.engine) == "int8", others)


def _label(block: Block, task: _Task) -> tuple[NDArray[np.int64], int, int]:
    """Labels of a block; how many are not those of the step before, and of how many that is known."""
    step, kept = row_cache.recall(task.name, block.samples) or (None, None)
    before = None if kept is None else kept.astype(np.int64)
    if before is not None and step == task.step:
        return before, 0, 0
    if before is not None and step == task.step - 1 and task.target.moved is not None:
        labels = incremental.assign_again(block.values, task.target, task.engine, before)
    else:
        labels = assign(block.values, task.target, task.engine, before)
    row_cache.keep(task.name, block.samples, (task.step, labels.astype(np.int32)))
    return (labels, 0, 0) if before is None else (labels, int(np.count_nonzero(labels != before)), len(labels))


def _finish(descent: _Descent, state: State) -> KMeans:
    """Assign all rows; while clusters are empty, move them to the rows worst served and assign again.

    It ends: a centroid moved onto a row that no other centroid sits on can never become empty.
    """
    step, centroids, inertia, num_repaired = state.iteration, state.centroids, state.inertia, state.num_repaired
    moved = _moved(state)
    del state  # the labels take the room of the velocity
    while True:
        task = _task(descent, centroids, step, moved)
        found, apart = descent.features.fold(_assignments, task, combine=_join)
        unit = task.unit
        del task
        samples, labels = (np.concatenate(column) for column in zip(*found, strict=True))
        labels = labels[np.argsort(samples)].astype(np.int64)
        samples.sort()
        sizes = np.bincount(labels, minlength=len(centroids))
        empty = np.flatnonzero(sizes == 0)
        if not len(empty):
            inertia, engine = [*inertia, apart / unit], choose(descent.engine)
            spherical = descent.project is _normalised
            return KMeans(centroids, samples, labels, inertia, sizes, num_repaired, engine, spherical)
        centroids, num_moved = _move(descent, centroids, empty)
        num_repaired, step, moved = num_repaired + num_moved, step + 1, None


def _move(
    descent: _Descent, centroids: NDArray[np.float32], empty: NDArray[np.intp]
) -> tuple[NDArray[np.float32], int]:
    """Centroids of empty clusters set on the rows that are farthest from theirs, and how many were."""
    found = descent.features.collect(_distances, prepare(centroids), descent.engine)
    samples, labels, distances = (np.concatenate(column) for column in zip(*found, strict=True))
    order = np.argsort(samples)
    far = _worst_served(labels[order], distances[order])[: len(empty)]
    if not len(far):
        raise UserError(too_few(len(centroids) - len(empty), len(centroids)))
    moved = centroids.copy()
    moved[empty[: len(far)]] = descent.features.rows(samples[order][far])
    return moved, len(far)


def _assignments(block: Block, task: _Task) -> _Found:
    labels, _, _ = _label(block, task)
    apart = spread(block.values, labels, task.unit, task.target.centroids, choose(task.engine) == "int8")
    return [(block.samples, labels.astype(np.int32))], apart


def _join(left: _Found, right: _Found) -> _Found:
    return left[0] + right[0], left[1] + right[1]


def _distances(
    block: Block, target: Target, engine: Engine
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    labels = assign(block.values, target, engine)
    return block.samples, labels, squared_distances(block.values, target.centroids, labels)


def _worst_served(labels: NDArray[np.int64], distances: NDArray[np.float64]) -> NDArray[np.intp]:
    """Rows off their centroid, the farthest first, no two alike (equal rows have equal label and distance)."""
    order = np.lexsort((labels, -distances))
    order = order[distances[order] > 0]
    alike = (np.diff(distances[order]) == 0) & (np.diff(labels[order]) == 0)
    distinct: NDArray[np.intp] = order[np.concatenate([[True], ~alike])[: len(order)]]
    return distinct


def _forget(block: Block, name: str) -> tuple[int]:
    row_cache.forget(name)
    return (0,)


def _on_sphere(block: Block) -> NDArray[np.float32]:
    return unit_rows(block.values)


def _off_unit(block: Block) -> tuple[float]:
    """How far the norm of a row is from 1, at most; zero rows count as normalised."""
    squares = np.square(block.values, dtype=np.float64).sum(axis=1)
    return (float(np.abs(squares[squares > 0] - 1).max(initial=0.0)),)


def _largest(left: tuple[float], right: tuple[float]) -> tuple[float]:
    return (max(left[0], right[0]),)
