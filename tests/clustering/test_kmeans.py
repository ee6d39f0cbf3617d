from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raycluster.clustering import fixed_point, row_cache
from raycluster.clustering.fixed_point import ClusterSums, PendingRows, merge, sum_scale
from raycluster.clustering.kmeans import incremental
from raycluster.clustering.kmeans.lloyd import kmeans
from raycluster.clustering.kmeans.result import KMeans
from raycluster.clustering.search.assign import Engine, nearest
from raycluster.clustering.search.centroids import prepare
from raycluster.features.matrix import FeatureStats, LocalFeatures
from raycluster.types import Block, UserError

LINE = np.array([[0], [1], [2], [9], [10], [11], [20]], np.float32)


def _features(values: np.ndarray, num_blocks: int = 1, order_seed: int | None = None) -> LocalFeatures:
    parts = np.array_split(np.arange(len(values)), num_blocks)
    if order_seed is not None:
        rng = np.random.default_rng(order_seed)
        rows = rng.permutation(len(values))
        cuts = np.sort(rng.integers(0, len(values) + 1, num_blocks - 1))
        parts = np.split(rows, cuts)
    return LocalFeatures([Block(part, values[part]) for part in parts])


def _mixture(num_rows: int = 2000, dim: int = 16, num_groups: int = 20) -> np.ndarray:
    rng = np.random.default_rng(3)
    centres = rng.standard_normal((num_groups, dim))
    rows = centres[rng.integers(0, num_groups, num_rows)] + rng.standard_normal((num_rows, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def _naive_lloyd(values: np.ndarray, centroids: np.ndarray, iterations: int) -> tuple[np.ndarray, list[float]]:
    rows, centroids, inertia = values.astype(np.float64), centroids.astype(np.float64), []
    for iteration in range(iterations + 1):
        distances = np.square(rows[:, None] - centroids[None]).sum(axis=2)
        labels = distances.argmin(axis=1)
        inertia.append(distances.min(axis=1).sum())
        if iteration < iterations:
            centroids = np.stack([rows[labels == k].mean(axis=0) for k in range(len(centroids))])
    return labels, inertia


def _same(left: KMeans, right: KMeans) -> bool:
    arrays = ("centroids", "samples", "labels", "sizes")
    alike = all(getattr(left, name).tobytes() == getattr(right, name).tobytes() for name in arrays)
    return alike and left.inertia == right.inertia and left.num_repaired == right.num_repaired


def test_seven_points_on_a_line() -> None:
    found = kmeans(_features(LINE, 2), 3, init=LINE[:3], plain=True)
    assert found.inertia == pytest.approx([518, 95.64, 77.5, 77.5], rel=1e-7)
    assert found.labels.tolist() == [0, 1, 1, 2, 2, 2, 2]
    assert found.centroids.tolist() == [[0], [1.5], [12.5]]
    assert found.sizes.tolist() == [1, 2, 4] and found.num_repaired == 0


def test_one_step_and_none() -> None:
    one = kmeans(_features(LINE), 3, init=LINE[:3], iterations=1)
    np.testing.assert_allclose(one.centroids[:, 0], [0, 1, 10.4], rtol=1e-7)
    assert one.labels.tolist() == [0, 1, 1, 2, 2, 2, 2]
    none = kmeans(_features(LINE), 3, init=LINE[:3], iterations=0)
    assert none.inertia == [518] and none.labels.tolist() == [0, 1, 2, 2, 2, 2, 2]


@pytest.mark.parametrize("engine", ["int8", "torch", "faiss"])
def test_equals_a_naive_float64_lloyd(engine: Engine) -> None:
    values = _mixture()
    labels, inertia = _naive_lloyd(values, values[:20], 20)
    found = kmeans(_features(values, 3), 20, init=values[:20], engine=engine, plain=True)
    assert np.array_equal(found.labels, labels)
    assert found.inertia == pytest.approx(inertia[: len(found.inertia)], rel=1e-6)
    assert np.all(np.diff(found.inertia) <= 1e-9 * found.inertia[0])


@pytest.mark.parametrize("num_clusters", [1, 7, 300])
def test_any_blocks_in_any_order_are_bitwise_identical(num_clusters: int) -> None:
    values = _mixture(1500)
    wanted = kmeans(_features(values), num_clusters, seed=5, iterations=6)
    for num_blocks in (1, 2, 7, 64):
        found = kmeans(_features(values, num_blocks, order_seed=num_blocks), num_clusters, seed=5, iterations=6)
        assert _same(found, wanted)


def test_threads_and_engines_are_bitwise_identical() -> None:
    values = _mixture(3000)
    before = torch.get_num_threads()
    results = []
    tries: list[tuple[int, Engine]] = [(1, "torch"), (2, "torch"), (3, "faiss"), (1, "int8"), (3, "int8")]
    for threads, engine in tries:
        torch.set_num_threads(threads)
        results.append(kmeans(_features(values, 5), 50, iterations=5, engine=engine))
    torch.set_num_threads(before)
    assert all(_same(results[0], result) for result in results[1:])


def test_result_is_consistent() -> None:
    values = _mixture()
    found = kmeans(_features(values, 4, order_seed=1), 30, iterations=100)
    assert np.array_equal(found.samples, np.arange(len(values)))
    labels, distances = nearest(values, found.centroids)
    assert np.array_equal(found.labels, labels)
    assert found.inertia[-1] == pytest.approx(distances.sum(), rel=1e-5)
    assert np.array_equal(found.sizes, np.bincount(labels, minlength=30))
    np.testing.assert_allclose(found.sizes @ found.centroids.astype(np.float64), values.sum(axis=0), atol=1e-3)


def test_seed_decides_the_start_and_nothing_else() -> None:
    values = _mixture()
    assert _same(kmeans(_features(values), 9, seed=1), kmeans(_features(values), 9, seed=1))
    assert not _same(kmeans(_features(values), 9, seed=1), kmeans(_features(values), 9, seed=2))


@pytest.mark.parametrize("iterations", [0, 1, 20])
def test_no_cluster_is_empty_at_the_end(iterations: int) -> None:
    values = np.concatenate([np.zeros((500, 2), np.float32), np.array([[10, 0], [11, 0], [12, 0], [0, 9]], np.float32)])
    everything_on_one = np.zeros((5, 2), np.float32)
    found = kmeans(_features(values, 3), 5, init=everything_on_one, iterations=iterations)
    assert sorted(found.sizes.tolist()) == [1, 1, 1, 1, 500]
    assert np.array_equal(found.labels, nearest(values, found.centroids)[0])
    assert found.num_repaired >= 4


def test_an_emptied_cluster_splits_a_large_one() -> None:
    values = np.array([[1.0], [1.001], [1.002], [1.003], [9.0]], np.float32)
    found = kmeans(_features(values), 3, init=np.array([[1.0015], [9], [50]], np.float32))
    assert found.num_repaired == 1
    assert found.labels[0] == found.labels[1] != found.labels[2] == found.labels[3]


def test_duplicates_count_once_when_filling_clusters() -> None:
    values = np.repeat(_mixture(6), 50, axis=0)
    found = kmeans(_features(values, 7), 6)
    assert found.inertia[-1] == 0 and found.sizes.tolist() == [50] * 6
    assert _same(found, kmeans(_features(values, 64, order_seed=0), 6))
    with pytest.raises(UserError, match=r"only 6 distinct rows.*num_clusters=7"):
        kmeans(_features(values, 7), 7)
    with pytest.raises(UserError, match=r"only 6 distinct rows.*num_clusters=7"):
        kmeans(_features(values, 7), 7, init=np.zeros((7, 16), np.float32))


def test_three_alike_and_one_other_cannot_be_three_clusters() -> None:
    values = np.array([[1, 1], [1, 1], [1, 1], [2, 0]], np.float32)
    with pytest.raises(UserError, match="only 2 distinct rows"):
        kmeans(_features(values), 3)
    assert sorted(kmeans(_features(values), 2).sizes.tolist()) == [1, 3]


def test_zeros_of_either_sign_are_one_row() -> None:
    with pytest.raises(UserError, match="only 1 distinct"):
        kmeans(_features(np.array([[0.0], [-0.0]], np.float32)), 2)


def test_as_many_clusters_as_rows_and_just_one() -> None:
    values = _mixture(40)
    every = kmeans(_features(values, 3), 40)
    assert every.sizes.tolist() == [1] * 40 and every.inertia[-1] == 0
    single = kmeans(_features(values, 3), 1)
    np.testing.assert_allclose(single.centroids[0], values.mean(axis=0, dtype=np.float64), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("factor", [0.0, 1e-30, 1e-3, 1e6, 1e30])
def test_scale_of_the_values_does_not_matter(factor: float) -> None:
    values = _mixture(300)
    wanted = kmeans(_features(values), 4, init=values[:4], iterations=5)
    scaled = (values * np.float32(factor)).astype(np.float32)
    if factor == 0:
        with pytest.raises(UserError, match="only 1 distinct"):
            kmeans(_features(scaled), 4)
        return
    with np.errstate(over="ignore"):
        found = kmeans(_features(scaled), 4, init=scaled[:4], iterations=5)
    assert np.array_equal(found.labels, wanted.labels)


def test_half_precision_blocks_are_read_exactly() -> None:
    half = _mixture(500).astype(np.float16)
    assert _same(kmeans(_features(half, 3), 8), kmeans(_features(half.astype(np.float32), 2), 8))


def test_previous_labels_are_a_start() -> None:
    values = _mixture()
    before = kmeans(_features(values), 20, iterations=10)
    again = kmeans(_features(values, 6, order_seed=2), 20, init=before.labels, iterations=10)
    assert again.inertia[-1] <= before.inertia[-1]
    means = np.stack([values[before.labels == k].mean(axis=0, dtype=np.float64) for k in range(20)])
    unmoved = kmeans(_features(values, 3), 20, init=before.labels, iterations=0)
    np.testing.assert_allclose(unmoved.centroids, means, rtol=1e-5, atol=1e-7)


def test_previous_labels_may_be_missing_or_few() -> None:
    table = np.array([0, 0, -1, 1, 1])
    found = kmeans(_features(LINE, 3), 3, init=table)
    assert found.sizes.min() >= 1 and found.num_repaired >= 1
    lone = kmeans(_features(LINE), 4, init=np.array([2]))
    assert lone.sizes.min() >= 1
    with pytest.raises(UserError, match="none of the samples"):
        kmeans(_features(LINE), 3, init=np.full(7, -1))


def test_ids_and_sums_of_more_rows_than_32_bits_count() -> None:
    values = _mixture(300)
    far = LocalFeatures([Block(np.arange(300) + 2**40, values)])
    found = kmeans(far, 7, init=values[:7])
    assert found.samples[0] == 2**40 and np.array_equal(
        found.labels, kmeans(_features(values), 7, init=values[:7]).labels
    )
    for num_rows in (1, 2**31, 2**33):
        high = np.array([3.0], np.float32)
        scale = sum_scale(FeatureStats(num_rows, -high, high))
        assert num_rows * round(3.0 * scale) < 2**63 and scale >= 2.0**20


def test_invalid_arguments_are_named() -> None:
    features = _features(LINE)
    with pytest.raises(UserError, match="7 rows cannot fill 8 clusters"):
        kmeans(features, 8)
    with pytest.raises(UserError, match="seen 0 and 20"):
        kmeans(features, 0)
    with pytest.raises(UserError, match=r"shape \(3, 1\); seen \(2, 1\)"):
        kmeans(features, 3, init=LINE[:2])
    with pytest.raises(UserError, match="1 values that are not finite"):
        kmeans(features, 1, init=np.array([[np.nan]]))
    with pytest.raises(UserError, match="largest 3"):
        kmeans(features, 3, init=np.array([0, 3]))
    broken = LINE.copy()
    broken[4] = np.nan
    with pytest.raises(UserError, match=r"1 of 7 rows.*\[4\]"):
        kmeans(_features(broken, 2), 3)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_small_problem_ends_well(data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.tuples(st.integers(-2, 2), st.integers(-2, 2)), min_size=1, max_size=30))
    values = np.array(rows, np.float32)
    num_clusters = data.draw(st.integers(1, len(rows)))
    num_blocks = data.draw(st.integers(1, 5))
    num_distinct = len(np.unique(values, axis=0))
    if num_distinct < num_clusters:
        with pytest.raises(UserError, match=f"only {num_distinct} distinct"):
            kmeans(_features(values), num_clusters)
        return
    found = kmeans(_features(values, num_blocks, order_seed=0), num_clusters, iterations=3)
    assert found.sizes.min() >= 1 and found.sizes.sum() == len(rows)
    assert np.array_equal(found.labels, nearest(values, found.centroids)[0])
    assert _same(found, kmeans(_features(values), num_clusters, iterations=3))


def test_sums_merge_in_any_order_even_when_read_only() -> None:
    def summed(*clusters: int) -> ClusterSums:
        totals = np.zeros((6, 2), np.int64)
        for cluster in clusters:
            totals[cluster] = 80 * cluster, 8 * cluster
        totals.flags.writeable = False
        return ClusterSums(totals, (1, 2))

    def rows(*clusters: int) -> PendingRows:
        values = np.array([[10 * cluster, cluster] for cluster in clusters], np.float32)
        return PendingRows(values, np.array(clusters), 6, 8.0, len(clusters) % 2 == 0, (1, 2))

    for parts in (
        (summed(0, 2), rows(2, 5), rows(1), summed(0, 1, 2, 5)),
        (rows(0, 2), rows(2, 5), rows(1), summed(0, 1, 2, 5)),
    ):
        for order in (parts, parts[::-1]):
            found: ClusterSums | PendingRows = order[0]
            for part in order[1:]:
                found = merge(found, part)
            assert isinstance(found, ClusterSums) and found.others == (4, 8)
            assert found.totals[:, 1].tolist() == [0, 16, 48, 0, 0, 80]


@pytest.mark.parametrize("engine", ["int8", "torch"])
@pytest.mark.parametrize("labels", [None, np.arange(-1, 1400) % 60])
def test_a_few_clusters_at_a_time_are_bitwise_identical(
    monkeypatch: pytest.MonkeyPatch, engine: Engine, labels: np.ndarray | None
) -> None:
    """All at once; 7 at a time; and with cached labels evicted, or of another step, when the next 7 are summed."""
    values = _mixture(1500)

    features = _features(values, 4, order_seed=1)

    def found() -> KMeans:
        init = values[:60] * 3 if labels is None else labels  # some are far from all rows and lose them
        return kmeans(features, 60, init=init, iterations=8, engine=engine)

    wanted = found()
    features.memory_budget = 7 * 8 * values.shape[1]
    assert len(fixed_point.spans(60, features)) == 9
    assert _same(found(), wanted)
    get, rng = row_cache.get, np.random.default_rng(0)

    def evicting(clustering: str, samples: np.ndarray) -> Any:
        kept = get(clustering, samples)
        lost = rng.integers(3)
        return None if kept is None or lost == 0 else kept if lost == 1 else (kept[0] - 2, kept[1][::-1])

    monkeypatch.setattr(row_cache, "get", evicting)
    assert _same(found(), wanted)


@pytest.mark.parametrize("engine", ["int8", "torch"])
@pytest.mark.parametrize("kind", ["mixture", "grid", "half"])
def test_incremental_assignment_is_bitwise_identical(
    monkeypatch: pytest.MonkeyPatch, kind: str, engine: Engine
) -> None:
    """Compared with steps that search all centroids."""
    rng = np.random.default_rng(7)
    values = rng.integers(0, 6, (1200, 3)).astype(np.float32) if kind == "grid" else _mixture(1200)
    values = values.astype(np.float16) if kind == "half" else values
    features, num_searched = _features(values, 3, order_seed=1), 0
    assign_again = incremental.assign_again

    def counting(block: np.ndarray, *others: Any) -> np.ndarray:
        nonlocal num_searched
        num_searched += len(block)
        return assign_again(block, *others)

    def found(seed: int) -> list[KMeans]:
        kinds: list[dict[str, Any]] = [{"plain": True}, {}, {"spherical": True, "plain": True}]
        return [kmeans(features, 90, iterations=40, seed=seed, engine=engine, **one) for one in kinds]

    monkeypatch.setattr(incremental, "assign_again", counting)
    for seed in range(3):
        monkeypatch.setattr(incremental, "few", lambda moved: None)
        wanted = found(seed)
        monkeypatch.setattr(incremental, "few", np.flatnonzero)
        assert all(_same(one, other) for one, other in zip(found(seed), wanted, strict=True))
    assert num_searched > 10 * len(values)


@given(st.integers(0, 2**32 - 1), st.sampled_from([np.float16, np.float32]))
@settings(max_examples=200)
def test_rows_know_the_nearest_of_those_that_stayed(seed: int, kind: type) -> None:
    """On a grid most distances occur several times, and the lowest label must win."""
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 4, (50, 2)).astype(kind)
    before, after = (rng.integers(0, 4, (9, 2)).astype(np.float32) for _ in range(2))
    moved = np.flatnonzero(rng.random(9) < rng.random())
    after[np.setdiff1d(np.arange(9), moved)] = before[np.setdiff1d(np.arange(9), moved)]
    previous, wanted = nearest(values, before)[0], nearest(values, after)[0]
    assert np.array_equal(incremental.assign_again(values, prepare(after, moved), "auto", previous), wanted)


def test_few_centroids_that_moved_are_known() -> None:
    moved = np.zeros(4000, np.bool_)
    assert incremental.few(moved) is not None
    moved[[5, 70]] = True
    assert (
        incremental.few(moved) is not None and incremental.few(moved[:1000]) is None
    )  # comparing with 1000 costs no less
    moved[::2] = True
    assert incremental.few(moved) is None
