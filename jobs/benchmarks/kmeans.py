"""K-means to the final inertia of faiss, against other libraries, interleaved in one run."""

from __future__ import annotations

import io
import sys
import time
from contextlib import suppress
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from benchmarks import contenders
from benchmarks.contenders import ENTRIES, installed
from numpy.typing import NDArray

from raycluster import kmeans
from raycluster.clustering.kmeans.lloyd import LloydProgress, LloydState
from raycluster.clustering.search import int8_cpu
from raycluster.clustering.search.assign import nearest
from raycluster.features.arrays import as_features
from raycluster.io import storage

_FAISS_STEPS = 20
_CROSSING = 6  # iterations by which the last, plain one may be ahead of those with momentum


class Result(NamedTuple):
    """seconds of wall clock, cpu seconds of all threads, inertia per row after an exact assignment, steps taken."""

    seconds: float
    cpu: float
    inertia: float
    steps: int


def run(
    before: str = "",
    after: str = "",
    clusters: str = "1000,10000",
    rows: int = 0,
    repeats: int = 2,
    engines: str = "int8,torch",
    others: int = 1,
) -> str:
    """A table: seconds until the final inertia of faiss is reached, including the final exact assignment.

    before, after: .npy embeddings (see `embeddings`), with equal order of rows, the latter after one more epoch;
    rows of a mixture if empty. clusters: values of K, separated by commas. rows: number of rows, 0 for all. engines: of
    raycluster. others: 0 for faiss only. Slow libraries run fewer iterations; those that do not reach the inertia of
    faiss are compared by seconds per iteration. CPU seconds are robust to other load on the machine.
    """
    early = _load(before, rows) if before else _mixture(rows or 20_000)
    late = _load(after, rows) if after else None
    lines = [
        f"{len(early)} x {early.shape[1]}, {torch.get_num_threads()} threads, kernel {_instructions()}, median of "
        f"{repeats}",
        "",
        "| K | engine | steps | seconds | CPU seconds | inertia / N | times faster than faiss | per step | CPU |",
        "|---:|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for num_clusters in map(int, clusters.split(",")):
        lines += _table(early, late, num_clusters, repeats, engines.split(","), bool(others))
    return "\n".join(lines)


def _table(
    early: NDArray[np.float32],
    late: NDArray[np.float32] | None,
    num_clusters: int,
    repeats: int,
    engines: list[str],
    others: bool,
) -> list[str]:
    """The rows of the table for one K: cold starts, then warm starts from the labels of the previous epoch."""
    rows = _compare(early, num_clusters, "random", repeats, engines, others)
    if late is not None:
        labels = kmeans(early, num_clusters, seed=1).labels
        rows += _compare(late, num_clusters, labels, repeats, engines, False)
    return rows


def _compare(
    values: NDArray[np.float32], num_clusters: int, init: Any, repeats: int, engines: list[str], others: bool
) -> list[str]:
    note, warm = ("", "") if isinstance(init, str) else (", next epoch", ", warm")

    def baseline() -> Result:
        return _log("faiss", _timed(contenders.faiss, values, num_clusters, _FAISS_STEPS))

    base = [baseline()]
    steps = _steps_to(base[0].inertia, values, num_clusters, init)
    ours: dict[str, list[Result]] = {engine: [] for engine in engines}
    for repeat in range(repeats):
        for engine, results in ours.items():
            results.append(_log(engine, _ours(values, num_clusters, init, engine, steps)))
        if repeat < repeats - 1:
            base.append(baseline())
    found = {f"faiss{note}": base, **{f"raycluster {engine}{note}{warm}": results for engine, results in ours.items()}}
    for name, entry in ENTRIES.items() if others else ():
        if installed(entry) and (wanted := entry.steps(num_clusters)):
            found[name] = [_log(name, _timed(entry.work, values, num_clusters, wanted))]
    return [_row(num_clusters, name, results, base) for name, results in found.items()]


def _row(num_clusters: int, name: str, found: list[Result], base: list[Result]) -> str:
    seconds, cpu = (median(getattr(one, key) for one in found) for key in ("seconds", "cpu"))
    base_seconds, base_cpu = (median(getattr(one, key) for one in base) for key in ("seconds", "cpu"))
    steps, inertia = found[0].steps, found[0].inertia
    reached = inertia <= base[0].inertia
    per_step = base_seconds / (base[0].steps + 1) * (steps + 1) / seconds
    return (
        f"| {num_clusters} | {name} | {steps} | {seconds:.2f} | {cpu:.2f} | {inertia:.5f} "
        f"| {f'{base_seconds / seconds:.1f}' if reached else 'not reached'} | {per_step:.1f} "
        f"| {base_cpu / cpu * (1 if reached else (steps + 1) / (base[0].steps + 1)):.1f} |"
    )


def _log(name: str, result: Result) -> Result:
    """Print a result, as progress."""
    print(f"{name}: {result}", file=sys.stderr, flush=True)
    return result


def _instructions() -> str:
    found = int8_cpu.support()
    return "none" if found is None else int8_cpu.SUPPORT_NAMES[found]


def _load(uri: str, rows: int) -> NDArray[np.float32]:
    values: NDArray[np.float32] = np.load(io.BytesIO(storage.read_bytes(uri)))
    return np.ascontiguousarray(values[:: max(1, len(values) // rows)][:rows]) if rows else values


def _mixture(rows: int, dim: int = 64) -> NDArray[np.float32]:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((200, dim))[rng.integers(200, size=rows)] + rng.standard_normal((rows, dim))
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


def _timed(work: contenders.Contender, values: NDArray[np.float32], num_clusters: int, steps: int) -> Result:
    began, cpu = time.perf_counter(), time.process_time()
    centroids = work(values, num_clusters, steps)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    _, distances = nearest(values, centroids)
    return Result(seconds, cpu, float(distances.sum(dtype=np.float64)) / len(values), steps)


def _ours(values: NDArray[np.float32], num_clusters: int, init: Any, engine: Any, steps: int) -> Result:
    began, cpu = time.perf_counter(), time.process_time()
    found = kmeans(values, num_clusters, iterations=steps, init=init, engine=engine, seed=1)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    return Result(seconds, cpu, found.inertia[-1] / len(values), len(found.inertia) - 1)


class _GoalReached(Exception):
    """The inertia is at most the goal."""


def _steps_to(goal: float, values: NDArray[np.float32], num_clusters: int, init: Any) -> int:
    """The fewest steps after which the inertia is at most the goal; not timed."""
    features, starts = as_features(values), [init]

    def note(progress: LloydProgress) -> None:
        starts.append(progress.state)
        if progress.inertia / len(values) <= goal:
            raise _GoalReached

    with suppress(_GoalReached):
        kmeans(features, num_clusters, iterations=2 * _FAISS_STEPS, init=init, seed=1, report=note)
    for steps in range(max(1, len(starts) - _CROSSING), len(starts) + 1):
        begin: LloydState = starts[steps - 1]
        found = kmeans(features, num_clusters, iterations=steps, init=begin, seed=1)
        if found.inertia[-1] / len(values) <= goal:
            return steps
    return len(starts)
