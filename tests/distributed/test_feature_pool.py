"""The actor pool behaves like LocalFeatures, for any number of actors and after an actor died."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest
import ray
from ray.actor import ActorHandle

from raycluster.clustering.kmeans.lloyd import kmeans
from raycluster.clustering.whitening import whiten
from raycluster.distributed.features.feature_pool import FeaturePoolClient
from raycluster.features.matrix import LocalFeatures
from raycluster.runtime.workers import FeatureBlocksLost
from raycluster.types import Block

pytestmark = pytest.mark.ray


def blocks() -> list[Block]:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(12, 24)) * 3
    rows = (centres[rng.integers(12, size=700)] + rng.normal(size=(700, 24))).astype(np.float16)
    return [Block(np.arange(start, min(start + 100, 700)), rows[start : start + 100]) for start in range(0, 700, 100)]


def filled(actors: list[ActorHandle], order: list[int]) -> FeaturePoolClient:
    pool = FeaturePoolClient(actors)
    for shard in order:
        pool.put("v", shard, blocks()[shard])
    pool.flush()
    return pool


@pytest.mark.parametrize("num_actors", [1, 2, 3])
def test_bitwise_identical_for_any_number_of_actors(pool_actors: list[ActorHandle], num_actors: int) -> None:
    order = list(np.random.default_rng(num_actors).permutation(7))
    ours, local = filled(pool_actors[:num_actors], order).features("v"), LocalFeatures(blocks())
    here, there = (kmeans(whiten(features, 8), 12, seed=3) for features in (local, ours))
    assert np.array_equal(here.centroids, there.centroids)
    assert np.array_equal(here.labels, there.labels)
    assert here.inertia == there.inertia


def test_rows_in_the_order_requested(pool_actors: list[ActorHandle]) -> None:
    samples = np.array([650, 3, 104, 3])
    assert np.array_equal(
        filled(pool_actors[:2], list(range(7))).features("v").rows(samples), LocalFeatures(blocks()).rows(samples)
    )


def test_only_the_shards_of_a_killed_actor_are_missing(pool_actors: list[ActorHandle]) -> None:
    pool = filled(pool_actors[:2], list(range(7)))
    features = pool.features("v")
    os.kill(ray.get(pool.actors[1].pid.remote()), signal.SIGKILL)
    with pytest.raises(FeatureBlocksLost):
        features.fold(_count)
    assert pool.missing("v", range(7)) == [1, 3, 5]
    for shard in (1, 3, 5):
        pool.put("v", shard, blocks()[shard])
    assert pool.missing("v", range(7)) == []
    assert pool.features("v").fold(_count) == (700,)


def test_older_versions_are_dropped(pool_actors: list[ActorHandle]) -> None:
    pool = filled(pool_actors[:2], [0, 1])
    assert pool.missing("w", [0, 1]) == [0, 1]
    assert pool.missing("v", [0, 1]) == [0, 1]


def _count(block: Block) -> tuple[int]:
    return (len(block.samples),)
