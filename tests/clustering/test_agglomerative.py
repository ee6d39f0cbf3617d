"""Agglomerative clustering against scipy and by hand, and classes merged from its clusters."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from scipy.cluster.hierarchy import fcluster
from scipy.cluster.hierarchy import linkage as scipy_linkage
from scipy.spatial.distance import cdist, pdist, squareform

import raycluster
from raycluster.clustering.agglomerative import LinkageName, MergedClasses, agglomerative, merge_classes
from raycluster.clustering.search import close_pairs, int8_cpu
from raycluster.features.arrays import as_features
from raycluster.features.matrix import LocalFeatures
from raycluster.types import Block, UserError

LINKAGES: tuple[LinkageName, ...] = get_args(LinkageName)
LINE = np.array([[0.0], [1.0], [2.5], [2.5], [6.0], [9.0]])


def random_rows(rng: np.random.Generator, kind: int) -> np.ndarray:
    """Rows without structure, around centres, or copies of each other."""
    num_rows, dim = int(rng.integers(2, 120)), int(rng.integers(1, 24))
    rows = rng.standard_normal((num_rows, dim))
    if kind == 1:
        rows = rows[rng.integers(max(1, num_rows // 4), size=num_rows)] + 0.2 * rng.standard_normal((num_rows, dim))
    elif kind == 2:
        rows = rows[rng.integers(num_rows, size=num_rows)]
    return rows.astype(np.float32)


def blocks(values: np.ndarray, num_blocks: int) -> LocalFeatures:
    order = np.random.default_rng(num_blocks).permutation(len(values))
    return LocalFeatures([Block(part, values[part]) for part in np.array_split(order, num_blocks)])


def same_partition(labels: np.ndarray, others: np.ndarray) -> bool:
    return (
        len({*zip(labels.tolist(), others.tolist(), strict=True)}) == len({*labels.tolist()}) == len({*others.tolist()})
    )


def cluster_distance(left: np.ndarray, right: np.ndarray, linkage: LinkageName) -> float:
    """Distance of two clusters by definition, from their rows."""
    if linkage == "ward":
        factor = 2 * len(left) * len(right) / (len(left) + len(right))
        return float(factor**0.5 * np.linalg.norm(left.mean(axis=0) - right.mean(axis=0)))
    reduce = {"complete": np.max, "average": np.mean, "single": np.min}[linkage]
    return float(reduce(cdist(left, right)))


def one_by_one(rows: np.ndarray, threshold: float, linkage: LinkageName) -> np.ndarray:
    """Labels after the nearest two clusters of all were merged again and again, of equal distances the lowest two."""
    clusters = [[row] for row in range(len(rows))]
    while len(clusters) > 1:
        distance, left, right = min(
            (cluster_distance(rows[clusters[left]], rows[clusters[right]], linkage), left, right)
            for right in range(len(clusters))
            for left in range(right)
        )
        if distance > threshold:
            break
        clusters[left] = sorted(clusters[left] + clusters.pop(right))
    labels = np.empty(len(rows), np.int64)
    for number, cluster in enumerate(clusters):
        labels[cluster] = number
    return labels


@pytest.mark.parametrize("linkage", LINKAGES)
def test_equal_to_scipy(linkage: LinkageName) -> None:
    """At thresholds between the heights of the tree, where rounding decides nothing."""
    for seed in range(50):
        rng = np.random.default_rng(seed)
        rows = random_rows(rng, seed % 3)
        tree = scipy_linkage(rows.astype(np.float64), linkage)
        heights = np.unique(np.append(0, tree[:, 2]).round(6))
        steps = rng.integers(len(heights), size=2)
        for threshold in (np.append(heights, 2 * heights[-1] + 1)[[steps, steps + 1]].mean(axis=0)).tolist():
            found = raycluster.agglomerative(rows, threshold, linkage)
            assert same_partition(found.labels, fcluster(tree, threshold, "distance")), (seed, threshold)
            assert found.num_pairs == (pdist(rows.astype(np.float64)) <= threshold).sum()


@pytest.mark.parametrize("linkage", ["complete", "single"])
def test_of_equal_distances_the_lowest_rows_merge_first(linkage: LinkageName) -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        rows = rng.integers(4, size=(int(rng.integers(2, 16)), int(rng.integers(1, 4)))).astype(np.float64)
        for threshold in (1.0, 5**0.5):
            found = raycluster.agglomerative(rows, threshold, linkage)
            assert found.labels.tolist() == one_by_one(rows, threshold, linkage).tolist(), (seed, threshold)


@pytest.mark.parametrize("linkage", LINKAGES)
def test_a_cut_among_ties_is_valid(linkage: LinkageName) -> None:
    """No two clusters are within the threshold; with complete linkage no two rows of a cluster are beyond it."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        rows = rng.integers(4, size=(int(rng.integers(2, 50)), int(rng.integers(1, 5)))).astype(np.float64)
        for threshold in (1.0, 1.7, 3.0):
            found = raycluster.agglomerative(rows, threshold, linkage)
            clusters = [rows[found.labels == label] for label in range(found.num_clusters)]
            apart = [cluster_distance(a, b, linkage) for at, a in enumerate(clusters) for b in clusters[:at]]
            assert min(apart, default=np.inf) > threshold * (1 - 1e-12), (seed, threshold)
            if linkage == "complete":
                assert max(cdist(cluster, cluster).max() for cluster in clusters) <= threshold


