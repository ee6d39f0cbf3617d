"""Scores without labels: by hand, at their limits, and what they do not depend on."""

from __future__ import annotations

import numpy as np
import pytest

from raycluster.evaluation.metrics.label_free import evaluate


def test_by_hand() -> None:
    """Four directions, pairs of neighbours; with 3 neighbours each, every row meets all others: share 1/3 = chance."""
    x = np.array([[1, 0.1], [1, -0.1], [-1, 0.1], [-1, -0.1]], np.float32)
    assert evaluate(x, np.array([0, 0, 1, 1]))["intra_cluster_edges"] == pytest.approx(0)
    # x^T x = diag(4, 0.04), singular values 2 and 0.2, shares 10/11 and 1/11.
    entropy = -(10 / 11 * np.log(10 / 11) + 1 / 11 * np.log(1 / 11))
    assert evaluate(x, np.array([0, 0, 1, 1]))["effective_rank"] == pytest.approx(np.exp(entropy), rel=1e-6)


@pytest.fixture(scope="module")
def groups() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 5, 400)
    return (np.eye(5)[truth] * 10 + rng.normal(size=(400, 5))).astype(np.float32), truth


def test_clusters_that_are_neighbourhoods_score_one_and_random_ones_zero(groups: tuple[np.ndarray, np.ndarray]) -> None:
    x, truth = groups
    assert evaluate(x, truth)["intra_cluster_edges"] == pytest.approx(1, abs=1e-3)
    assert evaluate(x, np.random.default_rng(1).permutation(truth))["intra_cluster_edges"] == pytest.approx(0, abs=0.05)
    assert evaluate(x, np.zeros(400, int))["intra_cluster_edges"] == 0  # nothing is left to gain


def test_names_scale_and_samples_without_a_cluster_do_not_matter(groups: tuple[np.ndarray, np.ndarray]) -> None:
    x, truth = groups
    some = np.where(np.arange(400) < 300, truth, -1)
    expected = evaluate(x[:300], truth[:300])["intra_cluster_edges"]
    assert evaluate(x, some)["intra_cluster_edges"] == expected
    assert evaluate(x[:300] * 4, 7 - truth[:300])["intra_cluster_edges"] == expected


def test_rank_counts_directions() -> None:
    orthogonal = np.linalg.qr(np.random.default_rng(0).normal(size=(50, 8)))[0]
    nobody = np.full(50, -1)
    assert evaluate(orthogonal, nobody)["effective_rank"] == pytest.approx(8)
    collapsed = np.outer(np.ones(50), np.arange(1, 9))
    assert evaluate(collapsed, nobody)["effective_rank"] == pytest.approx(1, abs=1e-4)
    assert evaluate(collapsed, nobody)["intra_cluster_edges"] == 0
