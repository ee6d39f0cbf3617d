"""Power iteration clustering against the published loop: flat search of faiss, mode seeking row by row in Python."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import faiss
import numpy as np
import scipy.sparse
import torch
from numpy.typing import NDArray

from raycluster import knn
from raycluster.clustering.power_iteration import cluster_graph
from raycluster.evaluation.metrics.agreement import mutual_information
from raycluster.io import storage

_NEIGHBOURS = 5
_SIGMA = 0.2
_ALPHA = 0.001
_ITERATIONS = 200

Rows = NDArray[np.float32]
Labels = NDArray[np.int64]


class Graph(NamedTuple):
    """indices, distances: (N, 5) row numbers of the neighbours, nearest first, and squared distances."""

    indices: Labels
    distances: Rows


class Timed(NamedTuple):
    """What a function returned, and its seconds of wall clock and of all processors."""

    value: Any
    seconds: float
    cpu: float


def run(before: str = "", rows: int = 100_000, dim: int = 256, probes: str = "", seed: int = 0) -> str:
    """A table: seconds for the graph of 5 neighbours and for its clusters, recall of the neighbours, NMI of the labels.

    before: .npy embeddings (see `embeddings`); rows of a mixture if empty, whose components are the truth. rows: number
    of rows, 0 for all. dim: of the mixture. probes: of further approximate searches, separated by commas; `8/100` are 8
    probes of 100 lists. CPU seconds are robust to other load on the machine.
    """
    values, truth = (load_rows(before, rows), None) if before else mixture(rows, dim, seed)
    knn(values[:4096], _NEIGHBOURS)  # compiles the kernel
    searches: dict[str, Callable[[], Any]] = {
        "raycluster, exact": lambda: knn(values, _NEIGHBOURS),
        "raycluster, approximate": lambda: knn(values, _NEIGHBOURS, search="approximate"),
    }
    for words in filter(None, probes.split(",")):
        number, _, lists = words.partition("/")
        options = {"num_probes": int(number), "num_lists": int(lists) if lists else None}
        searches[f"raycluster, {words} probes"] = partial(knn, values, _NEIGHBOURS, search="approximate", **options)
    base = _measured("published", lambda: _flat_search(values), _published)
    found = {"published": base} | {name: _measured(name, search, _ours) for name, search in searches.items()}
    exact = found["raycluster, exact"][0].value.indices
    lines = [f"{len(values)} x {values.shape[1]}, {torch.get_num_threads()} threads", ""]
    titles = ["graph, s", "clusters, s", "CPU s", "recall", "clusters", "NMI published", "NMI truth", "faster", "CPU"]
    lines += [f"| method | {' | '.join(titles)} |", f"|---|{'---:|' * len(titles)}"]
    return "\n".join([*lines, *(_row(name, *result, base, exact, truth) for name, result in found.items())])


def _measured(name: str, search: Callable[[], Any], cluster: Callable[[Any], Labels]) -> tuple[Timed, Timed]:
    graph = timed(f"{name}, graph", search)
    return graph, timed(f"{name}, clusters", lambda: cluster(graph.value))


def timed(name: str, function: Callable[[], Any]) -> Timed:
    """Call a function, and print how long it took."""
    began, cpu = time.perf_counter(), time.process_time()
    value = function()
    result = Timed(value, time.perf_counter() - began, time.process_time() - cpu)
    print(f"{name}: {result.seconds:.2f} s, {result.cpu:.2f} CPU s", file=sys.stderr, flush=True)
    return result


def _row(
    name: str, graph: Timed, clusters: Timed, base: tuple[Timed, Timed], exact: Labels, truth: Labels | None
) -> str:
    labels, indices = clusters.value, graph.value.indices
    recall = np.mean([(indices[:, [column]] == exact).any(axis=1) for column in range(_NEIGHBOURS)])
    agreement = mutual_information(labels, base[1].value)
    known = "" if truth is None else f"{mutual_information(labels, truth):.4f}"
    seconds, cpu = graph.seconds + clusters.seconds, graph.cpu + clusters.cpu
    return (
        f"| {name} | {graph.seconds:.1f} | {clusters.seconds:.1f} | {cpu:.1f} | {recall:.4f} | {labels.max() + 1} "
        f"| {agreement:.4f} | {known} | {sum(part.seconds for part in base) / seconds:.1f} "
        f"| {sum(part.cpu for part in base) / cpu:.1f} |"
    )


def _ours(graph: Any) -> Labels:
    options: dict[str, Any] = {"alpha": _ALPHA, "iterations": _ITERATIONS, "singletons": "redistribute"}
    samples = np.arange(len(graph.indices))
    return cluster_graph(samples, graph.indices, graph.distances, sigma=_SIGMA, **options).labels


def load_rows(uri: str, rows: int) -> Rows:
    """The first rows of .npy embeddings, 0 for all."""
    values: Rows = np.load(io.BytesIO(storage.read_bytes(uri)))
    return np.ascontiguousarray(values[: rows or None], np.float32)


def mixture(rows: int, dim: int, seed: int) -> tuple[Rows, Labels]:
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


def _flat_search(values: Rows) -> Graph:
    """Neighbours by faiss; the first of 6 is taken for the row itself, as published."""
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatL2(values.shape[1])
    index.add(values)
    distances, ids = index.search(values, _NEIGHBOURS + 1)
    return Graph(ids[:, 1:], distances[:, 1:])


def _published(found: Graph) -> Labels:
    """Labels as DeepCluster's PIC computes them, in float64."""
    size = len(found.indices)
    affinity = np.exp(-found.distances.astype(np.float64) / _SIGMA**2).ravel()
    starts = np.arange(0, size * _NEIGHBOURS + 1, _NEIGHBOURS)
    directed = scipy.sparse.csr_matrix((affinity, found.indices.ravel(), starts), shape=(size, size))
    graph = (directed + directed.T).tocsr()
    scores = np.full(size, 1 / size)
    for _ in range(_ITERATIONS):
        scores = _ALPHA * (graph.T @ scores) + (1 - _ALPHA) / size
        scores /= scores.sum()
    return _without_singletons(_basins(_pointers(graph, scores)), found.indices)


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