def test_by_hand() -> None:
    """Rows at 0, 1, 2.5, 2.5, 6 and 9. At exactly the threshold clusters merge."""
    cuts: dict[tuple[LinkageName, float], list[int]] = {
        ("complete", 0.9): [0, 1, 2, 2, 3, 4],
        ("complete", 2.499): [0, 0, 1, 1, 2, 3],
        ("complete", 3.0): [0, 0, 0, 0, 1, 1],
        ("complete", 2.999): [0, 0, 0, 0, 1, 2],
        ("single", 1.5): [0, 0, 0, 0, 1, 2],
        ("single", 3.0): [0, 0, 0, 0, 1, 1],
        ("average", 1.999): [0, 0, 1, 1, 2, 3],
        ("average", 2.0): [0, 0, 0, 0, 1, 2],  # {0, 1} and {2.5, 2.5}: (2.5 + 2.5 + 1.5 + 1.5) / 4
        ("ward", 2.8): [0, 0, 1, 1, 2, 3],
        ("ward", 2.83): [0, 0, 0, 0, 1, 2],  # sqrt(2 * 2 * 2 / 4) * 2 = 2.828
    }
    for (linkage, threshold), wanted in cuts.items():
        assert raycluster.agglomerative(LINE, threshold, linkage).labels.tolist() == wanted, (linkage, threshold)
    found = raycluster.agglomerative(LINE, 1.5, "single", 2)
    assert found.num_clusters == 3 and found.sizes.tolist() == [4, 1, 1] and not found.kept.any()
    assert raycluster.agglomerative(LINE, 1.5, "single", 4).kept.tolist() == [True, False, False]
    assert found.samples.tolist() == [0, 1, 2, 3, 4, 5] and found.num_pairs == 4


@pytest.mark.parametrize("linkage", LINKAGES)
def test_bitwise_identical_for_any_blocks(linkage: LinkageName) -> None:
    rows = np.concatenate([random_rows(np.random.default_rng(1), 1) for _ in range(3)])
    wanted = raycluster.agglomerative(rows, 1.6, linkage)
    assert 1 < wanted.num_clusters < len(rows) / 3
    for num_blocks in (1, 2, 7, 64):
        found = agglomerative(blocks(rows, num_blocks), threshold=1.6, linkage=linkage)
        assert found.labels.tobytes() == wanted.labels.tobytes() and found.num_pairs == wanted.num_pairs


