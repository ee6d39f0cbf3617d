"""Planning an epoch: how often each image is visited, and in which order one worker sees its share."""

from __future__ import annotations

import time
import tracemalloc

import numpy as np

from raycluster.data.epoch_plan import plan_epoch
from raycluster.data.sampling import uniform_over_clusters

_MICROBATCH, _SHARD = 32, 1000


def run(rows: str = "1000000,10000000", clusters: int = 10_000, streams: int = 128, workers: str = "1,8") -> str:
    """A table: CPU seconds and memory of the sampler and of the plan, with random labels.

    rows, workers: several, separated by commas. Memory is the peak of numpy's arrays beside the labels.
    """
    lines = [
        f"{clusters} clusters, {streams} streams",
        "",
        "| rows | workers | sampler s | ns a row | GB | plan s | ns a row | GB | both s |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for count in map(int, rows.split(",")):
        for world in map(int, workers.split(",")):
            (sampling, first), (planning, second) = _measure(count, clusters, streams, streams // world)
            cells = [_cells(sampling, first, count), _cells(planning, second, count), f"{sampling + planning:.1f}"]
            lines.append(f"| {count} | {world} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cells(seconds: float, peak: int, count: int) -> str:
    return f"{seconds:.2f} | {seconds / count * 1e9:.0f} | {peak / 1e9:.2f}"


def _measure(count: int, clusters: int, streams: int, own: int) -> list[tuple[float, int]]:
    """(CPU seconds, peak bytes in all) of the sampler and of the plan."""
    labels = np.random.default_rng(0).integers(clusters, size=count, dtype=np.int32)
    total = count // (streams * _MICROBATCH) * streams * _MICROBATCH
    shards = [(start, min(start + _SHARD, count)) for start in range(0, count, _SHARD)]
    options = {"streams": streams, "microbatch": _MICROBATCH, "seed": 0, "epoch": 0, "window_shards": 16}
    tracemalloc.start()
    began = time.process_time()
    counts = uniform_over_clusters(labels, total, np.random.default_rng(1))
    sampled, first = time.process_time(), tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    chunks = plan_epoch(counts, shards, **options, only=range(own))
    planned, second = time.process_time(), tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(len(chunk.samples) for chunk in chunks) == total // streams * own
    return [(sampled - began, first), (planned - sampled, second)]
