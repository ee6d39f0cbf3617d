"""Power iteration clustering against the published loop: flat search of faiss, mode seeking row by row in Python."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import faiss
import numpy as np
import scipy.sparse
import torch
from numpy.typing import NDArray

from raycluster import knn, power_iteration_clustering
from raycluster.evaluation.metrics.agreement import mutual_information
from raycluster.io import storage

_NEIGHBOURS = 5
_SIGMA = 0.2
_ALPHA = 0.001
_ITERATIONS = 200

Rows = NDArray[np.float32]
Labels = NDArray[np.int64]


class Result(NamedTuple):
    """seconds of wall clock and of the processors, labels (N,)."""

    seconds: float
    cpu: float
    labels: Labels


def run(before: str = "", rows: int = 100_000, dim: int = 256, lists: int = 0, probes: str = "", seed: int = 0) -> str:
    """A table: time, recall of the 5 neighbours, number of clusters, NMI with the published loop and with the truth.

    before: .npy embeddings (see `embeddings`); rows of a mixture if empty, whose components are the truth. rows: number
    of rows, 0 for all. dim: of the mixture. lists, probes: of further approximate searches, whose recall is shown in a
    second table; probes separated by commas. CPU seconds are robust to other load on the machine.
    """
    values, truth = (_load(before, rows), None) if before else _mixture(rows, dim, seed)
    work: dict[str, Callable[[], Labels]] = {
        "published": partial(_published, values),
        "raycluster exact": lambda: power_iteration_clustering(values).labels,
        "raycluster approximate": lambda: power_iteration_clustering(values, search="approximate").labels,
    }
    knn(values[:4096], _NEIGHBOURS)  # compiles the kernel
    found = {name: _timed(name, function) for name, function in work.items()}
    lines = [f"{len(values)} x {values.shape[1]}, {torch.get_num_threads()} threads", ""]
    lines += ["| method | seconds | CPU seconds | clusters | NMI with published | NMI with truth | times faster |"]
    lines += ["|---|---:|---:|---:|---:|---:|---:|"]
    lines += [_row(name, result, found["published"], truth) for name, result in found.items()]
    return "\n".join([*lines, "", *_searches(values, lists, [int(number) for number in probes.split(",") if number])])


def _row(name: str, result: Result, base: Result, truth: Labels | None) -> str:
    agreement = mutual_information(result.labels, base.labels)
    known = "" if truth is None else f"{mutual_information(result.labels, truth):.4f}"
    return (
        f"| {name} | {result.seconds:.1f} | {result.cpu:.1f} | {result.labels.max() + 1} | {agreement:.4f} | {known} "
        f"| {base.seconds / result.seconds:.1f} |"
    )


def _searches(values: Rows, lists: int, probes: list[int]) -> list[str]:
    """A table of searches for neighbours: faiss, exact, and approximate with these numbers of lists and probes."""
    exact = knn(values, _NEIGHBOURS).indices
    options = {"num_lists": lists or None}
    searches: dict[str, Callable[[], Labels]] = {
        "faiss": lambda: _flat_search(values)[1][:, 1:],
        "exact": lambda: knn(values, _NEIGHBOURS).indices,
        "approximate": lambda: knn(values, _NEIGHBOURS, search="approximate").indices,
    }
    for number in probes:
        searches[f"approximate, {lists or 'sqrt(N)'} lists, {number} probes"] = partial(
            lambda number: knn(values, _NEIGHBOURS, search="approximate", num_probes=number, **options).indices, number
        )
    lines = ["| neighbours | seconds | CPU seconds | recall |", "|---|---:|---:|---:|"]
    for name, search in searches.items():
        result = _timed(name, search)
        recall = np.mean([(result.labels[:, [column]] == exact).any(axis=1) for column in range(_NEIGHBOURS)])
        lines.append(f"| {name} | {result.seconds:.2f} | {result.cpu:.2f} | {recall:.4f} |")
    return lines


def _timed(name: str, function: Callable[[], Labels]) -> Result:
    began, cpu = time.perf_counter(), time.process_time()
    labels = function()
    result = Result(time.perf_counter() - began, time.process_time() - cpu, labels)
    print(f"{name}: {result.seconds:.2f} s, {result.cpu:.2f} CPU s", file=sys.stderr, flush=True)
    return result


def _load(uri: str, rows: int) -> Rows:
    values: Rows = np.load(io.BytesIO(storage.read_bytes(uri)))
    return np.ascontiguousarray(values[: rows or None], np.float32)


def _mixture(rows: int, dim: int, seed: int) -> tuple[Rows, Labels]:
    """Unit rows around N / 100 centres, spread by a normal of 8 dimensions of its own each, and noise in all."""
    rng = np.random.default_rng(seed)
    count = max(1, rows // 100)
    truth = rng.integers(count, size=rows)
    centres, axes = rng.standard_normal((count, dim)) / dim**0.5, rng.standard_normal((count, 8, dim)) / dim**0.5
    values = centres[truth] + 0.04 * rng.standard_normal((rows, dim)) / dim**0.5 * 4
    for label in range(count):
        members = truth == label
        values[members] += 0.08 * rng.standard_normal((int(members.sum()), 8)) @ axes[label]
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32), truth


# ------------------------------------------------------------------------------------------------- the published loop


def _flat_search(values: Rows) -> tuple[Rows, Labels]:
    """(N, 6) squared distances and row numbers, the first column being (nearly always) the row itself."""
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatL2(values.shape[1])
    index.add(values)
    distances, ids = index.search(values, _NEIGHBOURS + 1)
    return distances, ids


def _published(values: Rows) -> Labels:
    """Labels as DeepCluster's PIC computes them, in float64."""
    distances, ids = _flat_search(values)
    size = len(values)
    affinity = np.exp(-distances[:, 1:].astype(np.float64) / _SIGMA**2).ravel()
    starts = np.arange(0, size * _NEIGHBOURS + 1, _NEIGHBOURS)
    directed = scipy.sparse.csr_matrix((affinity, ids[:, 1:].ravel(), starts), shape=(size, size))
    graph = (directed + directed.T).tocsr()
    scores = np.full(size, 1 / size)
    for _ in range(_ITERATIONS):
        scores = _ALPHA * (graph.T @ scores) + (1 - _ALPHA) / size
        scores /= scores.sum()
    return _without_singletons(_basins(_pointers(graph, scores)), ids[:, 1:])


