"""K-means (Lloyd 1982) with guarded momentum, bitwise identical for any partition of the rows into blocks."""

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
    PendingRows,
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

# Heavy-ball momentum (Polyak 1964) halves the steps to the same inertia. The first steps, from rows to means, are so
# large that it would overshoot; the last is plain, so that centroids are means of rows.
_MOMENTUM = 0.7
_FIRST_PLAIN = 2
_LAST_PLAIN = 1
_UNIT = 1e-6

_Found: TypeAlias = "tuple[list[tuple[NDArray[np.int64], NDArray[np.int32]]], int]"


class LloydState(NamedTuple):
    """All that later steps depend on. A call that resumes from it ends with a bitwise identical result.

    iteration: steps done. centroids, velocity: (K, D) float32. sizes: (K,) of the previous step, or empty.
    """

    iteration: int
    centroids: NDArray[np.float32]
    velocity: NDArray[np.float32]
    sizes: NDArray[np.int64]
    inertia: list[float]
    num_repaired: int


class LloydProgress(NamedTuple):
    """One step. inertia: before it, in squared units of the rows. changed: share of rows with a new label, 1 at first.

    seconds: of the step. rate: rows per second. state: to resume from.
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

    init: `random` distinct rows drawn by sample id; `k-means++` (its scalable form); (K, D) floats for centroids;
    integer labels indexed by sample id (< 0: none), whose means are the start; or the `LloydState` of an earlier call
    with the same arguments. Steps have guarded momentum; with `plain` they are Lloyd's, whose inertia never rises.
    spherical: rows and centroids are divided by their norm (Dhillon and Modha 2001). Centroids and labels are bitwise
    identical for any blocks in any order, and for any engine. An empty cluster takes over part of a large one (faiss's
    split); none is empty at the end.
    Raises UserError if values are not finite or there are fewer distinct rows than clusters.
    """
    if num_clusters < 1 or iterations < 0:
        raise UserError(f"num_clusters must be >= 1 and iterations >= 0; seen {num_clusters} and {iterations}")
    check_init(init)
    resolve_engine(engine)  # raises for an unknown one, and compiles the kernel before the first step is timed
    stats = feature_stats(features)
    if stats.num_rows < num_clusters:
        raise UserError(f"{stats.num_rows} rows cannot fill {num_clusters} clusters; lower num_clusters or add rows")
    if spherical and features.fold(_unit_norm_error, combine=_largest)[0] > _UNIT:
        features = features.map(_project_to_sphere)
        stats = feature_stats(features)
    context = LloydContext(features, stats, engine, token_hex(8), _normalised if spherical else _unchanged)
    try:
        steps = _StepOptions(plain, iterations, seed, report)
        return _finish(context, _iterate(context, _initial_state(context, num_clusters, init, seed), steps))
    finally:
        features.fold(_clear_cache, context.name)


def _unchanged(centroids: NDArray[np.float32]) -> NDArray[np.float32]:
    return centroids


def _normalised(centroids: NDArray[np.float32]) -> NDArray[np.float32]:
    return unit_rows(centroids)


@dataclass(frozen=True)
class LloydContext:
    """What all steps share. name: of this clustering, for what is snapshot where the rows are."""

    features: Features
    stats: FeatureStats
    engine: Engine
    name: str
    project: Callable[[NDArray[np.float32]], NDArray[np.float32]]


def _initial_state(context: LloydContext, num_clusters: int, init: Init | LloydState, seed: int) -> LloydState:
    """A state that may be modified in place."""
    if isinstance(init, LloydState):
        return init._replace(centroids=init.centroids.copy(), velocity=init.velocity.copy())
    found = initialize(context.features, num_clusters, init, stats=context.stats, seed=seed, engine=context.engine)
    centroids = context.project(found[0])
    return LloydState(0, centroids, np.zeros_like(centroids), np.empty(0, np.int64), [], found[1])


class _StepOptions(NamedTuple):
    plain: bool
    iterations: int
    seed: int
    report: Callable[[LloydProgress], None] | None


class _AssignParams(NamedTuple):
    """Arguments of one assignment. scale: of sums. unit: of squared distances. step: of the clustering."""

    prepared: PreparedCentroids
    scale: float
    unit: float
    engine: Engine
    name: str
    step: int


class StepPlan(NamedTuple):
    """How centroids move. sizes: (K,). momentum_mask: (K,) bool. pairs: of `pick_split_clusters`."""

    sizes: NDArray[np.int64]
    momentum_mask: NDArray[np.bool_]
    pairs: list[tuple[int, int]]
    inertia: list[float]
    changed: float


