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
    inertia_scale,
    inertia_sum,
    means,
    merge,
    parts,
    select,
    spans,
    sum_scale,
    total,
)
from raycluster.clustering.kmeans import incremental
from raycluster.clustering.kmeans.init import (
    Init,
    check_init,
    initialize,
    pick_split_clusters,
    split_centroids,
    too_few,
)
from raycluster.clustering.kmeans.result import KMeans, unit_rows
from raycluster.clustering.search.assign import Engine, assign, resolve_engine
from raycluster.clustering.search.centroids import PreparedCentroids, prepare
from raycluster.clustering.search.rerank import squared_distances
from raycluster.features.matrix import FeatureStats, feature_stats
from raycluster.seeding import generator
from raycluster.types import Block, Features, UserError

# Heavy-ball momentum (Polyak 1964): half the steps to the same objective. Not from the first, which leaps from rows to
# means and would overshoot; and the last is Lloyd's, so that centroids are means of rows.
_MOMENTUM = 0.7
_FIRST_PLAIN = 2
_LAST_PLAIN = 1
_UNIT = 1e-6

_Found: TypeAlias = "tuple[list[tuple[NDArray[np.int64], NDArray[np.int32]]], int]"


class LloydState(NamedTuple):
    """All that the steps to come depend on, as a start of another call: the same result as if never interrupted.

    iteration: steps done. centroids, velocity: (K, D) float32. sizes: (K,) of the step before, or empty.
    """

    iteration: int
    centroids: NDArray[np.float32]
    velocity: NDArray[np.float32]
    sizes: NDArray[np.int64]
    inertia: list[float]
    num_repaired: int


class LloydProgress(NamedTuple):
    """One step. inertia: before it. changed: share of rows that got another label than before, 1 at first.

    rate: rows per second. state: to go on from.
    """

    iteration: int
    inertia: float
    changed: float
    seconds: float
    rate: float
    state: LloydState


def kmeans(
    features: Features,
    num_clusters: int,
    *,
    iterations: int = 20,
    seed: int = 0,
    init: Init | LloydState = "random",
    engine: Engine = "auto",
    plain: bool = False,
    spherical: bool = False,
    report: Callable[[LloydProgress], None] | None = None,
) -> KMeans:
    """Cluster rows by at most `iterations` steps (fewer at a fixed point), then one exact assignment.

    init: `random` distinct rows drawn by sample id; `k-means++` (its scalable form); (K, D) floats for centroids; or
    integer labels indexed by sample id (< 0: none), whose means are the start; or the `LloydState` of an earlier call with
    the same arguments, which goes on. Steps have guarded momentum; `plain` ones
    are Lloyd's, whose inertia never rises. spherical: rows and centroids are divided by their norm (Dhillon and Modha
    2001). Centroids and labels are bit-identical for any blocks in any order, and for any engine. A cluster that loses
    its rows takes over part of a large one (faiss's split); none is empty at the end.
    Raises UserError if values are not finite or there are fewer distinct rows than clusters.
    """
    if num_clusters < 1 or iterations < 0:
        raise UserError(f"num_clusters must be >= 1 and iterations >= 0; seen {num_clusters} and {iterations}")
    check_init(init)
    resolve_engine(engine)  # raises for an unknown one, and compiles the kernel before the first step is timed
    size = feature_stats(features)
    if size.num_rows < num_clusters:
        raise UserError(f"{size.num_rows} rows cannot fill {num_clusters} clusters; lower num_clusters or add rows")
    if spherical and features.fold(_unit_norm_error, combine=_largest)[0] > _UNIT:
        features = features.map(_project_to_sphere)
        size = feature_stats(features)
    context = LloydContext(features, size, engine, token_hex(8), _normalised if spherical else _unchanged)
    try:
        steps = _Steps(plain, iterations, seed, report)
        return _finish(context, _iterate(context, _initial_state(context, num_clusters, init, seed), steps))
    finally:
        features.fold(_forget, context.name)


def _unchanged(centroids: NDArray[np.float32]) -> NDArray[np.float32]:
    return centroids


