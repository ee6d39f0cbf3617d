"""Oracles of the balanced assignment: linear programmes, plain iterations in float64, equivalences."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment, linprog

import raycluster
from raycluster.clustering.sinkhorn import api as module
from raycluster.clustering.sinkhorn.api import Sinkhorn, sinkhorn
from raycluster.clustering.sinkhorn.rounding import whole_sizes
from raycluster.features.arrays import as_features
from raycluster.types import UserError

SIX = np.array(
    [[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.55, 0.25, 0.2], [0.5, 0.1, 0.4], [0.3, 0.4, 0.3], [0.34, 0.33, 0.33]]
)
FOUR = np.array([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.7, 0.3]])


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return torch.log_softmax(torch.from_numpy(np.asarray(logits, np.float64)), 1).numpy()


def plan(log_probs: np.ndarray, found: Sinkhorn, sharpness: float = 25.0) -> np.ndarray:
    """(N, K) with rows of sum 1."""
    return np.exp(log_softmax(sharpness * log_probs.astype(np.float32).astype(np.float64) + found.scalings[0]))


def plain_scaling(log_probs: np.ndarray, sharpness: float, iterations: int) -> np.ndarray:
    """The published iteration, in the log domain."""
    scores, u = sharpness * log_probs, np.zeros(log_probs.shape[1])
    for _ in range(iterations):
        u -= np.log(np.exp(log_softmax(scores + u)).mean(axis=0) * len(u))
    return u - u.mean()


def optimum(log_probs: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, float]:
    """(labels, mean of -log p) of the cheapest assignment with these sizes."""
    slots = np.repeat(np.arange(len(sizes)), sizes)
    row, window = linear_sum_assignment(-log_probs[:, slots])
    return slots[window], -float(log_probs[row, slots[window]].mean())


@pytest.mark.parametrize(
    ("sharpness", "cost", "labels"),
    [
        (1, 1.08456, [0, 0, 0, 2, 1, 2]),
        (10, 0.86809, [0, 1, 0, 2, 1, 2]),
        (25, 0.85543, [0, 1, 0, 2, 1, 2]),
        (100, 0.85009, [0, 1, 0, 2, 1, 2]),
    ],
)
def test_six_samples(sharpness: float, cost: float, labels: list[int]) -> None:
    log_probs = np.log(SIX)
    found = raycluster.sinkhorn(log_probs, sharpness=sharpness, tolerance=1e-9)
    assert found.labels.tolist() == [labels] and found.converged == [True]
    assert -(plan(log_probs, found, sharpness) * log_probs).sum() / 6 == pytest.approx(cost, abs=6e-6)
    assert found.costs == pytest.approx([-log_probs[np.arange(6), labels].mean()], abs=1e-6)
    exact = raycluster.sinkhorn(log_probs, sharpness=sharpness, rounding="exact")
    assert exact.labels.tolist() == [[0, 1, 0, 2, 1, 2]] and exact.costs == pytest.approx([0.849955], abs=1e-6)
    assert exact.rounding_costs == pytest.approx([exact.costs[0] - found.costs[0]], abs=1e-9)


def test_six_samples_are_the_optimum_of_the_linear_programme() -> None:
    rows, columns = np.kron(np.eye(6), np.ones(3)), np.kron(np.ones(6), np.eye(3))
    marginals = np.concatenate([np.full(6, 1 / 6), np.full(3, 1 / 3)])
    best = linprog(-np.log(SIX).ravel(), A_eq=np.vstack([rows, columns]), b_eq=marginals)
    assert raycluster.sinkhorn(np.log(SIX), rounding="exact").costs == pytest.approx([best.fun], abs=1e-6)


def test_four_samples() -> None:
    ten = raycluster.sinkhorn(np.log(FOUR), sharpness=10, tolerance=1e-9)
    wanted = [[0.99998, 0.00002], [0.93633, 0.06367], [0.00081, 0.99919], [0.06288, 0.93712]]
    np.testing.assert_allclose(plan(np.log(FOUR), ten, 10), wanted, atol=6e-6)
    for sharpness, cost in ((1, 0.798704), (10, 0.620867), (25, 0.612351)):
        found = raycluster.sinkhorn(np.log(FOUR), sharpness=sharpness, tolerance=1e-9)
        assert -(plan(np.log(FOUR), found, sharpness) * np.log(FOUR)).sum() / 4 == pytest.approx(cost, abs=6e-7)
    assert raycluster.sinkhorn(np.log(FOUR)).labels.tolist() == [[0, 0, 1, 1]]


@pytest.mark.parametrize("spread", [1, 3])
def test_random_problems_have_the_cost_of_the_linear_programme(spread: float) -> None:
    log_probs = log_softmax(np.random.default_rng(5).standard_normal((600, 12)) * spread).astype(np.float32)
    best, cost = optimum(log_probs.astype(np.float64), np.full(12, 50))
    found, exact = (raycluster.sinkhorn(log_probs, rounding=rounding) for rounding in ("argmax", "exact"))  # type: ignore[arg-type]
    assert (found.labels[0] == best).mean() >= 0.97
    u = plain_scaling(log_probs.astype(np.float64), 25, 1500)
    assert np.array_equal(found.labels[0], (25 * log_probs.astype(np.float64) + u).argmax(axis=1))
    assert np.all(exact.sizes[0] == 50) and exact.costs[0] == pytest.approx(cost, abs=1e-6)
    assert abs(exact.rounding_costs[0]) < 0.01


def test_marginals_are_met_to_the_tolerance() -> None:
    log_probs = log_softmax(np.random.default_rng(0).standard_normal((601, 13)) * 2)  # not divisible
    for tolerance in (1e-1, 1e-3, 1e-10):
        found = raycluster.sinkhorn(log_probs, tolerance=tolerance)
        error = np.abs(plan(log_probs, found).mean(axis=0) * 13 - 1).max()
        assert error <= 1.1 * tolerance and found.converged == [True]
        assert found.marginal_errors[0] == pytest.approx(error, rel=0.1, abs=1e-12)
    np.testing.assert_allclose(found.scalings[0], plain_scaling(log_probs.astype(np.float32), 25, 1500), atol=1e-6)


def test_constants_added_to_rows_change_nothing() -> None:
    rng = np.random.default_rng(1)
    logits = np.round(rng.standard_normal((300, 9)) * 64) / 64
    shifted = logits + rng.integers(-8, 8, (300, 1))  # exact in float32
    one, two = raycluster.sinkhorn(logits), raycluster.sinkhorn(shifted)
    assert np.array_equal(one.labels, two.labels)
    np.testing.assert_allclose(one.scalings[0], two.scalings[0], atol=1e-9)
    assert one.costs == pytest.approx(two.costs, abs=1e-6)


def test_logits_a_thousand_times_larger() -> None:
    logits = np.random.default_rng(2).standard_normal((500, 20)) * 1000
    found = raycluster.sinkhorn(logits, rounding="exact")
    _, cost = optimum(log_softmax(logits.astype(np.float32)), np.full(20, 25))
    assert np.all(found.sizes[0] == 25) and found.costs[0] == pytest.approx(cost, rel=1e-4)
    assert np.isfinite(found.scalings[0]).all() and np.isfinite(found.marginal_errors).all()


def test_duplicated_rows_fewer_rows_than_clusters_and_one_cluster() -> None:
    rows = np.repeat(np.random.default_rng(3).standard_normal((4, 6)), 30, axis=0)
    found = raycluster.sinkhorn(rows, rounding="exact")
    assert found.sizes[0].tolist() == [20] * 6
    same = raycluster.sinkhorn(np.zeros((10, 3)), rounding="exact")
    assert sorted(same.sizes[0].tolist()) == [3, 3, 4] and same.rounding_costs == pytest.approx([0], abs=1e-12)
    few = raycluster.sinkhorn(np.random.default_rng(4).standard_normal((5, 40)), rounding="exact")
    assert few.sizes[0].max() == 1 and few.sizes[0].sum() == 5 and np.isfinite(few.marginal_errors[0])
    assert raycluster.sinkhorn(np.ones((3, 1))).labels.tolist() == [[0, 0, 0]]


def test_a_prior_with_zeros() -> None:
    logits = np.random.default_rng(6).standard_normal((1000, 5))
    prior = np.array([0.5, 0.3, 0.0, 0.15, 0.05])
    found = raycluster.sinkhorn(logits, prior=7 * prior, rounding="exact", tolerance=1e-6)
    assert found.sizes[0].tolist() == [500, 300, 0, 150, 50] and found.scalings[0][2] == -np.inf
    np.testing.assert_allclose(plan(logits, found).mean(axis=0), prior, atol=1e-6)
    _, cost = optimum(log_softmax(logits.astype(np.float32)), np.array([500, 300, 0, 150, 50]))
    assert found.costs[0] == pytest.approx(cost, abs=1e-6)
    assert raycluster.sinkhorn(logits, prior=prior).sizes[0][2] == 0


def test_largest_remainders() -> None:
    assert whole_sizes(np.full(3, 1 / 3), 6).tolist() == [2, 2, 2]
    assert whole_sizes(np.full(4, 1 / 4), 10).tolist() == [3, 3, 2, 2]
    assert whole_sizes(np.array([0.0, 0.47, 0.53]), 10).tolist() == [0, 5, 5]
    assert whole_sizes(np.array([0.0, 0.44, 0.56]), 10).tolist() == [0, 4, 6]


def test_a_warm_start_needs_fewer_passes_and_finds_the_same() -> None:
    rng = np.random.default_rng(7)
    logits = rng.standard_normal((2000, 30)) * 3
    cold = raycluster.sinkhorn(logits)
    warm = raycluster.sinkhorn(logits + 0.001 * rng.standard_normal(logits.shape), start=cold.scalings[0])
    assert warm.iterations[0] < cold.iterations[0] / 2
    assert raycluster.sinkhorn(logits, start=cold.scalings[0]).iterations == [1]


def test_an_iteration_cap_reports_what_was_reached() -> None:
    logits = np.random.default_rng(8).standard_normal((500, 30)) * 30
    found = raycluster.sinkhorn(logits, max_iterations=5)
    assert found.converged == [False] and found.iterations[0] <= 6 and 1e-3 < found.marginal_errors[0] < np.inf
    assert found.marginal_errors[0] == pytest.approx(np.abs(plan(logits, found).mean(axis=0) * 30 - 1).max(), rel=1e-6)


def test_heads_are_as_good_as_their_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(9)
    values = rng.standard_normal((700, 33)).astype(np.float32)
    heads = [
        (rng.standard_normal((k, 33)).astype(np.float32) * s, rng.standard_normal(k)) for k, s in ((7, 0.02), (90, 1))
    ]
    features = as_features(values)
    together = sinkhorn(features, heads, tolerance=1e-6)
    for index, head in enumerate(heads):
        alone = sinkhorn(features, [head], tolerance=1e-6)
        logits = raycluster.sinkhorn(values.astype(np.float64) @ head[0].T.astype(np.float64) + head[1], tolerance=1e-6)
        assert np.array_equal(together.labels[index], alone.labels[0])
        assert np.array_equal(together.labels[index], logits.labels[0])
        np.testing.assert_allclose(together.scalings[index], logits.scalings[0], atol=2e-3)
    monkeypatch.setattr(module, "_MEMORY", 0)
    monkeypatch.setattr(module, "_MIN_KEPT", 0)  # candidates are computed in every pass
    again = sinkhorn(features, heads, tolerance=1e-6)
    assert np.array_equal(together.labels, again.labels) and again.converged == [True, True]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"heads": []}, "at least one pair"),
        ({"heads": [(np.zeros((3, 4)), np.zeros(3))]}, r"weight \(K, 5\)"),
        ({"heads": [(np.full((3, 5), np.nan), np.zeros(3))]}, "diverged"),
        ({"heads": [(np.full((3, 5), 3e38), np.zeros(3))]}, "overflow"),
        ({"sharpness": 0}, "sharpness must be > 0"),
        ({"tolerance": 0}, "tolerance"),
        ({"priors": [np.array([1, -1, 1, 1, 1])]}, "finite shares"),
        ({"priors": [np.zeros(5)]}, "finite shares"),
        ({"priors": [None, None]}, "one prior per head"),
        ({"start": [np.zeros(4)]}, "start must be"),
    ],
)
def test_invalid_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        sinkhorn(as_features(np.random.default_rng(0).standard_normal((8, 5)) + 1), **arguments)


def test_rows_that_are_not_finite_are_named() -> None:
    logits = np.zeros((6, 3))
    logits[4, 1] = np.nan
    with pytest.raises(UserError, match=r"first samples \[4\]"):
        raycluster.sinkhorn(logits)