@pytest.mark.parametrize("kernel", [True, False])
def test_every_pair_is_found_in_small_parts_with_and_without_the_kernel(
    monkeypatch: pytest.MonkeyPatch, kernel: bool
) -> None:
    """Rows far from the origin, of very different lengths, and many within the threshold of each other."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((500, 40))
    rows[:100] = rows[100:200] + 1e-3 * rng.standard_normal((100, 40))
    rows[200:300] *= 10.0 ** rng.integers(-30, 15, size=(100, 1))
    rows[300:] = rows[300] + 0.1 * rows[300:]
    rows = (rows + 30 * (np.arange(500) % 2)[:, None]).astype(np.float32)
    monkeypatch.setattr(close_pairs, "_PART_PAIRS", 20_000)
    if not kernel:
        monkeypatch.setattr(int8_cpu, "support", lambda: None)
        monkeypatch.setattr(close_pairs, "resolve_engine", lambda _: "torch")
    distances = squareform(pdist(rows.astype(np.float64)))
    for threshold in (1e-3, 0.008, 1.0, 1e3, 1e12):
        parts = list(close_pairs.close_pairs(blocks(rows, 3), np.arange(500), threshold))
        found = np.concatenate([np.stack([part.low, part.high], axis=1) for part in parts])
        low, high = np.nonzero(np.triu(distances <= threshold, 1))
        assert np.array_equal(found[np.lexsort(found.T[::-1])], np.stack([low, high], axis=1)), threshold
        assert len(parts) >= 3


def test_files_tensors_and_whole_numbers(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    wanted = raycluster.agglomerative(LINE, 2.5).labels
    np.save(tmp_path / "rows.npy", LINE)
    for x in (torch.from_numpy(LINE), tmp_path / "rows.npy", LINE.astype(np.float16)):
        assert np.array_equal(raycluster.agglomerative(x, 2.5).labels, wanted)
    assert raycluster.agglomerative(np.array([[250], [5], [252]], np.uint8), 2).labels.tolist() == [0, 1, 0]


@pytest.mark.parametrize("linkage", LINKAGES)
def test_extremes(linkage: LinkageName) -> None:
    rows = random_rows(np.random.default_rng(4), 0)
    one = raycluster.agglomerative(rows[:1], linkage=linkage)
    assert one.labels.tolist() == [0] and one.num_clusters == 1 and one.num_pairs == 0
    for threshold in (1e9, 1e200, np.inf):
        assert raycluster.agglomerative(rows, threshold, linkage).num_clusters == 1
    assert raycluster.agglomerative(rows, 1e-300, linkage).num_clusters == len(rows)
    same = raycluster.agglomerative(np.ones((40, 3)), 1e-300, linkage)
    assert same.num_clusters == 1 and same.sizes.tolist() == [40] and same.num_pairs == 780


def test_bad_input_is_named() -> None:
    rows = random_rows(np.random.default_rng(4), 0)
    for bad, message in (
        ({"threshold": 0.0}, "threshold must be a distance above 0; seen 0.0"),
        ({"threshold": -1.0}, "seen -1.0"),
        ({"threshold": float("nan")}, "seen nan"),
        ({"linkage": "centroid"}, "linkage must be one of complete, average, single, ward; seen 'centroid'"),
        ({"max_size": 1}, "max_size must be at least 2"),
        ({"max_size": 2.5}, r"max_size must be an integer; seen 2\.5"),
        ({"max_pairs": 0}, "max_pairs at least 1; seen 7 and 0"),
    ):
        with pytest.raises(UserError, match=message):
            raycluster.agglomerative(rows, **bad)  # type: ignore[arg-type]
    rows[3, 0] = np.nan
    with pytest.raises(UserError, match=r"\[3\]"):
        raycluster.agglomerative(rows)


def test_too_many_pairs_are_refused_with_the_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(0).standard_normal((1200, 4))
    monkeypatch.setattr(close_pairs, "_PART_PAIRS", 1 << 16)
    with pytest.raises(
        UserError, match=r"the 719400 pairs of 1200 rows, more than 100000 .* 0\.0084 GiB.* Lower the th"
    ):
        raycluster.agglomerative(rows, 100.0, max_pairs=10**5)
    assert raycluster.agglomerative(rows, 100.0, "single", max_pairs=10**5).num_clusters == 1, "keeps no pairs"


# ------------------------------------------------------------------------------------------------------- merged classes


def class_rows(found: MergedClasses) -> list[list[int]]:
    return [found.samples[found.labels == number].tolist() for number in range(found.num_classes)]


def test_classes_by_hand() -> None:
    """A pair and a triple are clusters; of the 4 remaining rows one is the seed, and takes the two of its direction."""
    angles = np.array([0, 1, 90, 91, 92, 180, 181, 183, 270]) * np.pi / 180
    rows = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    rows[5:] *= np.array([1, 5, 9, 1])[:, None]
    for seed in range(6):
        found = merge_classes(as_features(rows), 3, threshold=0.1, num_neighbours=2, seed=seed)
        first, second, third = class_rows(found)
        assert (first, second) == ([0, 1], [2, 3, 4]) and (found.num_clusters, found.num_seeds) == (2, 1)
        assert third in ([5, 6, 7], [6, 7, 8]) and len(third) == 3
    assert class_rows(merge_classes(as_features(rows), 2, threshold=0.1)) == [[0, 1], [2, 3, 4]]
    assert class_rows(merge_classes(as_features(rows), 1, threshold=0.1)) == [[2, 3, 4]], "the largest"
    assert class_rows(merge_classes(as_features(rows), 2, threshold=0.1, max_size=2, num_neighbours=6))[0] == [0, 1]


@pytest.mark.parametrize("candidates", [16, 3])
def test_seeds_take_their_nearest_free_rows(monkeypatch: pytest.MonkeyPatch, candidates: int) -> None:
    """Every row of a seed is no further from it than any row that was free then; also where candidates run out."""
    monkeypatch.setattr("raycluster.clustering.agglomerative._CANDIDATES", candidates)
    rng = np.random.default_rng(3)
    rows = (rng.standard_normal((60, 8))[rng.integers(60, size=500)] + 0.3 * rng.standard_normal((500, 8))) * 2
    rows[:8] = rows[8:16]
    found = merge_classes(as_features(rows), 120, threshold=1.2, num_neighbours=3, seed=5)
    assert found.num_clusters + found.num_seeds == 120 and min(found.num_clusters, found.num_seeds) > 20
    sizes = np.bincount(found.labels[found.labels >= 0], minlength=120)
    assert (sizes[found.num_clusters :] == 4).all() and (sizes[: found.num_clusters] >= 2).all() and sizes.max() <= 7
    units = rows.astype(np.float32) / np.linalg.norm(rows.astype(np.float32), axis=1, keepdims=True)
    cosines = units.astype(np.float64) @ units.T.astype(np.float64)
    free = (found.labels < 0) | (found.labels >= found.num_clusters)
    for number in range(found.num_clusters, 120):
        members = np.flatnonzero(found.labels == number)
        free[members] = False
        best = cosines[members][:, free].max(axis=1, initial=-1)
        inner = np.sort(cosines[np.ix_(members, members)], axis=1)[:, 0]
        assert (inner >= best - 1e-6).any(), "one of them is a seed that the others were nearest to"


def test_classes_are_bitwise_identical_for_any_blocks_and_depend_on_the_seed() -> None:
    rng = np.random.default_rng(3)
    rows = rng.standard_normal((50, 8))[rng.integers(50, size=300)] + 0.3 * rng.standard_normal((300, 8))
    options = {"threshold": 0.9, "seed": 2}
    wanted = merge_classes(as_features(rows), 70, **options)  # type: ignore[arg-type]
    for num_blocks in (1, 2, 7, 64):
        found = merge_classes(blocks(rows.astype(np.float32), num_blocks), 70, **options)  # type: ignore[arg-type]
        assert found.labels.tobytes() == wanted.labels.tobytes()
    other = merge_classes(as_features(rows), 70, threshold=0.9, seed=3)
    assert other.num_clusters == wanted.num_clusters and not np.array_equal(other.labels, wanted.labels)


def test_classes_where_nothing_or_everything_merges() -> None:
    rows = np.random.default_rng(0).standard_normal((41, 5))
    for threshold in (1e-9, 1e9):
        found = merge_classes(as_features(rows), 10, threshold=threshold)
        assert (found.num_clusters, found.num_seeds, (found.labels < 0).sum()) == (0, 10, 1)
    with pytest.raises(
        UserError, match=r"11 seeds beside the 0 clusters .* 44 rows, of which 41 are left.* at most 10"
    ):
        merge_classes(as_features(rows), 11, threshold=1e9)
    with pytest.raises(UserError, match="at least 1; seen 0 and 3"):
        merge_classes(as_features(rows), 0)
    with pytest.raises(UserError, match="of which 1 are left"):
        merge_classes(as_features(rows[:1]), 1)
    assert merge_classes(as_features(np.zeros((8, 2))), 2).num_seeds == 2, "rows without a direction"