def _normalised(centroids: NDArray[np.float32]) -> NDArray[np.float32]:
    return unit_rows(centroids)


@dataclass(frozen=True)
class LloydContext:
    """What stays the same from step to step. name: of this clustering, for what is kept where the rows are."""

    features: Features
    size: FeatureStats
    engine: Engine
    name: str
    project: Callable[[NDArray[np.float32]], NDArray[np.float32]]


def _initial_state(context: LloydContext, num_clusters: int, init: Init | LloydState, seed: int) -> LloydState:
    """A state that may be written over."""
    if isinstance(init, LloydState):
        return init._replace(centroids=init.centroids.copy(), velocity=init.velocity.copy())
    found = initialize(context.features, num_clusters, init, size=context.size, seed=seed, engine=context.engine)
    centroids = context.project(found[0])
    return LloydState(0, centroids, np.zeros_like(centroids), np.empty(0, np.int64), [], found[1])


class _Steps(NamedTuple):
    plain: bool
    iterations: int
    seed: int
    report: Callable[[LloydProgress], None] | None


class _Labelling(NamedTuple):
    """What rows are labelled and summed by. scale: of sums. unit: of squared distances. step: of the clustering."""

    prepared: PreparedCentroids
    scale: float
    unit: float
    engine: Engine
    name: str
    step: int


class StepPlan(NamedTuple):
    """How centroids are to move. sizes: (K,). momentum_mask: (K,) which keep their velocity. pairs: what `pick_split_clusters` gave."""

    sizes: NDArray[np.int64]
    momentum_mask: NDArray[np.bool_]
    pairs: list[tuple[int, int]]
    inertia: list[float]
    changed: float


def _iterate(context: LloydContext, state: LloydState, steps: _Steps) -> LloydState:
    """Steps one by one; centroids and velocity of the state are written over."""
    num_rows = context.size.num_rows
    for iteration in range(state.iteration, steps.iterations):
        began = time.perf_counter()
        plan = _advance(context, state, steps)
        # The new centroids lie where the velocity was, for rows may ask for the old ones until all have moved.
        velocity = np.subtract(state.velocity, state.centroids, out=state.centroids)
        centroids, moved = state.velocity, bool(velocity.any())
        _repair(context, centroids, velocity, plan.pairs)
        repaired = state.num_repaired + len(plan.pairs)
        state = LloydState(iteration + 1, centroids, velocity, plan.sizes, plan.inertia, repaired)
        seconds = time.perf_counter() - began
        if steps.report:
            kept = state._replace(centroids=centroids.copy(), velocity=velocity.copy())
            rate = num_rows / seconds
            steps.report(LloydProgress(iteration + 1, plan.inertia[-1], plan.changed, seconds, rate, kept))
        if not moved and not plan.pairs:
            break
    return state


def _advance(context: LloydContext, state: LloydState, steps: _Steps) -> StepPlan:
    """Write over the velocity with the means of rows and, with momentum, what lies beyond; centroids stay."""
    labelling = _labelling(context, state.centroids, state.iteration, _moved(state))
    first, *others = spans(len(state.centroids), context.features)
    if others:  # what a search needs and totals need not be there at the same time
        first, others = slice(0, 0), [first, *others]
    sums = _sums(context, _label_and_sum, labelling, first)
    plan = _plan_step(state, steps, labelling.unit, sums.others)
    _shift(context, state, labelling.scale, plan, first, sums.totals)
    labelling = labelling._replace(
        prepared=prepare(state.centroids)
    )  # searched again only where labels were lost: unpacked
    for span in others:
        del sums  # its totals make room for the next
        sums = _sums(context, _sum, labelling, span)
        _shift(context, state, labelling.scale, plan, span, sums.totals)
    return plan


def _labelling(
    context: LloydContext, centroids: NDArray[np.float32], step: int, moved: NDArray[np.int64] | None = None
) -> _Labelling:
    size = context.size
    unit = inertia_scale(size, centroids)
    return _Labelling(prepare(centroids, moved), sum_scale(size), unit, context.engine, context.name, step)


