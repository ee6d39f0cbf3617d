"""Nearest neighbours of more rows than one part of the database: exact by every search, and approximate ones."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

import raycluster
from raycluster.clustering.approximate_knn import Search, approximate_neighbours
from raycluster.clustering.knn_graph import neighbours
from raycluster.clustering.search import int8_cpu, nearest_rows
from raycluster.clustering.search.centroids import prepare
from raycluster.clustering.search.nearest_rows import Database, Queries
from raycluster.features.matrix import LocalFeatures
from raycluster.types import Block, UserError

NUM_ROWS = 2200
SUPPORT = int8_cpu.support()
SEARCHES: list[Search] = ["exact", "approximate"]


def mixture(dim: int = 24) -> np.ndarray:
    rng = np.random.default_rng(0)
    rows: np.ndarray = rng.standard_normal((40, dim))[rng.integers(40, size=NUM_ROWS)]
    return (rows + 0.5 * rng.standard_normal((NUM_ROWS, dim))).astype(np.float32)


KINDS: dict[str, Callable[[], np.ndarray]] = {
    "clusters": mixture,
    "noise": lambda: np.random.default_rng(1).standard_normal((NUM_ROWS, 70)).astype(np.float32),
    "integers": lambda: np.rint(mixture(6)),
    "copies": lambda: np.repeat(mixture(7)[:440], 5, axis=0),
    "many copies": lambda: np.repeat(mixture(7)[:22], 100, axis=0),
    "by cluster": lambda: mixture()[np.argsort(mixture()[:, 0])],
    "far": lambda: mixture() + np.float32(1000),
    "one far": lambda: np.where(np.arange(NUM_ROWS)[:, None] == 5, np.float32(1e4), mixture()),
    "large": lambda: mixture() * np.float32(1e15),
    "float16": lambda: mixture().astype(np.float16),
}


def naive(rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    values = rows.astype(np.float64)
    ids, distances = [], []
    for row in range(len(rows)):
        distance = np.square(values - values[row]).sum(axis=1)
        distance[row] = np.inf
        order = np.argsort(distance, kind="stable")[:k]
        ids.append(order)
        distances.append(distance[order])
    return np.array(ids), np.array(distances)


def blocks(values: np.ndarray, num_blocks: int) -> LocalFeatures:
    order = np.random.default_rng(num_blocks).permutation(len(values))
    return LocalFeatures([Block(part, values[part]) for part in np.array_split(order, num_blocks)])


@pytest.mark.parametrize("kind", KINDS)
def test_exact_neighbours_are_those_of_float64(kind: str) -> None:
    rows = KINDS[kind]()
    found, wanted = raycluster.knn(rows, 5), naive(rows, 5)
    assert np.array_equal(found.indices, wanted[0])
    np.testing.assert_allclose(found.distances, wanted[1], rtol=1e-6)


@pytest.mark.skipif(SUPPORT is None, reason="needs a C compiler")
@pytest.mark.parametrize("support", [level for level in (0, 1, 2) if level <= (SUPPORT or 0)])
@pytest.mark.parametrize("dim", [1, 3, 64, 65])
def test_the_kernel_finds_what_the_limits_allow(monkeypatch: pytest.MonkeyPatch, support: int, dim: int) -> None:
    monkeypatch.setattr(int8_cpu, "support", lambda: support)
    rng = np.random.default_rng(dim)
    values, database = (rng.standard_normal((size, dim)).astype(np.float32) for size in (100, 333))
    distances = np.square(values.astype(np.float64)[:, None] - database[None]).sum(axis=2)
    limits = np.sort(distances, axis=1)[:, 4]
    prepared = prepare(database)
    assert prepared.packed is not None
    queries = Queries(values, np.full(100, -1), limits)
    counts, columns = int8_cpu.reaching(values, prepared.packed, nearest_rows.score_floors(queries, prepared))
    assert (counts >= 0).mean() > 0.9
    for row in np.flatnonzero(counts >= 0):
        assert set(np.flatnonzero(distances[row] <= limits[row])) <= set(columns[row, : counts[row]])
    found, _ = nearest_rows.nearest_rows(queries, Database(prepared, np.arange(333)), 3)
    assert np.array_equal(found, np.argsort(distances, axis=1)[:, :3])


def test_exact_neighbours_without_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = mixture()
    wanted = raycluster.knn(rows, 5)
    monkeypatch.setattr(nearest_rows, "resolve_engine", lambda engine: "torch")
    found = raycluster.knn(rows, 5)
    assert np.array_equal(found.indices, wanted.indices) and np.array_equal(found.distances, wanted.distances)


@pytest.mark.parametrize("kind", KINDS)
def test_approximate_neighbours_are_exact_where_all_lists_are_probed(kind: str) -> None:
    rows = KINDS[kind]()
    found, wanted = (raycluster.knn(rows, 5, search="approximate", num_probes=1000), raycluster.knn(rows, 5))
    assert np.array_equal(found.indices, wanted.indices) and np.array_equal(found.distances, wanted.distances)


def test_approximate_neighbours_are_near_and_their_distances_exact() -> None:
    rows, recalls = KINDS["noise"](), []
    exact = raycluster.knn(rows, 5)
    for num_probes in (1, 8, 32):
        found = raycluster.knn(rows, 5, search="approximate", num_probes=num_probes)
        assert (found.indices >= 0).all() and (found.indices != np.arange(NUM_ROWS)[:, None]).all()
        difference = rows[found.indices].astype(np.float64) - rows[:, None]
        np.testing.assert_allclose(found.distances, np.square(difference).sum(axis=2), rtol=1e-6)
        recalls.append(np.mean([np.isin(*pair).mean() for pair in zip(found.indices, exact.indices, strict=True)]))
    assert recalls[0] < recalls[1] < recalls[2], "rows without clusters are the hardest"
    pairs = zip(*(raycluster.knn(mixture(), 5, search=search).indices for search in SEARCHES), strict=True)
    assert np.mean([np.isin(*pair).mean() for pair in pairs]) > 0.98


@pytest.mark.parametrize("search", [neighbours, approximate_neighbours])
def test_any_blocks_in_any_order_are_bitwise_identical(search: Callable[..., tuple[np.ndarray, np.ndarray]]) -> None:
    rows = mixture()
    found = [search(blocks(rows, count), 5) for count in (1, 2, 7, 64)]
    assert len({ids.tobytes() + distances.tobytes() for ids, distances in found}) == 1


@pytest.mark.parametrize("rows", [np.ones((50, 3)), np.repeat(mixture(4)[:3], 20, axis=0), mixture(4)[:7]])
def test_few_distinct_rows_make_few_lists(rows: np.ndarray) -> None:
    exact = raycluster.knn(rows, 6)
    found = raycluster.knn(rows, 6, search="approximate", num_lists=50, num_probes=1)
    assert (found.indices >= 0).all() and np.array_equal(found.distances[:, 0], exact.distances[:, 0])


def test_lists_without_effect_and_impossible_ones_are_refused() -> None:
    rows = mixture()
    with pytest.raises(UserError, match="have no effect on an exact search"):
        raycluster.knn(rows, 5, num_probes=4)
    with pytest.raises(UserError, match="must be at least 1; seen 0 and None"):
        raycluster.knn(rows, 5, search="approximate", num_lists=0)
    with pytest.raises(UserError, match=r"num_probes must be an integer; seen 1\.5"):
        raycluster.knn(rows, 5, search="approximate", num_probes=1.5)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="search must be one of exact, approximate; seen 'ivf'"):
        raycluster.knn(rows, 5, search="ivf")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="below the number of rows, 2200; seen 2200"):
        raycluster.knn(rows, 2200, search="approximate")
