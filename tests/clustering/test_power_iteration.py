"""Power iteration clustering: hand-made graphs, a direct solution, equal rows, any blocks, singletons."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg

import raycluster
from raycluster.clustering.power_iteration import (
    PowerIterationClustering,
    affinities,
    power_iteration_clustering,
    redistribute,
    seek_modes,
    stationary_excess,
)
from raycluster.features.matrix import LocalFeatures
from raycluster.types import Block, UserError

ALPHA = 0.001
STAR = [(0, leaf, 1.0) for leaf in range(1, 6)]
TWO_STARS = [(0, 1, 1.0), (0, 2, 1.0), (0, 3, 1.0), (4, 5, 1.0), (4, 6, 1.0), (4, 7, 1.0), (3, 7, 0.1)]


def graph(num_rows: int, edges: list[tuple[int, int, float]]) -> scipy.sparse.csr_array:
    dense = np.zeros((num_rows, num_rows))
    for left, right, weight in edges:
        dense[left, right] = dense[right, left] = weight
    return scipy.sparse.csr_array(dense)


def stationary(excess: np.ndarray) -> np.ndarray:
    return (1 + excess) / (1 + excess).sum()


def mixture(num_rows: int = 900, dim: int = 12, seed: int = 0) -> np.ndarray:
    """Rows around 30 centres, at about 0.2 from their neighbours."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((30, dim))
    rows: np.ndarray = centres[rng.integers(30, size=num_rows)] + 0.07 * rng.standard_normal((num_rows, dim))
    return rows.astype(np.float32)


def blocks(values: np.ndarray, num_blocks: int, seed: int) -> LocalFeatures:
    order = np.random.default_rng(seed).permutation(len(values))
    return LocalFeatures([Block(part, values[part]) for part in np.array_split(order, num_blocks)])


def arrays(found: PowerIterationClustering) -> bytes:
    return b"".join(array.tobytes() for array in (found.samples, found.labels, found.roots, found.scores))


def published(weights: scipy.sparse.csr_array, iterations: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """The vector and the roots of all rows, step by step as the published code computes them."""
    size = weights.shape[0]
    scores = np.full(size, 1 / size)
    for _ in range(iterations):
        scores = ALPHA * (weights.T @ scores) + (1 - ALPHA) / size
        scores = scores / scores.sum()
    dense, roots = weights.toarray(), []
    for row in range(size):
        while (gains := dense[row] * (scores - scores[row])).max() > 0:
            row = int(gains.argmax())
        roots.append(row)
    return scores, np.array(roots)


def test_a_star_is_one_cluster() -> None:
    weights = graph(6, STAR)
    excess = stationary_excess(weights, ALPHA, 200)
    np.testing.assert_allclose(stationary(excess), [0.16722] + [0.16656] * 5, atol=5e-6)
    assert seek_modes(weights, excess).tolist() == [0] * 6


def test_two_stars_joined_by_a_weak_edge_and_an_isolated_row() -> None:
    weights = graph(9, TWO_STARS)
    excess = stationary_excess(weights, ALPHA, 200)
    hub, leaf, joined, isolated = 1.001642, 0.999645, 0.999745, 0.998644
    wanted = [hub, leaf, leaf, joined, hub, leaf, leaf, joined, isolated]
    np.testing.assert_allclose(9 * stationary(excess), wanted, atol=6e-7)
    roots = seek_modes(weights, excess)
    assert roots.tolist() == [0, 0, 0, 0, 4, 4, 4, 4, 8]
    neighbours = np.array([[1, 2]] * 8 + [[8, 1]])  # the first neighbour is a singleton itself
    labels = np.unique(roots, return_inverse=True)[1]
    assert redistribute(labels, neighbours).tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 0]
    neighbours[8] = 8
    assert redistribute(labels, neighbours).tolist() == labels.tolist(), "none of its neighbours has a larger cluster"