def _moved(state: LloydState) -> NDArray[np.int64] | None:
    """The centroids that the last step moved, if few; velocity does not show those that it gave to empty clusters."""
    known = state.iteration and state.sizes.all()
    return incremental.few(np.asarray(state.velocity.any(axis=1))) if known else None


def _sums(context: LloydContext, function: Callable[..., Sums], labelling: _Labelling, span: slice) -> ClusterSums:
    return total(context.features.fold(function, labelling, span, combine=merge))


def _plan_step(
    state: LloydState, steps: _Steps, unit: float, tallies: tuple[NDArray[np.int64], int, int, int]
) -> StepPlan:
    sizes, distance, changed, compared = tallies
    iteration, inertia = state.iteration, [*state.inertia, distance / unit]
    pairs = pick_split_clusters(sizes, generator(steps.seed, "kmeans split", iteration + 1))
    # Sizes that stay say that labels stay: what is left to do is to bring centroids to the means.
    rising, settled = inertia[-1] > min(inertia), np.array_equal(sizes, state.sizes)
    lloyds = iteration < _FIRST_PLAIN or iteration >= steps.iterations - _LAST_PLAIN
    momentum_mask = np.full(len(sizes), not (steps.plain or rising or settled or lloyds))
    momentum_mask[[cluster for pair in pairs for cluster in pair]] = False
    return StepPlan(sizes, momentum_mask, pairs, inertia, changed / compared if compared else 1.0)


def _shift(
    context: LloydContext, state: LloydState, scale: float, plan: StepPlan, span: slice, totals: NDArray[np.int64]
) -> None:
    """Write the new centroids of a span over its velocity."""
    for part, inner in parts(span):
        velocity, momentum_mask = state.velocity[part], plan.momentum_mask[part]
        updated = means(totals[inner], plan.sizes[part], scale, state.centroids[part])
        updated[momentum_mask] += velocity[momentum_mask] * np.float32(_MOMENTUM)
        velocity[:] = context.project(updated)


def _repair(
    context: LloydContext, centroids: NDArray[np.float32], velocity: NDArray[np.float32], pairs: list[tuple[int, int]]
) -> None:
    """Give each empty cluster half of another, in place. pairs: empty ones and who is halved for them."""
    if pairs:
        clusters = np.unique(pairs)
        split_centroids(centroids, pairs)
        centroids[clusters] = context.project(centroids[clusters])
        velocity[clusters] = 0


def _label_and_sum(block: Block, labelling: _Labelling, span: slice) -> Labelled:
    """Sums of the clusters of a span; and of all: sizes, squared distances, rows labelled anew, of so many known."""
    labels, changed, compared = _label(block, labelling)
    distance = inertia_sum(
        block.values, labels, labelling.unit, labelling.prepared.centroids, resolve_engine(labelling.engine) == "int8"
    )
    sizes = np.bincount(labels, minlength=len(labelling.prepared.centroids))
    return _labelled(block, labels, labelling, span, (sizes, distance, changed, compared))


def _sum(block: Block, labelling: _Labelling, span: slice) -> Labelled:
    """Sums of the clusters of a span."""
    return _labelled(block, _label(block, labelling)[0], labelling, span, ())


def _labelled(
    block: Block, labels: NDArray[np.int64], labelling: _Labelling, span: slice, others: tuple[Any, ...]
) -> Labelled:
    values, labels = select(block.values, labels, span)
    return Labelled(
        values, labels, span.stop - span.start, labelling.scale, resolve_engine(labelling.engine) == "int8", others
    )


def _label(block: Block, labelling: _Labelling) -> tuple[NDArray[np.int64], int, int]:
    """Labels of a block; how many are not those of the step before, and of how many that is known."""
    step, kept = row_cache.get(labelling.name, block.samples) or (None, None)
    before = None if kept is None else kept.astype(np.int64)
    if before is not None and step == labelling.step:
        return before, 0, 0
    if before is not None and step == labelling.step - 1 and labelling.prepared.moved is not None:
        labels = incremental.assign_again(block.values, labelling.prepared, labelling.engine, before)
    else:
        labels = assign(block.values, labelling.prepared, labelling.engine, before)
    row_cache.put(labelling.name, block.samples, (labelling.step, labels.astype(np.int32)))
    return (labels, 0, 0) if before is None else (labels, int(np.count_nonzero(labels != before)), len(labels))


