from __future__ import annotations

import numpy as np
import pytest

from raycluster.clustering.kmeans.lloyd import kmeans
from raycluster.features.matrix import LocalFeatures
from raycluster.features.selected import SelectedRows
from raycluster.types import Block, Features

rng = np.random.default_rng(0)
VALUES = rng.standard_normal((300, 5)).astype(np.float32)
SAMPLES = np.sort(rng.choice(280, 90, replace=False))  # none of the last block


def features(number: int) -> LocalFeatures:
    return LocalFeatures([Block(part, VALUES[part]) for part in np.array_split(np.arange(300), number)])


def gathered() -> LocalFeatures:
    return LocalFeatures([Block(SAMPLES, VALUES[SAMPLES])])


def _sums(block: Block, factor: int) -> tuple[int, int]:
    return len(block.samples), int(block.samples.sum()) * factor


def _twice(block: Block) -> np.ndarray:
    return 2 * block.values


def _fold(some: Features, factor: int) -> tuple[int, int]:
    return some.fold(_sums, factor)


@pytest.mark.parametrize("number", [1, 2, 7, 64])
def test_operations_see_the_selected_rows_alone(number: int) -> None:
    some = SelectedRows(features(number), SAMPLES)
    assert (some.num_rows, some.dim) == (90, 5)
    assert some.fold(_sums, 3) == (90, 3 * SAMPLES.sum())
    assert sum(count for count, _ in some.collect(_sums, 1)) == 90
    assert some.map_jobs(_fold, [(1,), (2,)]) == [(90, SAMPLES.sum()), (90, 2 * SAMPLES.sum())]
    assert np.array_equal(some.rows(SAMPLES[::-1]), VALUES[SAMPLES[::-1]])
    doubled = some.map(_twice)
    assert doubled.num_rows == 90 and doubled.fold(_sums, 1) == (90, SAMPLES.sum())
    assert np.array_equal(doubled.rows(SAMPLES), 2 * VALUES[SAMPLES])


@pytest.mark.parametrize("options", [{}, {"plain": True}, {"spherical": True}, {"init": "k-means++"}], ids=str)
def test_kmeans_of_selected_rows_is_that_of_the_rows_gathered(options: dict) -> None:
    wanted = kmeans(gathered(), 8, iterations=6, **options)
    for number in (1, 7, 64):
        found = kmeans(SelectedRows(features(number), SAMPLES), 8, iterations=6, **options)
        assert np.array_equal(found.samples, SAMPLES) and np.array_equal(found.labels, wanted.labels)
        assert found.centroids.tobytes() == wanted.centroids.tobytes() and found.inertia == wanted.inertia
