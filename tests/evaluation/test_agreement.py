from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from sklearn.metrics import adjusted_mutual_info_score

from raycluster.evaluation.metrics import agreement
from raycluster.types import UserError

TRUTH = [0, 0, 0, 0, 1, 1, 1, 1]


def test_four_pairs_within_two_classes() -> None:
    figures = {"nmi_arithmetic": 0.666667, "nmi_geometric": 0.707107, "ami": 0.533333, "ari": 0.363636, "purity": 1.0}
    figures |= {"matched_accuracy": 0.5, "class_entropy": 0.0}
    assert agreement.evaluate([0, 0, 1, 1, 2, 2, 3, 3], TRUTH) == pytest.approx(figures, abs=1e-6)


def test_three_clusters_across_two_classes() -> None:
    figures = {"nmi_arithmetic": 0.511962, "nmi_geometric": 0.524716, "ami": 0.383525, "ari": 0.307692, "purity": 0.875}
    figures |= {"matched_accuracy": 0.625, "class_entropy": 3 / 8 * 0.918296}
    assert agreement.evaluate([0, 0, 0, 1, 1, 1, 2, 2], TRUTH) == pytest.approx(figures, abs=1e-6)


def test_the_best_matching_is_found_among_all() -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        labels, truth = rng.integers(0, 5, 60), rng.integers(0, 4, 60)
        best = max(np.mean(np.array([*order])[labels] == truth) for order in permutations([0, 1, 2, 3, -1]))
        assert agreement.evaluate(labels, truth)["matched_accuracy"] == pytest.approx(best)


def test_numbering_and_order_do_not_matter() -> None:
    rng = np.random.default_rng(0)
    labels, truth, order = rng.integers(0, 7, 300), rng.integers(0, 4, 300), rng.permutation(300)
    renamed = rng.permutation(7)[labels] * 10
    assert agreement.evaluate(renamed[order], truth[order]) == pytest.approx(agreement.evaluate(labels, truth))


@pytest.mark.parametrize(
    ("num_samples", "num_clusters", "num_classes"), [(500, 40, 7), (60, 60, 2), (30, 1, 4), (9, 3, 3)]
)
def test_adjustment_for_chance_is_that_of_scikit_learn(num_samples: int, num_clusters: int, num_classes: int) -> None:
    rng = np.random.default_rng(num_samples)
    labels = np.minimum(rng.geometric(2 / (num_clusters + 1), num_samples), num_clusters)
    truth = (labels + rng.integers(0, 2, num_samples)) % num_classes
    found = agreement.evaluate(labels, truth)["ami"]
    assert found == pytest.approx(adjusted_mutual_info_score(truth, labels), abs=1e-9)


@pytest.mark.parametrize("labels", [np.zeros(5, int), np.arange(5)])
def test_equal_labellings_agree_fully_even_if_trivial(labels: np.ndarray) -> None:
    found = agreement.evaluate(labels, labels)
    assert found == pytest.approx(dict.fromkeys(found, 1.0) | {"class_entropy": 0.0})


def test_samples_without_either_label_are_left_out() -> None:
    assert agreement.evaluate([0, 1, -1, 0], [5, 6, 5, -1]) == pytest.approx(agreement.evaluate([0, 1], [5, 6]))


def test_errors_are_named() -> None:
    with pytest.raises(UserError, match=r"\(2,\) and \(3,\)"):
        agreement.evaluate([0, 1], [0, 1, 2])
    with pytest.raises(UserError, match="none of 2 samples"):
        agreement.evaluate([0, 1], [-1, -1])
