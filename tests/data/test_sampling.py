from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from raycluster.data.sampling import (
    misaligned,
    one_visit_each,
    uniform_over_clusters,
    uniform_within_groups,
    whole_batches,
)
from raycluster.types import UserError

labels_of_samples = st.lists(st.integers(-2, 6), min_size=1, max_size=60).filter(lambda some: max(some) >= 0)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_clusters_of_one_two_five_and_no_images_by_hand() -> None:
    labels = np.array([0, 1, 1, 2, 2, 2, 2, 2])
    counts = uniform_over_clusters(labels, 9, rng())
    assert np.bincount(labels, counts).tolist() == [3, 3, 3]
    assert counts[0] == 3
    assert sorted(counts[1:3]) == [1, 2]
    assert sorted(counts[3:]) == [0, 0, 1, 1, 1]
    counts = uniform_over_clusters(labels, 8, rng())
    assert counts.sum() == 8
    assert sorted(np.bincount(labels, counts)) == [2, 3, 3]


def test_the_sampler_of_the_published_code_keeps_the_skew() -> None:
    """A cluster with half of 20,000 images in 20: half of the visits are its own, and 47.5 % of the images have any."""
    shares = []
    for seed in range(8):
        labels = rng(seed).permutation(np.r_[np.zeros(10_000, int), 1 + np.arange(10_000) % 19])
        counts = misaligned(labels, 20_000, rng(seed + 100))
        assert counts.sum() == 20_000
        assert np.mean(counts > 0) == pytest.approx((1 - np.exp(-1.9)) / 2 + 0.1 / 2, abs=0.005)
        shares.append(counts[labels == 0].sum() / 20_000)
    assert all(0.47 < share < 0.53 for share in shares) and np.mean(shares) == pytest.approx(0.5, abs=0.01)
    assert uniform_over_clusters(labels, 20_000, rng())[labels == 0].sum() / 20_000 == 0.05


@given(labels=labels_of_samples, num_rows=st.integers(0, 200), seed=st.integers(0, 9))
def test_the_sampler_of_the_published_code_visits_included_samples_only(
    labels: list[int], num_rows: int, seed: int
) -> None:
    known = np.array(labels)
    counts = misaligned(known, num_rows, rng(seed))
    assert counts.dtype == np.int64 and counts.sum() == num_rows and (counts[known < 0] == 0).all()


@given(labels=labels_of_samples, num_rows=st.integers(0, 200), seed=st.integers(0, 9))
def test_the_histogram_is_flat_up_to_one(labels: list[int], num_rows: int, seed: int) -> None:
    known = np.array(labels)
    counts = uniform_over_clusters(known, num_rows, rng(seed))
    assert counts.dtype == np.int64
    assert counts.sum() == num_rows
    assert (counts[known < 0] == 0).all()
    visits = [counts[known == cluster] for cluster in np.unique(known[known >= 0])]
    totals = [some.sum() for some in visits]
    assert max(totals) - min(totals) <= 1
    assert all(some.max() - some.min() <= 1 for some in visits)