def _iterate(context: LloydContext, state: LloydState, steps: _StepOptions) -> LloydState:
    """Run the steps; centroids and velocity of the state are modified in place."""
    num_rows = context.stats.num_rows
    for iteration in range(state.iteration, steps.iterations):
        started = time.perf_counter()
        plan = _advance(context, state, steps)
        # `_advance` wrote the new centroids over the velocity, because it reads the old ones until all have moved.
        velocity = np.subtract(state.velocity, state.centroids, out=state.centroids)
        centroids, moved = state.velocity, bool(velocity.any())
        _repair(context, centroids, velocity, plan.pairs)
        repaired = state.num_repaired + len(plan.pairs)
        state = LloydState(iteration + 1, centroids, velocity, plan.sizes, plan.inertia, repaired)
        seconds = time.perf_counter() - started
        if steps.report:
            snapshot = state._replace(centroids=centroids.copy(), velocity=velocity.copy())
            rate = num_rows / seconds
            steps.report(LloydProgress(iteration + 1, plan.inertia[-1], plan.changed, seconds, rate, snapshot))
        if not moved and not plan.pairs:
            break
    return state


def _advance(context: LloydContext, state: LloydState, steps: _StepOptions) -> StepPlan:
    """Overwrite the velocity with the new centroids; the old ones are unchanged."""
    params = _assign_params(context, state.centroids, state.iteration, _moved(state))
    first, *later = spans(len(state.centroids), context.features)
    if later:  # the memory of the search is released before totals are allocated
        first, later = slice(0, 0), [first, *later]
    sums = _sums(context, _assign_and_sum, params, first)
    plan = _plan_step(state, steps, params.unit, sums.others)
    _update_centroids(context, state, params.scale, plan, first, sums.totals)
    params = params._replace(prepared=prepare(state.centroids))  # searched again only where labels were lost: unpacked
    for span in later:
        del sums  # frees its totals before the next are allocated
        sums = _sums(context, _sum, params, span)
        _update_centroids(context, state, params.scale, plan, span, sums.totals)
    return plan


def _assign_params(
    context: LloydContext, centroids: NDArray[np.float32], step: int, moved: NDArray[np.int64] | None = None
) -> _AssignParams:
    stats = context.stats
    unit = inertia_scale(stats, centroids)
    return _AssignParams(prepare(centroids, moved), sum_scale(stats), unit, context.engine, context.name, step)


def _moved(state: LloydState) -> NDArray[np.int64] | None:
    """The centroids that the last step moved, if few. Those given to empty clusters have velocity 0, hence `sizes`."""
    known = state.iteration and state.sizes.all()
    return incremental.few(np.asarray(state.velocity.any(axis=1))) if known else None


def _sums(context: LloydContext, function: Callable[..., Sums], params: _AssignParams, span: slice) -> ClusterSums:
    return total(context.features.fold(function, params, span, combine=merge))


def _plan_step(
    state: LloydState, steps: _StepOptions, unit: float, tallies: tuple[NDArray[np.int64], int, int, int]
) -> StepPlan:
    sizes, distance, changed, compared = tallies
    iteration, inertia = state.iteration, [*state.inertia, distance / unit]
    pairs = pick_split_clusters(sizes, generator(steps.seed, "kmeans split", iteration + 1))
    # Equal sizes indicate equal labels: only the means remain to be reached.
    increased, unchanged = inertia[-1] > min(inertia), np.array_equal(sizes, state.sizes)
    plain_phase = iteration < _FIRST_PLAIN or iteration >= steps.iterations - _LAST_PLAIN
    momentum_mask = np.full(len(sizes), not (steps.plain or increased or unchanged or plain_phase))
    momentum_mask[[cluster for pair in pairs for cluster in pair]] = False
    return StepPlan(sizes, momentum_mask, pairs, inertia, changed / compared if compared else 1.0)


def _update_centroids(
    context: LloydContext, state: LloydState, scale: float, plan: StepPlan, span: slice, totals: NDArray[np.int64]
) -> None:
    """Overwrite the velocity of a span of clusters with their new centroids."""
    for part, inner in parts(span):
        velocity, momentum_mask = state.velocity[part], plan.momentum_mask[part]
        updated = means(totals[inner], plan.sizes[part], scale, state.centroids[part])
        updated[momentum_mask] += velocity[momentum_mask] * np.float32(_MOMENTUM)
        velocity[:] = context.project(updated)


def _repair(
    context: LloydContext, centroids: NDArray[np.float32], velocity: NDArray[np.float32], pairs: list[tuple[int, int]]
) -> None:
    """Give each empty cluster half of another, in place. pairs: (empty, split)."""
    if pairs:
        clusters = np.unique(pairs)
        split_centroids(centroids, pairs)
        centroids[clusters] = context.project(centroids[clusters])
        velocity[clusters] = 0


def _assign_and_sum(block: Block, params: _AssignParams, span: slice) -> PendingRows:
    """Sums of the clusters of a span; and of all: sizes, inertia, changed labels, labels compared."""
    labels, changed, compared = _assign_block(block, params)
    distance = inertia_sum(
        block.values, labels, params.unit, params.prepared.centroids, resolve_engine(params.engine) == "int8"
    )
    sizes = np.bincount(labels, minlength=len(params.prepared.centroids))
    return _pending_rows(block, labels, params, span, (sizes, distance, changed, compared))