def _pointers(graph: scipy.sparse.csr_matrix, scores: NDArray[np.float64]) -> list[int]:
    """Where each row goes, edge by edge."""
    pointers = list(range(len(scores)))
    for row in range(len(scores)):
        best = 0.0
        for edge in range(graph.indptr[row], graph.indptr[row + 1]):
            other = graph.indices[edge]
            gain = graph.data[edge] * (scores[other] - scores[row])
            if gain > best:
                best, pointers[row] = gain, other
    return pointers


def _basins(pointers: list[int]) -> Labels:
    """Labels (N,): the number of the row where each path ends."""
    numbers = {row: number for number, row in enumerate(row for row, to in enumerate(pointers) if row == to)}
    labels = np.empty(len(pointers), np.int64)
    for row in range(len(pointers)):
        at = row
        while pointers[at] != at:
            at = pointers[at]
        labels[row] = numbers[at]
    return labels


def _without_singletons(labels: Labels, neighbours: Labels) -> Labels:
    """Labels with each singleton moved to the cluster of its first neighbour that is none, counted afresh."""
    sizes, moved = np.bincount(labels), labels.copy()
    for row in np.flatnonzero(sizes[labels] == 1):
        for other in neighbours[row]:
            if sizes[labels[other]] > 1:
                moved[row] = labels[other]
                break
    fresh: Labels = np.unique(moved, return_inverse=True)[1]
    return fresh
