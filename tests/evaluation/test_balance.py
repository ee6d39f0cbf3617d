from __future__ import annotations

import math

import numpy as np
import pytest

from raycluster.evaluation.metrics.balance import balance, changed_share, loss_over_chance


def test_equal_sizes_have_full_entropy() -> None:
    assert balance([5, 5, 5, 5]) == pytest.approx(
        {"empty_clusters": 0, "singleton_clusters": 0, "largest_share": 0.25, "size_entropy": 1}
    )


def test_one_cluster_holding_all_has_none() -> None:
    assert balance([0, 9, 0]) == {
        "empty_clusters": 2,
        "singleton_clusters": 0,
        "largest_share": 1,
        "size_entropy": 0,
    }


def test_balance_by_hand() -> None:
    found = balance(np.array([1, 1, 2, 0]))
    assert found["singleton_clusters"] == 2
    assert found["size_entropy"] == pytest.approx(1.5 * math.log(2) / math.log(4))


def test_balance_of_one_or_of_nothing_is_a_number() -> None:
    assert balance([7])["size_entropy"] == 1
    assert balance([0, 0]) == {"empty_clusters": 2, "singleton_clusters": 0, "largest_share": 0, "size_entropy": 0}


def test_changed_share_leaves_out_the_unlabelled() -> None:
    assert changed_share([0, 1, 2, -1], [0, 2, 2, 1]) == pytest.approx(1 / 3)
    assert changed_share([-1], [0]) == 0


def test_loss_over_chance() -> None:
    assert loss_over_chance(math.log(3000), math.log(3000)) == pytest.approx(1)
    assert loss_over_chance(0.3, 0) == 0
