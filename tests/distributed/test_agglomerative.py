"""Agglomerative clustering in the pool: bitwise identical to that of an array, also after an actor died."""

from __future__ import annotations

import os
import signal
from typing import Any

import numpy as np
import pytest
import ray
from ray.actor import ActorHandle

import raycluster
from raycluster.clustering.agglomerative import agglomerative, merge_classes
from raycluster.clustering.search import close_pairs
from raycluster.distributed.features.feature_pool import PooledFeatures
from raycluster.features.arrays import as_features

pytestmark = pytest.mark.ray

NUM_ROWS = 900


def rows() -> np.ndarray:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(200, 16))
    return (centres[rng.integers(200, size=NUM_ROWS)] + 0.2 * rng.normal(size=(NUM_ROWS, 16))).astype(np.float32)


def pooled(actors: list[ActorHandle], num_blocks: int) -> PooledFeatures:
    def restore(actor: ActorHandle, shards: list[int]) -> None:
        blocks = np.array_split(np.arange(NUM_ROWS), num_blocks)
        values = ray.put(rows())
        ray.get([actor.take.remote("v", shard, blocks[shard][0], values, *ends(blocks[shard])) for shard in shards])

    for shard in range(num_blocks):
        restore(actors[shard % len(actors)], [shard])
    return PooledFeatures(actors, "v", restore)


def ends(block: np.ndarray) -> tuple[int, int]:
    return int(block[0]), int(block[-1]) + 1


def killing(features: PooledFeatures, actor: ActorHandle, at: int) -> list[int]:
    """Kill an actor before the `at`-th pass over the rows; returns the passes counted so far, in a list of one."""
    passes, collect = [0], features.collect

    def deadly(*args: Any) -> Any:
        passes[0] += 1
        if passes[0] == at:
            os.kill(ray.get(actor.pid.remote()), signal.SIGKILL)
        return collect(*args)

    features.collect = deadly  # type: ignore[method-assign]
    return passes


@pytest.mark.parametrize("linkage", ["complete", pytest.param("average", marks=pytest.mark.slow)])
def test_bitwise_identical_in_a_pool_after_an_actor_died(
    pool_actors: list[ActorHandle], monkeypatch: pytest.MonkeyPatch, linkage: Any
) -> None:
    wanted = raycluster.agglomerative(rows(), 1.25, linkage)
    monkeypatch.setattr(close_pairs, "_PART_PAIRS", 30_000)  # several passes over the rows
    features = pooled(pool_actors[:2], 7)
    passes = killing(features, pool_actors[1], at=5)
    found = agglomerative(features, threshold=1.25, linkage=linkage)
    assert passes[0] >= 7
    assert found.labels.tobytes() == wanted.labels.tobytes() and found.num_pairs == wanted.num_pairs


@pytest.mark.slow
def test_merged_classes_are_bitwise_identical_in_a_pool_after_an_actor_died(pool_actors: list[ActorHandle]) -> None:
    wanted = merge_classes(as_features(rows()), 200, threshold=0.8, max_size=3)
    features = pooled(pool_actors[:2], 7)
    passes = killing(features, pool_actors[0], at=3)
    found = merge_classes(features, 200, threshold=0.8, max_size=3)
    assert found.labels.tobytes() == wanted.labels.tobytes() and passes[0] >= 3
    assert min(found.num_clusters, found.num_seeds) > 10


def test_a_dataset_is_clustered_like_an_array(ray_cluster: None) -> None:
    found = raycluster.agglomerative(ray.data.from_numpy(np.array_split(rows(), 4)), 1.25)
    assert found.labels.tobytes() == raycluster.agglomerative(rows(), 1.25).labels.tobytes()