def test_singletons_move_by_the_clusters_before_any_move() -> None:
    labels, neighbours = np.array([0, 0, 1, 2]), np.array([[1], [0], [3], [0]])
    assert redistribute(labels, neighbours).tolist() == [0, 0, 1, 0]


@pytest.mark.parametrize("alpha", [0.001, 0.3, 0.9])
def test_the_vector_solves_its_equation(alpha: float) -> None:
    """s v = alpha W v + (1 - alpha) / n, where s is the sum of the right-hand side."""
    neighbours, distances = neighbours_of(mixture())
    weights = affinities(neighbours, distances, 0.2)
    steps = 200 if alpha < 0.1 else 20_000  # large alphas converge slowly
    found = stationary(stationary_excess(weights, alpha, steps))
    size = len(found)
    total = (alpha * (weights @ found) + (1 - alpha) / size).sum()
    matrix = scipy.sparse.csc_array(total * scipy.sparse.eye_array(size) - alpha * weights)
    solved = scipy.sparse.linalg.spsolve(matrix, np.full(size, (1 - alpha) / size))
    np.testing.assert_allclose(found, solved, rtol=2e-15 if alpha < 0.1 else 1e-9)


def test_steps_and_modes_are_those_of_the_published_loop() -> None:
    neighbours, distances = neighbours_of(mixture())
    weights = affinities(neighbours, distances, 0.2)
    for iterations in (1, 2, 200):
        excess = stationary_excess(weights, ALPHA, iterations)
        scores, roots = published(weights, iterations)
        np.testing.assert_allclose(stationary(excess), scores, rtol=1e-14)
        assert np.array_equal(seek_modes(weights, excess), roots)
    assert 30 <= len(np.unique(roots)) < 300


def test_alpha_001_clusters_by_weighted_degrees() -> None:
    neighbours, distances = neighbours_of(mixture(seed=1))
    weights = affinities(neighbours, distances, 0.2)
    excess = stationary_excess(weights, ALPHA, 200)
    assert np.array_equal(seek_modes(weights, excess), seek_modes(weights, weights.sum(axis=1)))


def test_affinities_that_vanish_beside_one_still_count() -> None:
    """At this bandwidth affinities are below 1e-13: in v itself they would be rounded away."""
    rows = mixture()
    neighbours, distances = neighbours_of(rows)
    weights = affinities(neighbours, distances, 0.03)
    assert 0 < np.median(weights.data) < 1e-13
    excess = stationary_excess(weights, ALPHA, 200)
    assert np.array_equal(seek_modes(weights, excess), seek_modes(weights, weights.sum(axis=1)))


def test_mutual_edges_count_twice() -> None:
    weights = affinities(np.array([[1], [0], [1]]), np.array([[0.04], [0.04], [0.08]], np.float32), 0.2)
    once, far = np.exp(-1), np.exp(-2)
    np.testing.assert_allclose(weights.toarray(), [[0, 2 * once, 0], [2 * once, 0, far], [0, far, 0]], rtol=1e-6)


@pytest.mark.parametrize("search", ["exact", "approximate"])
def test_any_blocks_in_any_order_are_bitwise_identical(search: str) -> None:
    rows = mixture(2200)
    found = [power_iteration_clustering(blocks(rows, count, count), search=search) for count in (1, 2, 7, 64)]  # type: ignore[arg-type]
    assert len({arrays(one) for one in found}) == 1
    public = raycluster.power_iteration_clustering(rows, search=search)  # type: ignore[arg-type]
    assert arrays(public) == arrays(found[0])


def test_clusters_are_numbered_by_their_roots() -> None:
    found = raycluster.power_iteration_clustering(mixture())
    assert found.num_clusters == len(found.roots) == found.labels.max() + 1
    assert np.array_equal(found.labels[found.roots], np.arange(found.num_clusters))
    assert (np.diff(found.roots) > 0).all() and found.scores.sum() == pytest.approx(1)
    for label, root in enumerate(found.roots[:10]):
        assert found.scores[root] == found.scores[found.labels == label].max()


