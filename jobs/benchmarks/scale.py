"""Scaling of a round from 8 to 512 workers: a cost model with measured constants, checked against local actors.

The cost of a phase is its parallel work divided by workers and cores, reductions up a tree of fan-in 4, broadcasts by
doubling, and serial work. Nothing overlaps: an upper bound.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

from benchmarks.units import DIM, Units, head, kmeans_step, measure, pool, seconds

from raycluster.clustering.sinkhorn.api import sinkhorn
from raycluster.clustering.whitening import whiten
from raycluster.distributed.features.feature_pool import PooledFeatures
from raycluster.distributed.session import ray_session

_FAN_IN = 4
_MICROBATCH = 32
_WORKERS = (8, 32, 128, 512)
_PASSES = 4  # of whitening: range, sums, products, projection
_STEPS = 21  # of k-means: the default and the final assignment


class Cost(NamedTuple):
    """seconds: of a phase. bytes: sent by all processes."""

    seconds: float
    bytes: float = 0.0

    def __add__(self, other: Any) -> Cost:
        return Cost(self.seconds + other.seconds, self.bytes + other.bytes)

    def times(self, count: float) -> Cost:
        return Cost(self.seconds * count, self.bytes * count)


@dataclass(frozen=True)
class Problem:
    """Rows into `groups` x `clusters` by k-means, or into `clusters` per head by Sinkhorn."""

    images: int
    clusters: int
    groups: int = 1
    heads: int = 0

    def __str__(self) -> str:
        how = (
            f"{self.heads} heads of {self.clusters:,}" if self.heads else f"{self.groups} x {self.clusters:,} clusters"
        )
        return f"{self.images / 1e6:g} million images, {how}"


@dataclass(frozen=True)
class ClusterModel:
    """Workers. cores: of each. wire: seconds per byte between two. tree: reductions use a tree."""

    workers: int
    cores: float
    wire: float
    units: Units
    tree: bool = True

    def shared(self, work: float) -> Cost:
        return Cost(work / (self.workers * self.cores))

    def send(self, size: float) -> Cost:
        return Cost(size * max(self.wire, self.units.send), size)

    def down(self, size: float) -> Cost:
        """A broadcast by doubling."""
        return Cost(self.send(size).seconds * math.ceil(math.log2(self.workers + 1)), size * self.workers)

    def ask(self) -> Cost:
        """The latency of a reduction: one request to, and response from, each worker."""
        answer = (self.units.fold - 2 * self.units.ask) / min(1.0, self.cores)
        return Cost(answer + self.workers * self.units.ask)

    def fold(self, size: float) -> Cost:
        """A reduction of sums of `size` bytes."""
        cost, parts = self.ask(), self.workers
        one = self.send(size) + Cost(size * self.units.combine)
        while self.tree and parts > _FAN_IN:
            groups = math.ceil(parts / _FAN_IN)
            cost += Cost(one.seconds * _FAN_IN, one.bytes * parts)  # groups are concurrent
            parts = groups
        return cost + one.times(parts)


def round_of(problem: Problem, cluster: ClusterModel, global_batch: int) -> dict[str, Cost]:
    """The phases of one round: features and labels of all images, then one epoch of training."""
    units, images = cluster.units, problem.images
    name, clustering = ("Sinkhorn", sinkhorn_cost) if problem.heads else ("k-means", kmeans_cost)
    heads = problem.heads or 1
    streams = min(cluster.workers, global_batch // _MICROBATCH)
    trainers = ClusterModel(streams, cluster.cores, cluster.wire, units)
    ring = 2 * (streams - 1) / streams * units.parameters * 4
    steps = images / global_batch
    return {
        "decode, extract": cluster.shared(images * (units.decode + units.forward))
        + Cost(cluster.send(images * DIM * 2 / cluster.workers).seconds, images * DIM * 2),
        "whiten": whitening_cost(images, cluster),
        name: clustering(problem, cluster),
        "labels": cluster.send(images * heads * 12)
        + Cost(images * heads * units.labels)
        + cluster.down(images * heads * 4),
        "train: compute": trainers.shared(images * (units.decode + units.step)),
        "train: gradients": Cost(steps * ring * cluster.wire, steps * ring * streams),
        "train: plan": Cost(images * units.plan),
    }


def whitening_cost(images: float, cluster: ClusterModel) -> Cost:
    moments = DIM * DIM * 8
    return cluster.shared(images * cluster.units.whiten) + cluster.fold(moments).times(_PASSES) + cluster.down(moments)


def kmeans_cost(problem: Problem, cluster: ClusterModel, steps: int = _STEPS) -> Cost:
    """All iterations of all groups, sequentially."""
    values = problem.clusters * DIM
    folds = math.ceil(values * 8 / PooledFeatures.memory_budget)
    sums = (cluster.down(values * 4) + cluster.fold(values * 8 / folds)).times(folds)
    step = sums + Cost(values * cluster.units.update)
    row = cluster.units.accumulate + problem.clusters * cluster.units.kmeans
    return (step.times(problem.groups) + cluster.shared(problem.images * row)).times(steps)


def sinkhorn_cost(problem: Problem, cluster: ClusterModel) -> Cost:
    """All heads together: one fold serves all of them."""
    values = problem.clusters * problem.heads
    step = cluster.down(values * (DIM * 4 + 8)) + cluster.fold(values * 8)
    return step.times(cluster.units.folds) + cluster.shared(problem.images * values * cluster.units.sinkhorn)


# --------------------------------------------------------------------------------------------------------------- tables


def run(
    model: str = "alexnet", size: int = 224, global_batch: int = 4096, gigabits: float = 10.0, cores: int = 0
) -> str:
    """Unit costs, predictions for 1.28 and 100 million images, and predicted against measured times of 1, 2, 4 actors.

    model, size: the network and its input size in pixels. gigabits: bandwidth per second between two machines, by
    default that of small cloud instances. cores: per machine, 0 for those of this machine.
    """
    with ray_session(num_cpus=4):
        units = measure(model, size)
        checks = _check(units)
    cores = cores or os.cpu_count() or 1
    lines = [f"seconds per unit on one core ({model}, {size} px):", units.table(), ""]
    for images in (1_280_000, 100_000_000):
        for problem in (Problem(images, 10_000), Problem(images, 80_000, groups=4), Problem(images, 3000, heads=10)):
            models = [ClusterModel(workers, cores, 8e-9 / gigabits, units) for workers in _WORKERS]
            lines += _table(problem, models, global_batch)
    return "\n".join([*lines, *checks])


def _table(problem: Problem, models: list[ClusterModel], global_batch: int) -> list[str]:
    rounds = [round_of(problem, cluster, global_batch) for cluster in models]
    title = f"{problem}: seconds (GB moved)"
    lines = [f"| {title} | " + " | ".join(f"{cluster.workers} workers" for cluster in models) + " |"]
    lines.append("|---|" + "---:|" * len(models))
    for phase in rounds[0]:
        lines.append(_row(phase, [costs[phase] for costs in rounds]))
    lines.append(_row("**round**", [sum(costs.values(), Cost(0.0)) for costs in rounds]))
    if not problem.heads:
        flat = [round_of(problem, replace(cluster, tree=False), global_batch)["k-means"] for cluster in models]
        lines.append(_row("k-means, with all sums added by the job", flat))
    return [*lines, "", _limits(problem, models[0], global_batch), ""]


def _row(name: str, costs: list[Cost]) -> str:
    cells = (f"{_figure(cost.seconds)} ({_figure(cost.bytes / 1e9)})" for cost in costs)
    return f"| {name} | " + " | ".join(cells) + " |"


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _limits(problem: Problem, cluster: ClusterModel, global_batch: int) -> str:
    def costs(workers: int, *, tree: bool = True, training: bool = False) -> dict[str, Cost]:
        found = round_of(problem, replace(cluster, workers=workers, tree=tree), global_batch)
        return {name: cost for name, cost in found.items() if training or not name.startswith("train")}

    parts = [
        f"reassignment {_limit(costs)}",
        f"without the tree {_limit(partial(costs, tree=False))}",
        f"whole round {_limit(partial(costs, training=True))}",
    ]
    return f"Doubling the workers saves less than a quarter of the time from: {'; '.join(parts)}"


def _limit(costs: Callable[[int], dict[str, Cost]]) -> str:
    """The first number of workers where doubling saves less than a quarter, and the limiting phase."""
    workers = 1
    while workers < 2**14:
        before, after = costs(workers), costs(2 * workers)
        if sum(cost.seconds for cost in after.values()) > 0.75 * sum(cost.seconds for cost in before.values()):
            return f"{workers} ({max(after, key=lambda phase: 2 * after[phase].seconds - before[phase].seconds)})"
        workers *= 2
    return f"over {workers}"


# ---------------------------------------------------------------------------------------------------------------- check


def _check(units: Units) -> list[str]:
    """Predicted and measured seconds of the same work in pools of single-threaded actors."""
    lines = [
        "| seconds with 1, 2, 4 actors here | predicted | measured | measured / predicted |",
        "|---|---:|---:|---:|",
    ]
    found: dict[str, list[tuple[float, float]]] = {}
    for actors in (1, 2, 4):
        cluster = ClusterModel(actors, min(1.0, (os.cpu_count() or 1) / actors), 0.0, units)
        for name, predicted, measured in _measured(cluster):
            found.setdefault(name, []).append((predicted, measured))
    for name, pairs in found.items():
        cells = (", ".join(f"{pair[place]:.2f}" for pair in pairs) for place in (0, 1))
        ratios = ", ".join(f"{measured / predicted:.2f}" for predicted, measured in pairs)
        lines.append(f"| {name} | {' | '.join(cells)} | {ratios} |")
    return lines


def _measured(cluster: ClusterModel) -> list[tuple[str, float, float]]:
    """(name, predicted seconds, measured seconds) for a pool of cluster.workers actors."""
    few, many = Problem(20_000, 500, heads=1), Problem(100_000, 4000)
    classifier = head(few.clusters)
    with pool(many.images, cluster.workers) as large, pool(few.images, cluster.workers) as small:
        whitening = seconds(lambda: whiten(large, DIM))
        step = kmeans_step(large, many.clusters)
        labelling = seconds(lambda: sinkhorn(small, [classifier]))
    return [
        ("whiten 100,000", whitening_cost(many.images, cluster).seconds, whitening),
        ("a step of k-means, 100,000 into 4,000", kmeans_cost(many, cluster, steps=1).seconds, step),
        ("Sinkhorn, 20,000 into 500", sinkhorn_cost(few, cluster).seconds, labelling),
    ]