def _sum(block: Block, params: _AssignParams, span: slice) -> PendingRows:
    """Sums of the clusters of a span."""
    return _pending_rows(block, _assign_block(block, params)[0], params, span, ())


def _pending_rows(
    block: Block, labels: NDArray[np.int64], params: _AssignParams, span: slice, later: tuple[Any, ...]
) -> PendingRows:
    values, labels = select(block.values, labels, span)
    return PendingRows(
        values, labels, span.stop - span.start, params.scale, resolve_engine(params.engine) == "int8", later
    )


def _assign_block(block: Block, params: _AssignParams) -> tuple[NDArray[np.int64], int, int]:
    """Labels of a block; how many changed since the previous step, and how many could be compared."""
    step, snapshot = row_cache.get(params.name, block.samples) or (None, None)
    before = None if snapshot is None else snapshot.astype(np.int64)
    if before is not None and step == params.step:
        return before, 0, 0
    if before is not None and step == params.step - 1 and params.prepared.moved is not None:
        labels = incremental.assign_again(block.values, params.prepared, params.engine, before)
    else:
        labels = assign(block.values, params.prepared, params.engine, before)
    row_cache.put(params.name, block.samples, (params.step, labels.astype(np.int32)))
    return (labels, 0, 0) if before is None else (labels, int(np.count_nonzero(labels != before)), len(labels))


def _finish(context: LloydContext, state: LloydState) -> KMeans:
    """Assign all rows; while clusters are empty, move their centroids to the farthest rows and assign again.

    It terminates: a centroid equal to a row that no other centroid equals cannot become empty.
    """
    step, centroids, inertia, num_repaired = state.iteration, state.centroids, state.inertia, state.num_repaired
    moved = _moved(state)
    del state  # frees the velocity before labels are allocated
    while True:
        params = _assign_params(context, centroids, step, moved)
        found, distance = context.features.fold(_assignments, params, combine=_join)
        unit = params.unit
        del params
        samples, labels = (np.concatenate(column) for column in zip(*found, strict=True))
        labels = labels[np.argsort(samples)].astype(np.int64)
        samples.sort()
        sizes = np.bincount(labels, minlength=len(centroids))
        empty = np.flatnonzero(sizes == 0)
        if not len(empty):
            inertia, engine = [*inertia, distance / unit], resolve_engine(context.engine)
            spherical = context.project is _normalised
            return KMeans(centroids, samples, labels, inertia, sizes, num_repaired, engine, spherical)
        centroids, num_moved = _relocate_empty(context, centroids, empty)
        num_repaired, step, moved = num_repaired + num_moved, step + 1, None


def _relocate_empty(
    context: LloydContext, centroids: NDArray[np.float32], empty: NDArray[np.intp]
) -> tuple[NDArray[np.float32], int]:
    """Centroids with those of empty clusters moved to the rows farthest from their own, and how many were moved."""
    found = context.features.collect(_distances, prepare(centroids), context.engine)
    samples, labels, distances = (np.concatenate(column) for column in zip(*found, strict=True))
    order = np.argsort(samples)
    far = _farthest_rows(labels[order], distances[order])[: len(empty)]
    if not len(far):
        raise UserError(too_few(context.features, len(centroids) - len(empty), len(centroids)))
    moved = centroids.copy()
    moved[empty[: len(far)]] = context.features.rows(samples[order][far])
    return moved, len(far)


def _assignments(block: Block, params: _AssignParams) -> _Found:
    labels, _, _ = _assign_block(block, params)
    distance = inertia_sum(
        block.values, labels, params.unit, params.prepared.centroids, resolve_engine(params.engine) == "int8"
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
    """Rows that differ from their centroid, farthest first, no duplicates (these have equal label and distance)."""
    order = np.lexsort((labels, -distances))
    order = order[distances[order] > 0]
    duplicate = (np.diff(distances[order]) == 0) & (np.diff(labels[order]) == 0)
    distinct: NDArray[np.intp] = order[np.concatenate([[True], ~duplicate])[: len(order)]]
    return distinct


def _clear_cache(block: Block, name: str) -> tuple[int]:
    row_cache.clear(name)
    return (0,)


def _project_to_sphere(block: Block) -> NDArray[np.float32]:
    return unit_rows(block.values)


def _unit_norm_error(block: Block) -> tuple[float]:
    """The largest deviation of a squared norm from 1; zero rows count as normalised."""
    squares = np.square(block.values, dtype=np.float64).sum(axis=1)
    return (float(np.abs(squares[squares > 0] - 1).max(initial=0.0)),)


def _largest(left: tuple[float], right: tuple[float]) -> tuple[float]:
    return (max(left[0], right[0]),)