def _finish(context: LloydContext, state: LloydState) -> KMeans:
    """Assign all rows; while clusters are empty, move them to the rows worst served and assign again.

    It ends: a centroid moved onto a row that no other centroid sits on can never become empty.
    """
    step, centroids, inertia, num_repaired = state.iteration, state.centroids, state.inertia, state.num_repaired
    moved = _moved(state)
    del state  # the labels take the room of the velocity
    while True:
        labelling = _labelling(context, centroids, step, moved)
        found, distance = context.features.fold(_assignments, labelling, combine=_join)
        unit = labelling.unit
        del labelling
        samples, labels = (np.concatenate(column) for column in zip(*found, strict=True))
        labels = labels[np.argsort(samples)].astype(np.int64)
        samples.sort()
        sizes = np.bincount(labels, minlength=len(centroids))
        empty = np.flatnonzero(sizes == 0)
        if not len(empty):
            inertia, engine = [*inertia, distance / unit], resolve_engine(context.engine)
            spherical = context.project is _normalised
            return KMeans(centroids, samples, labels, inertia, sizes, num_repaired, engine, spherical)
        centroids, num_moved = _move(context, centroids, empty)
        num_repaired, step, moved = num_repaired + num_moved, step + 1, None


def _move(
    context: LloydContext, centroids: NDArray[np.float32], empty: NDArray[np.intp]
) -> tuple[NDArray[np.float32], int]:
    """Centroids of empty clusters set on the rows that are farthest from theirs, and how many were."""
    found = context.features.collect(_distances, prepare(centroids), context.engine)
    samples, labels, distances = (np.concatenate(column) for column in zip(*found, strict=True))
    order = np.argsort(samples)
    far = _farthest_rows(labels[order], distances[order])[: len(empty)]
    if not len(far):
        raise UserError(too_few(context.features, len(centroids) - len(empty), len(centroids)))
    moved = centroids.copy()
    moved[empty[: len(far)]] = context.features.rows(samples[order][far])
    return moved, len(far)


def _assignments(block: Block, labelling: _Labelling) -> _Found:
    labels, _, _ = _label(block, labelling)
    distance = inertia_sum(
        block.values, labels, labelling.unit, labelling.prepared.centroids, resolve_engine(labelling.engine) == "int8"
    )
    return [(block.samples, labels.astype(np.int32))], distance


def _join(left: _Found, right: _Found) -> _Found:
    return left[0] + right[0], left[1] + right[1]


def _distances(
    block: Block, prepared: PreparedCentroids, engine: Engine
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    labels = assign(block.values, prepared, engine)
    return block.samples, labels, squared_distances(block.values, prepared.centroids, labels)


def _farthest_rows(labels: NDArray[np.int64], distances: NDArray[np.float64]) -> NDArray[np.intp]:
    """Rows off their centroid, the farthest first, no two alike (equal rows have equal label and distance)."""
    order = np.lexsort((labels, -distances))
    order = order[distances[order] > 0]
    alike = (np.diff(distances[order]) == 0) & (np.diff(labels[order]) == 0)
    distinct: NDArray[np.intp] = order[np.concatenate([[True], ~alike])[: len(order)]]
    return distinct


def _forget(block: Block, name: str) -> tuple[int]:
    row_cache.forget(name)
    return (0,)


def _project_to_sphere(block: Block) -> NDArray[np.float32]:
    return unit_rows(block.values)


def _unit_norm_error(block: Block) -> tuple[float]:
    """How far the norm of a row is from 1, at most; zero rows count as normalised."""
    squares = np.square(block.values, dtype=np.float64).sum(axis=1)
    return (float(np.abs(squares[squares > 0] - 1).max(initial=0.0)),)


def _largest(left: tuple[float], right: tuple[float]) -> tuple[float]:
    return (max(left[0], right[0]),)