def test_singletons_are_redistributed_kept_or_discarded() -> None:
    rows = np.concatenate([mixture(600), 3 * np.random.default_rng(5).standard_normal((40, 12)).astype(np.float32)])
    kept, moved, left = (
        raycluster.power_iteration_clustering(rows, num_neighbours=2, singletons=mode)  # type: ignore[arg-type]
        for mode in ("keep", "redistribute", "discard")
    )
    alone = np.bincount(kept.labels)[kept.labels] == 1
    assert kept.num_singletons == moved.num_singletons == left.num_singletons == alone.sum() > 5
    assert np.array_equal(left.labels == -1, alone) and left.num_clusters == kept.num_clusters - alone.sum()
    assert left.num_clusters <= moved.num_clusters < kept.num_clusters
    assert np.array_equal(moved.roots[moved.labels[~alone]], kept.roots[kept.labels[~alone]])
    assert (moved.labels >= 0).all() and np.bincount(moved.labels).min() >= 1


def test_equal_rows() -> None:
    same = np.ones((40, 3), np.float32)
    assert raycluster.power_iteration_clustering(same).num_clusters == 1
    kept = raycluster.power_iteration_clustering(same, singletons="keep")
    assert kept.roots.tolist() == [0, 1, 2, 3, 4] and np.bincount(kept.labels).tolist() == [36, 1, 1, 1, 1]
    assert raycluster.power_iteration_clustering(same[:6]).num_clusters == 6, "complete graph: all scores are equal"
    assert raycluster.power_iteration_clustering(same[:6], singletons="discard").num_clusters == 0


def test_copies_are_neighbours_and_no_row_is_its_own() -> None:
    rows = np.repeat(mixture(300), 2, axis=0)
    neighbours, _ = neighbours_of(rows)
    assert np.array_equal(neighbours[:, 0], np.arange(600) ^ 1)
    found = raycluster.power_iteration_clustering(rows)
    assert (found.labels[::2] == found.labels[1::2]).mean() > 0.95


def test_rows_too_far_from_all_others_are_singletons() -> None:
    rows = np.concatenate([mixture(400), np.full((1, 12), 50, np.float32)])
    kept = raycluster.power_iteration_clustering(rows, singletons="keep")
    assert np.bincount(kept.labels)[kept.labels[400]] == 1 and 400 in kept.roots
    moved = raycluster.power_iteration_clustering(rows)
    assert np.bincount(moved.labels)[moved.labels[400]] > 1


def test_bad_input_is_named() -> None:
    rows = mixture(60)
    for bad, message in (
        ({"num_neighbours": 60}, "num_neighbours must be at least 1 and below the number of rows, 60; seen 60"),
        ({"num_neighbours": 0}, "seen 0"),
        ({"num_neighbours": 2.5}, r"num_neighbours must be an integer; seen 2\.5"),
        ({"sigma": 0.0}, "sigma must be positive"),
        ({"sigma": 1e-200}, "sigma must be positive"),
        ({"sigma": float("nan")}, "sigma must be positive"),
        ({"alpha": 1.0}, "alpha between 0 and 1"),
        ({"iterations": 0}, "iterations at least 1"),
        ({"singletons": "drop"}, "singletons must be one of redistribute, keep, discard; seen 'drop'"),
        ({"search": "fast"}, "search must be one of exact, approximate; seen 'fast'"),
        (
            {"sigma": 1e-4},
            r"all affinities .* are 0 at sigma = 0\.0001, .* about 2",
        ),
    ):
        with pytest.raises(UserError, match=message):
            raycluster.power_iteration_clustering(rows, **bad)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="below the number of rows, 1; seen 5"):
        raycluster.power_iteration_clustering(rows[:1])
    rows[7, 3] = np.nan
    with pytest.raises(UserError, match=r"\[7\]"):
        raycluster.power_iteration_clustering(rows)


def neighbours_of(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    found = raycluster.knn(rows, 5)
    return found.indices, found.distances
