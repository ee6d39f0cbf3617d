"""Neighbours and power iteration clustering of a Ray Dataset: bitwise identical to those of an array."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import ray

import raycluster
from raycluster.distributed.features.dataset import pooled

pytestmark = pytest.mark.ray


@pytest.mark.parametrize("search", [pytest.param("exact", marks=pytest.mark.slow), "approximate"])
def test_a_pool_finds_the_same_neighbours_and_clusters(
    ray_cluster: None, search: Literal["exact", "approximate"]
) -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((30, 12))[rng.integers(30, size=3000)] + 0.07 * rng.standard_normal((3000, 12))
    wanted, graph = (
        raycluster.power_iteration_clustering(rows, search=search),
        raycluster.knn(rows, 5, search=search),
    )
    dataset = ray.data.from_numpy(np.array_split(rows, 5))
    with pooled(dataset, num_actors=2) as features:
        found, pooled_graph = (
            raycluster.power_iteration_clustering(features, search=search),
            raycluster.knn(features, 5, search=search),
        )
    assert found.labels.tobytes() == wanted.labels.tobytes() and found.scores.tobytes() == wanted.scores.tobytes()
    assert pooled_graph.indices.tobytes() == graph.indices.tobytes()
    assert pooled_graph.distances.tobytes() == graph.distances.tobytes()
