"""Peak memory of k-means relative to its data, each case in a process of its own."""

from __future__ import annotations

import re
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

_STEPS = 4


def run(before: str = "", rows: int = 0, clusters: str = "1000,10000", engines: str = "int8,torch") -> str:
    """A table. before: local .npy embeddings; random rows if empty. rows: number of rows, 0 for all.

    The last column is the peak resident memory, minus that after a small k-means without the data, over the bytes of
    the data.
    """
    lines = ["| input | K | engine | data, MB | peak over data |", "|---|---:|---|---:|---:|"]
    for kind in ("float32", "mapped file", "float16", "float64", "uint8"):
        for num_clusters in map(int, clusters.split(",")):
            for engine in engines.split(",") if kind == "float32" else ["auto"]:
                with get_context("spawn").Pool(1) as pool:
                    size, peak = pool.apply(_measure, (before, rows, kind, num_clusters, engine))
                lines.append(f"| {kind} | {num_clusters} | {engine} | {size / 1e6:.0f} | {peak / size:.3f} |")
    return "\n".join(lines)


def _measure(before: str, rows: int, kind: str, num_clusters: int, engine: Any) -> tuple[int, int]:
    """Bytes of the data, and by how much the peak exceeds the resident memory before."""
    from raycluster import kmeans

    small = np.random.default_rng(0).standard_normal((5000, 16)).astype(np.float32)
    kmeans(small, 10, iterations=2, engine=engine)
    baseline = resident("VmRSS")
    values = _load(before, rows, kind)
    size = values.nbytes
    reset_peak()
    kmeans(before if kind == "mapped file" and before else values, num_clusters, iterations=_STEPS, engine=engine)
    return size, resident("VmHWM") - baseline


def _load(before: str, rows: int, kind: str) -> np.ndarray:
    if before:
        mapped: np.ndarray = np.load(before, mmap_mode="r")[: rows or None]
    else:
        mapped = np.random.default_rng(0).standard_normal((rows or 50_000, 64), np.float32)
    if kind == "mapped file":
        return mapped
    values = np.empty(mapped.shape, kind)
    for start in range(0, len(mapped), 4096):  # in parts: the conversion must not be the peak
        part = mapped[start : start + 4096]
        values[start : start + 4096] = np.clip(part * 400 + 128, 0, 255) if kind == "uint8" else part
    return values


def reset_peak() -> None:
    """Make VmHWM what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def resident(field: str) -> int:
    """Bytes of memory of this process: VmRSS now, VmHWM at the peak."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    assert found is not None
    return 1024 * int(found[1])