def _by_sorting(labels: NDArray[np.int64], num_rows: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """The same draws: in each cluster, the rows with the smallest random numbers have one more visit."""
    included = np.flatnonzero(labels >= 0)
    _, cluster, sizes = np.unique(labels[included], return_inverse=True, return_counts=True)
    visits = np.full(len(sizes), num_rows // len(sizes))
    visits[rng.permutation(len(sizes))[: num_rows % len(sizes)]] += 1
    order = np.lexsort((rng.random(len(included)), cluster))
    rank = np.empty(len(included), np.int64)
    rank[order] = np.arange(len(included)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    counts = np.zeros(len(labels), np.int64)
    counts[included] = visits[cluster] // sizes[cluster] + (rank < visits[cluster] % sizes[cluster])
    return counts


@given(labels=labels_of_samples, num_rows=st.integers(0, 200), seed=st.integers(0, 9))
def test_the_draws_are_those_of_sorting(labels: list[int], num_rows: int, seed: int) -> None:
    known = np.array(labels)
    assert (
        uniform_over_clusters(known, num_rows, rng(seed)).tolist() == _by_sorting(known, num_rows, rng(seed)).tolist()
    )


def test_the_draws_of_many_rows_are_those_of_sorting() -> None:
    labels = rng(1).integers(-1, 5000, 600_000).astype(np.int32)
    assert (uniform_over_clusters(labels, 500_000, rng()) == _by_sorting(labels, 500_000, rng())).all()


class _Coarse(np.random.Generator):
    """Random numbers that are often equal."""

    def random(self, size: int) -> NDArray[np.float64]:
        return np.floor(super().random(size) * 4) / 4

    def __deepcopy__(self, memo: object) -> _Coarse:
        return _Coarse(deepcopy(self.bit_generator))


@given(labels=labels_of_samples, num_rows=st.integers(0, 200), seed=st.integers(0, 9))
def test_of_rows_with_equal_keys_the_first_ones_are_drawn(labels: list[int], num_rows: int, seed: int) -> None:
    known = np.array(labels)
    ours, theirs = (f(known, num_rows, _Coarse(np.random.PCG64(seed))) for f in (uniform_over_clusters, _by_sorting))
    assert ours.tolist() == theirs.tolist()


@given(labels=labels_of_samples, num_rows=st.integers(0, 200), seed=st.integers(0, 9))
def test_groups_get_equal_shares_and_clusters_equal_ones_inside(labels: list[int], num_rows: int, seed: int) -> None:
    known = np.array(labels)
    groups = np.where(known >= 0, np.array([0, 0, 0, 0, 1, 2, 2])[known.clip(0)], -1)
    counts = uniform_within_groups(known, groups, num_rows, rng(seed))
    assert counts.sum() == num_rows and (counts[known < 0] == 0).all()
    shares = [counts[groups == group].sum() for group in np.unique(groups[known >= 0])]
    assert max(shares) - min(shares) <= 1
    for group in np.unique(groups[known >= 0]):
        totals = [counts[known == cluster].sum() for cluster in np.unique(known[groups == group])]
        assert max(totals) - min(totals) <= 1
    for cluster in np.unique(known[known >= 0]):
        visits = counts[known == cluster]
        assert visits.max() - visits.min() <= 1


def test_which_images_are_drawn_is_left_to_chance() -> None:
    labels = np.array([0] * 10 + [1] * 2)
    drawn = sum(uniform_over_clusters(labels, 10, rng(seed)) for seed in range(400))
    assert np.abs(drawn[:10] - 200).max() < 50
    odd = sum(uniform_over_clusters(labels, 11, rng(seed))[:10].sum() == 6 for seed in range(400))
    assert abs(odd - 200) < 50


@given(labels=labels_of_samples, order=st.randoms(use_true_random=False))
def test_samples_keep_their_labels_under_any_numbering(labels: list[int], order) -> None:
    known = np.array(labels)
    shuffled = np.array(order.sample(range(len(labels)), len(labels)))
    counts = uniform_over_clusters(known[shuffled], 50, rng())
    visits = {(int(shuffled[row]), int(known[shuffled][row])) for row in np.flatnonzero(counts)}
    assert all(labels[sample] == label >= 0 for sample, label in visits)


@given(labels=labels_of_samples, extra=st.integers(0, 150), seed=st.integers(0, 9))
def test_once_visits_all_and_tops_up(labels: list[int], extra: int, seed: int) -> None:
    known = np.array(labels)
    included = known >= 0
    counts = one_visit_each(known, int(included.sum()) + extra, rng(seed))
    assert counts.sum() == included.sum() + extra
    assert (counts[~included] == 0).all()
    assert counts[included].min() >= 1
    assert counts[included].max() - counts[included].min() <= 1


def test_rows_fill_whole_batches() -> None:
    assert [whole_batches(n, 256) for n in (1, 255, 256, 257, 50_000)] == [256, 256, 256, 512, 50_176]


def test_errors_are_told() -> None:
    with pytest.raises(UserError, match="none of 3 samples has a label"):
        uniform_over_clusters(np.array([-1, -1, -1]), 8, rng())
    with pytest.raises(ValueError, match="2 rows cannot visit each of 3"):
        one_visit_each(np.zeros(3, int), 2, rng())
