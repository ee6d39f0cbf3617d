"""K-means (Lloyd 1982; Caron et al. 2018) in fewer and faster iterations, the same bits however rows are dealt out."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from secrets import token_hex
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from raycluster.clustering import hints
from raycluster.clustering.decision import squared_distances
from raycluster.clustering.nearest import Engine, assign, choose
from raycluster.clustering.result import KMeans, unit_rows
from raycluster.clustering.start import Init, donors, halve, start, too_few
from raycluster.clustering.sums import (
    ClusterSums,
    Labelled,
    Sums,
    inertia_of,
    means,
    merge,
    spans,
    spread,
    spread_scale,
    sum_of_squares,
    sum_scale,
    total,
)
from raycluster.clustering.target import Target, prepare
from raycluster.features import Extent, Features, extent
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
    if isinstance(init, State):
        state = init._replace(centroids=init.centroids.copy(), velocity=init.velocity.copy())
    else:
        centroids, num_repaired = start(features, num_clusters, init, size=size, seed=seed, engine=engine)
        centroids = descent.project(centroids)
        state = State(0, centroids, np.zeros_like(centroids), np.empty(0, np.int64), [], num_repaired)
    try:
        return _finish(descent, _iterate(descent, state, _Steps(plain, iterations, seed, report)))
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


class _Steps(NamedTuple):
    plain: bool
    iterations: int
    seed: int
    report: Callable[[Progress], None] | None


def _iterate(descent: _Descent, state: State, steps: _Steps) -> State:
    """Steps one by one; centroids and velocity of the state are written over."""
    scale, squares = sum_scale(descent.size), sum_of_squares(descent.features, descent.size)
    num_rows = descent.size.num_rows
    for iteration in range(state.iteration, steps.iterations):
        began = time.perf_counter()
        sums = _sums(descent, state.centroids, scale)
        inertia = [*state.inertia, inertia_of(sums, state.centroids, scale, squares)]
        pairs = donors(sums.counts, generator(steps.seed, "kmeans split", iteration + 1))
        # Sizes that stay say that labels stay: what is left to do is to bring centroids to the means.
        rising, settled = inertia[-1] > min(inertia), np.array_equal(sums.counts, state.sizes)
        lloyds = iteration < _FIRST_PLAIN or iteration >= steps.iterations - _LAST_PLAIN
        momentum = 0.0 if steps.plain or rising or settled or lloyds else _MOMENTUM
        moved = _advance(descent, state, sums, scale, momentum)
        _repair(descent, state, sums, scale, pairs)
        repaired = state.num_repaired + len(pairs)
        state = State(iteration + 1, state.centroids, state.velocity, sums.counts, inertia, repaired)
        seconds = time.perf_counter() - began
        if steps.report:
            changed = sums.changed / sums.compared if sums.compared else 1.0
            kept = state._replace(centroids=state.centroids.copy(), velocity=state.velocity.copy())
            steps.report(Progress(iteration + 1, inertia[-1], changed, seconds, num_rows / seconds, kept))
        if not moved and not pairs:
            break
    return state


def _advance(descent: _Descent, state: State, sums: ClusterSums, scale: float, momentum: float) -> bool:
    """Bring centroids to the means of their rows and, with momentum, beyond, in place; whether one moved."""
    moved = False
    for part in spans(len(state.centroids)):
        centroids, velocity = state.centroids[part], state.velocity[part]
        updated = means(sums, scale, part, centroids)
        if momentum:
            updated += velocity * np.float32(momentum)
        updated = descent.project(updated)
        np.subtract(updated, centroids, out=velocity)
        centroids[:] = updated
        moved |= bool(velocity.any())
    return moved


def _repair(descent: _Descent, state: State, sums: ClusterSums, scale: float, pairs: list[tuple[int, int]]) -> None:
    """Give each empty cluster half of another, in place. pairs: empty ones and who is halved for them."""
    if pairs:
        clusters = np.unique(pairs)
        state.centroids[clusters] = means(sums, scale, clusters, state.centroids[clusters])
        halve(state.centroids, pairs)
        state.centroids[clusters] = descent.project(state.centroids[clusters])
        state.velocity[clusters] = 0


def _sums(descent: _Descent, centroids: NDArray[np.float32], scale: float) -> ClusterSums:
    target = prepare(centroids)
    sums: Sums = descent.features.fold(_step, target, scale, descent.engine, descent.name, combine=merge)
    return total(sums)


def _step(block: Block, target: Target, scale: float, engine: Engine, name: str) -> Sums:
    labels, changed, compared = _label(block, target, engine, name)
    compiled = choose(engine) == "int8"
    return Labelled(block.values, labels, len(target.centroids), scale, changed, compared, compiled)


def _label(block: Block, target: Target, engine: Engine, name: str) -> tuple[NDArray[np.int64], int, int]:
    """Labels of a block; how many are not those of the step before, and of how many that is known."""
    kept = hints.recall(name, block.samples)
    before = None if kept is None else kept.astype(np.int64)
    labels = assign(block.values, target, engine, before)
    hints.keep(name, block.samples, labels.astype(np.int32))
    return (labels, 0, 0) if before is None else (labels, int(np.count_nonzero(labels != before)), len(labels))


def _finish(descent: _Descent, state: State) -> KMeans:
    """Assign all rows; while clusters are empty, move them to the rows worst served and assign again.

    It ends: a centroid moved onto a row that no other centroid sits on can never become empty.
    """
    centroids, num_repaired, engine = state.centroids, state.num_repaired, descent.engine
    while True:
        scale, target = spread_scale(descent.size, centroids), prepare(centroids)
        parts, spreads = descent.features.fold(_assignments, target, scale, engine, descent.name, combine=_join)
        samples, labels = (np.concatenate(column) for column in zip(*parts, strict=True))
        order = np.argsort(samples)
        samples, labels = samples[order], labels[order].astype(np.int64)
        sizes = np.bincount(labels, minlength=len(centroids))
        empty = np.flatnonzero(sizes == 0)
        if not len(empty):
            inertia, spherical = [*state.inertia, spreads / scale], descent.project is _normalised
            return KMeans(centroids, samples, labels, inertia, sizes, num_repaired, choose(engine), spherical)
        centroids, num_moved = _move(descent, centroids, empty)
        num_repaired += num_moved


def _move(
    descent: _Descent, centroids: NDArray[np.float32], empty: NDArray[np.intp]
) -> tuple[NDArray[np.float32], int]:
    """Centroids of empty clusters set on the rows that are farthest from theirs, and how many were."""
    parts = descent.features.collect(_distances, prepare(centroids), descent.engine)
    samples, labels, distances = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(samples)
    far = _worst_served(labels[order], distances[order])[: len(empty)]
    if not len(far):
        raise UserError(too_few(len(centroids) - len(empty), len(centroids)))
    moved = centroids.copy()
    moved[empty[: len(far)]] = descent.features.rows(samples[order][far])
    return moved, len(far)


def _assignments(block: Block, target: Target, scale: float, engine: Engine, name: str) -> _Found:
    labels, _, _ = _label(block, target, engine, name)
    apart = spread(block.values, labels, scale, target.centroids, choose(engine) == "int8")
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
    hints.forget(name)
    return (0,)


def _on_sphere(block: Block) -> NDArray[np.float32]:
    return unit_rows(block.values)


def _off_unit(block: Block) -> tuple[float]:
    """How far the norm of a row is from 1, at most; zero rows count as normalised."""
    squares = np.square(block.values, dtype=np.float64).sum(axis=1)
    return (float(np.abs(squares[squares > 0] - 1).max(initial=0.0)),)


def _largest(left: tuple[float], right: tuple[float]) -> tuple[float]:
    return (max(left[0], right[0]),)
