"""Sinkhorn against the published algorithm, to the same marginal error on the same features and heads."""

from __future__ import annotations

import io
import math
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from raycluster.clustering.sinkhorn.api import sinkhorn
from raycluster.clustering.sinkhorn.native import candidates, support
from raycluster.clustering.sinkhorn.sparse import CandidateWindow, pack
from raycluster.features.arrays import as_features
from raycluster.features.matrix import LocalFeatures
from raycluster.io import storage

_SHARPNESS = 25.0
_ROWS = 2048
_BATCH = 500
_LEARNING_RATE = 0.01
_EPOCHS = 2
_MAX_ROUNDS = 30


class Result(NamedTuple):
    """seconds: wall clock. cpu: seconds of all threads. megabytes: peak memory above that of the features. passes: over
    the matrix, which raycluster computes in the first only. error: largest relative deviation of a marginal.
    """

    seconds: float
    cpu: float
    megabytes: float
    passes: int
    error: float


def run(
    features: str = "",
    sizes: str = "100000x3000,50000x1000",
    tolerance: float = 1e-3,
    spread: float = 100.0,
    budget_seconds: float = 300.0,
    heads: str = "untrained,trained",
) -> str:
    """A table. features: .npy embeddings (see `embeddings`); rows of a mixture if empty.

    sizes: N x K, separated by commas. spread: heads are trained, alternating with balanced labels, until the mean
    standard deviation of sharpness * log p within a row reaches it. budget_seconds: limit of a baseline. Times start
    with features and head in memory and end with labels; they include the logits.
    """
    lines = [
        f"{torch.get_num_threads()} threads, instructions {('none', 'AVX2', 'AVX-512')[support()]}; to a relative "
        f"marginal error of {tolerance:g}; logits included",
        "",
        "| N x K | head (spread) | method | seconds | CPU seconds | peak MB | passes | error | times faster | memory |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for size in sizes.split(","):
        num_rows, num_clusters = map(int, size.split("x"))
        values = _load(features, num_rows)
        for name in heads.split(","):
            head = _untrained(values, num_clusters) if name == "untrained" else _trained(values, num_clusters, spread)
            baseline = _linear if name == "untrained" else _logarithmic
            limits = {"tolerance": tolerance, "budget_seconds": budget_seconds}
            found = {"raycluster": _measured(_ours, values, head, **limits)}
            found[baseline.__name__[1:]] = _measured(baseline, values, head, **limits)
            label = f"{size} | {name} ({_spread(values, head):.0f})"
            lines += [_row(label, method, one, list(found.values())[-1]) for method, one in found.items()]
    return "\n".join([*lines, "", *_passes(features, sizes)])


def _row(label: str, method: str, one: Result, base: Result) -> str:
    return (
        f"| {label} | {method} | {one.seconds:.2f} | {one.cpu:.2f} | {one.megabytes:.0f} | {one.passes} "
        f"| {one.error:.2g} | {base.seconds / one.seconds:.1f} | {one.megabytes / max(base.megabytes, 1e-3):.2f} |"
    )


def _passes(features: str, sizes: str) -> list[str]:
    """Seconds of the dense pass at a quarter, a half and all of the rows."""
    num_rows, num_clusters = map(int, sizes.split(",")[0].split("x"))
    lines = ["| rows | dense pass, seconds | microseconds per row |", "|---:|---:|---:|"]
    for count in (num_rows // 4, num_rows // 2, num_rows):
        values = _load(features, count)
        head = pack(*_untrained(values, num_clusters))
        window = CandidateWindow(_SHARPNESS, np.zeros(num_clusters), 25.0)
        data = as_features(values)
        began = time.perf_counter()
        data.fold(_count_candidates, head, window)
        seconds = time.perf_counter() - began
        lines.append(f"| {count} | {seconds:.3f} | {seconds / count * 1e6:.1f} |")
    return lines


def _count_candidates(block: Any, head: Any, window: CandidateWindow) -> tuple[int]:
    return (len(candidates(block.values, head, window).cluster),)


def _load(uri: str, rows: int) -> NDArray[np.float32]:
    """(rows, D) of unit variance."""
    if uri:
        found: NDArray[np.float32] = np.load(io.BytesIO(storage.read_bytes(uri)), mmap_mode=None)[:rows]
    else:
        rng = np.random.default_rng(0)
        found = rng.standard_normal((200, 64))[rng.integers(200, size=rows)] + rng.standard_normal((rows, 64))
    return np.ascontiguousarray(found / found.std(), np.float32)


def _untrained(values: NDArray[np.float32], num_clusters: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    torch.manual_seed(0)
    layer = nn.Linear(values.shape[1], num_clusters)
    return layer.weight.detach().numpy(), layer.bias.detach().numpy()


def _trained(
    values: NDArray[np.float32], num_clusters: int, spread: float
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """A head trained on its own balanced labels, alternately, until its logits have the spread."""
    head = _untrained(values, num_clusters)
    layer = nn.Linear(values.shape[1], num_clusters)
    layer.load_state_dict({"weight": torch.from_numpy(head[0]), "bias": torch.from_numpy(head[1])})
    optimiser, rows = torch.optim.Adam(layer.parameters(), lr=_LEARNING_RATE), torch.from_numpy(values)
    data, draw = as_features(values), torch.Generator().manual_seed(0)
    for _ in range(_MAX_ROUNDS):
        head = layer.weight.detach().numpy().copy(), layer.bias.detach().numpy().copy()
        if _spread(values, head) >= spread:
            break
        labels = torch.from_numpy(sinkhorn(data, [head]).labels[0].astype(np.int64))
        for _ in range(_EPOCHS):
            for batch in torch.randperm(len(rows), generator=draw).split(_BATCH):
                optimiser.zero_grad()
                nn.functional.cross_entropy(layer(rows[batch]), labels[batch]).backward()
                optimiser.step()
    return head


def _spread(values: NDArray[np.float32], head: tuple[NDArray[np.float32], NDArray[np.float32]]) -> float:
    some = values[:: max(1, len(values) // 1000)]
    return float(_SHARPNESS * (some @ head[0].T + head[1]).std(axis=1).mean())


def _measured(contender: Callable[..., tuple[int, float]], values: Any, head: Any, **limits: float) -> Result:
    """Run in a process of its own, to measure its peak memory."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "problem.npz"
        np.savez(path, values=values, weight=head[0], bias=head[1])
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            return pool.apply(_child, (contender, str(path), limits))


def _child(contender: Callable[..., tuple[int, float]], path: str, limits: dict[str, float]) -> Result:
    with np.load(path) as problem:
        values, weight, bias = problem["values"], problem["weight"], problem["bias"]
    small = min(len(values), 2 * len(bias))
    contender(values[:small], weight[:8], bias[:8], tolerance=0.5, budget_seconds=1.0)  # warm-up
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    began, cpu = time.perf_counter(), time.process_time()
    passes, error = contender(values, weight, bias, **limits)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    return Result(seconds, cpu, _status("VmHWM") - before, passes, error)


def _status(key: str) -> float:
    """Megabytes of a field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) / 1024


def _ours(values: Any, weight: Any, bias: Any, *, tolerance: float, budget_seconds: float) -> tuple[int, float]:
    data: LocalFeatures = as_features(values)  # type: ignore[assignment]
    found = sinkhorn(data, [(weight, bias)], sharpness=_SHARPNESS, tolerance=tolerance)
    return found.iterations[0], found.marginal_errors[0]


def _log_probs(values: Any, weight: Any, bias: Any) -> torch.Tensor:
    """(N, K) float64 sharpness * log p, computed block by block as in the published code."""
    result = torch.empty(len(values), len(bias), dtype=torch.float64)
    w, b = torch.from_numpy(weight).T.contiguous(), torch.from_numpy(bias)
    for start in range(0, len(values), _ROWS):
        logits = torch.addmm(b, torch.from_numpy(values[start : start + _ROWS]), w)
        torch.log_softmax(logits.double(), 1, out=result[start : start + _ROWS]).mul_(_SHARPNESS)
    return result


def _linear(values: Any, weight: Any, bias: Any, *, tolerance: float, budget_seconds: float) -> tuple[int, float]:
    """The published algorithm: P^sharpness in float64, two matrix-vector products per iteration."""
    plan = _log_probs(values, weight, bias).exp_()
    num_rows, num_clusters = plan.shape
    columns = torch.full((num_rows,), 1 / num_rows, dtype=torch.float64)
    rows, error, passes, began = torch.zeros(num_clusters, dtype=torch.float64), math.inf, 0, time.perf_counter()
    while error > tolerance and time.perf_counter() - began < budget_seconds:
        sums = plan.T @ columns
        error = float((rows * sums * num_clusters - 1).abs().max())  # of the plan so far
        rows = 1 / num_clusters / sums
        columns = 1 / num_rows / (plan @ rows)
        passes += 2
    for start in range(0, num_rows, _ROWS):
        (plan[start : start + _ROWS] * rows).argmax(1)
    return passes, error


def _logarithmic(values: Any, weight: Any, bias: Any, *, tolerance: float, budget_seconds: float) -> tuple[int, float]:
    """The algorithm in the log domain, block by block."""
    scores = _log_probs(values, weight, bias)
    num_rows, num_clusters = scores.shape
    scaling, error, passes = torch.zeros(num_clusters, dtype=torch.float64), math.inf, 0
    began = time.perf_counter()
    while error > tolerance and time.perf_counter() - began < budget_seconds:
        sums = torch.zeros(num_clusters, dtype=torch.float64)
        for start in range(0, num_rows, _ROWS):
            sums += torch.softmax(scores[start : start + _ROWS] + scaling, 1).sum(0)
        shares = sums * num_clusters / num_rows
        error = float((shares - 1).abs().max())
        scaling = scaling - shares.clamp(min=1e-300).log()
        passes += 1
    for start in range(0, num_rows, _ROWS):
        (scores[start : start + _ROWS] + scaling).argmax(1)
    return passes, error
