"""How a round scales from 8 to 512 workers: a model of unit costs measured here, checked against actors that run here.

A phase costs its shared work divided by workers and cores; sums that travel up a tree of fan-in 4 and are added on the
way; arrays that travel down by doubling; and what one process does for all. Nothing overlaps: an upper bound.
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
_TRIPS = 4  # whitening goes over the rows for their range, sums and products, then maps them
_STEPS = 21  # of k-means: its default, and the last assignment


class Cost(NamedTuple):
    """Seconds of the phase, bytes that leave a process in it."""

    seconds: float
    bytes: float = 0.0

    def __add__(self, other: Any) -> Cost:
        return Cost(self.seconds + other.seconds, self.bytes + other.bytes)

    def times(self, count: float) -> Cost:
        return Cost(self.seconds * count, self.bytes * count)


@dataclass(frozen=True)
class Problem:
    """What is clustered: rows into `groups` x `clusters` by k-means, or once per head by Sinkhorn."""

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
class Fleet:
    """Machines like this one. cores: of each. wire: seconds a byte between two. tree: sums are added on the way."""

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
        """To all workers; who has it passes it on."""
        return Cost(self.send(size).seconds * math.ceil(math.log2(self.workers + 1)), size * self.workers)

    def ask(self) -> Cost:
        """What a sum costs whatever is summed: one process asks all workers, each of which has to answer."""
        answer = (self.units.fold - 2 * self.units.ask) / min(1.0, self.cores)
        return Cost(answer + self.workers * self.units.ask)

    def fold(self, size: float) -> Cost:
        """Sums of this size of all workers, added up."""
        cost, parts = self.ask(), self.workers
        one = self.send(size) + Cost(size * self.units.combine)
        while self.tree and parts > _FAN_IN:
            groups = math.ceil(parts / _FAN_IN)
            cost += Cost(one.seconds * _FAN_IN, one.bytes * parts)  # groups work at the same time
            parts = groups
        return cost + one.times(parts)


def round_of(problem: Problem, fleet: Fleet, global_batch: int) -> dict[str, Cost]:
    """The phases of one round: features and labels of all images, then one epoch of training."""
    units, images = fleet.units, problem.images
    name, clustering = ("Sinkhorn", sinkhorn_cost) if problem.heads else ("k-means", kmeans_cost)
    heads = problem.heads or 1
    streams = min(fleet.workers, global_batch // _MICROBATCH)
    trainers = Fleet(streams, fleet.cores, fleet.wire, units)
    ring = 2 * (streams - 1) / streams * units.parameters * 4
    steps = images / global_batch
    return {
        "decode, extract": fleet.shared(images * (units.decode + units.forward))
        + Cost(fleet.send(images * DIM * 2 / fleet.workers).seconds, images * DIM * 2),
        "whiten": whitening_cost(images, fleet),
        name: clustering(problem, fleet),
        "labels": fleet.send(images * heads * 12)
        + Cost(images * heads * units.labels)
        + fleet.down(images * heads * 4),
        "train: compute": trainers.shared(images * (units.decode + units.step)),
        "train: gradients": Cost(steps * ring * fleet.wire, steps * ring * streams),
        "train: plan": Cost(images * units.plan),
    }


def whitening_cost(images: float, fleet: Fleet) -> Cost:
    moments = DIM * DIM * 8
    return fleet.shared(images * fleet.units.whiten) + fleet.fold(moments).times(_TRIPS) + fleet.down(moments)


def kmeans_cost(problem: Problem, fleet: Fleet, steps: int = _STEPS) -> Cost:
    """All steps of every group, one after the other."""
    values = problem.clusters * DIM
    folds = math.ceil(values * 8 / PooledFeatures.memory_budget)
    sums = (fleet.down(values * 4) + fleet.fold(values * 8 / folds)).times(folds)
    step = sums + Cost(values * fleet.units.update)
    row = fleet.units.accumulate + problem.clusters * fleet.units.kmeans
    return (step.times(problem.groups) + fleet.shared(problem.images * row)).times(steps)


def sinkhorn_cost(problem: Problem, fleet: Fleet) -> Cost:
    """All heads side by side: a fold answers what each of them asks."""
    values = problem.clusters * problem.heads
    step = fleet.down(values * (DIM * 4 + 8)) + fleet.fold(values * 8)
    return step.times(fleet.units.folds) + fleet.shared(problem.images * values * fleet.units.sinkhorn)


# --------------------------------------------------------------------------------------------------------------- tables


def run(
    model: str = "alexnet", size: int = 224, global_batch: int = 4096, gigabits: float = 10.0, cores: int = 0
) -> str:
    """Unit costs, predictions for 1.28 and 100 million images, and predicted against measured time for 1, 2, 4 actors.

    model, size: the network and its pixels. gigabits: a second between two machines (what small instances of the clouds
    are sold with). cores: of a machine, 0 for as many as here.
    """
    with ray_session(num_cpus=4):
        units = measure(model, size)
        checks = _check(units)
    cores = cores or os.cpu_count() or 1
    lines = [f"seconds a unit on one core ({model}, {size} px):", units.table(), ""]
    for images in (1_280_000, 100_000_000):
        for problem in (Problem(images, 10_000), Problem(images, 80_000, groups=4), Problem(images, 3000, heads=10)):
            fleets = [Fleet(workers, cores, 8e-9 / gigabits, units) for workers in _WORKERS]
            lines += _table(problem, fleets, global_batch)
    return "\n".join([*lines, *checks])


def _table(problem: Problem, fleets: list[Fleet], global_batch: int) -> list[str]:
    rounds = [round_of(problem, fleet, global_batch) for fleet in fleets]
    title = f"{problem}: seconds (GB moved)"
    lines = [f"| {title} | " + " | ".join(f"{fleet.workers} workers" for fleet in fleets) + " |"]
    lines.append("|---|" + "---:|" * len(fleets))
    for phase in rounds[0]:
        lines.append(_row(phase, [costs[phase] for costs in rounds]))
    lines.append(_row("**round**", [sum(costs.values(), Cost(0.0)) for costs in rounds]))
    if not problem.heads:
        flat = [round_of(problem, replace(fleet, tree=False), global_batch)["k-means"] for fleet in fleets]
        lines.append(_row("k-means, if the job added all sums itself", flat))
    return [*lines, "", _limits(problem, fleets[0], global_batch), ""]


def _row(name: str, costs: list[Cost]) -> str:
    cells = (f"{_figure(cost.seconds)} ({_figure(cost.bytes / 1e9)})" for cost in costs)
    return f"| {name} | " + " | ".join(cells) + " |"


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _limits(problem: Problem, fleet: Fleet, global_batch: int) -> str:
    def costs(workers: int, *, tree: bool = True, training: bool = False) -> dict[str, Cost]:
        found = round_of(problem, replace(fleet, workers=workers, tree=tree), global_batch)
        return {name: cost for name, cost in found.items() if training or not name.startswith("train")}

    parts = [
        f"reassignment {_limit(costs)}",
        f"without the tree {_limit(partial(costs, tree=False))}",
        f"whole round {_limit(partial(costs, training=True))}",
    ]
    return f"Twice the workers save less than a quarter of the time from: {'; '.join(parts)}"


def _limit(costs: Callable[[int], dict[str, Cost]]) -> str:
    """The first number of workers whose double is hardly faster, and the phase that is to blame."""
    workers = 1
    while workers < 2**14:
        before, after = costs(workers), costs(2 * workers)
        if sum(cost.seconds for cost in after.values()) > 0.75 * sum(cost.seconds for cost in before.values()):
            return f"{workers} ({max(after, key=lambda phase: 2 * after[phase].seconds - before[phase].seconds)})"
        workers *= 2
    return f"over {workers}"


# ---------------------------------------------------------------------------------------------------------------- check


def _check(units: Units) -> list[str]:
    """Predicted and measured seconds of the same work, in pools of one-threaded actors on this machine."""
    lines = [
        "| seconds with 1, 2, 4 actors here | predicted | measured | measured / predicted |",
        "|---|---:|---:|---:|",
    ]
    found: dict[str, list[tuple[float, float]]] = {}
    for actors in (1, 2, 4):
        fleet = Fleet(actors, min(1.0, (os.cpu_count() or 1) / actors), 0.0, units)
        for name, predicted, measured in _measured(fleet):
            found.setdefault(name, []).append((predicted, measured))
    for name, pairs in found.items():
        cells = (", ".join(f"{pair[place]:.2f}" for pair in pairs) for place in (0, 1))
        ratios = ", ".join(f"{measured / predicted:.2f}" for predicted, measured in pairs)
        lines.append(f"| {name} | {' | '.join(cells)} | {ratios} |")
    return lines


def _measured(fleet: Fleet) -> list[tuple[str, float, float]]:
    """(what, seconds predicted, seconds measured) for a pool of fleet.workers actors."""
    few, many = Problem(20_000, 500, heads=1), Problem(100_000, 4000)
    classifier = head(few.clusters)
    with pool(many.images, fleet.workers) as large, pool(few.images, fleet.workers) as small:
        whitening = seconds(lambda: whiten(large, DIM))
        step = kmeans_step(large, many.clusters)
        labelling = seconds(lambda: sinkhorn(small, [classifier]))
    return [
        ("whiten 100,000", whitening_cost(many.images, fleet).seconds, whitening),
        ("a step of k-means, 100,000 into 4,000", kmeans_cost(many, fleet, steps=1).seconds, step),
        ("Sinkhorn, 20,000 into 500", sinkhorn_cost(few, fleet).seconds, labelling),
    ]
