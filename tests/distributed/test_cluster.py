"""k-means in the pool: the same bits for any blocks, any actors, any order, and after an actor died."""

from __future__ import annotations

import os
import signal
import uuid
from hashlib import sha256

import numpy as np
import pytest
import ray
from ray.actor import ActorHandle

import raycluster
from raycluster.clustering.kmeans import Progress, kmeans
from raycluster.clustering.result import KMeans
from raycluster.clustering.whitening import whiten
from raycluster.distributed.pool import PooledFeatures, start_pool
from raycluster.features import LocalFeatures
from raycluster.types import Block, UserError

pytestmark = pytest.mark.ray

NUM_ROWS = 1300


def rows() -> np.ndarray:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(12, 24)) * 2
    return (centres[rng.integers(12, size=NUM_ROWS)] + rng.normal(size=(NUM_ROWS, 24))).astype(np.float32)


def digest(found: KMeans) -> str:
    numbers = np.array([*found.inertia, found.num_repaired]).tobytes()
    return sha256(found.centroids.tobytes() + found.labels.tobytes() + found.sizes.tobytes() + numbers).hexdigest()


def pooled(actors: list[ActorHandle], num_blocks: int, *, shuffled: bool) -> PooledFeatures:
    """Blocks of rows in any order, dealt out to the actors in any order."""
    rng = np.random.default_rng(num_blocks)
    order = rng.permutation(NUM_ROWS) if shuffled else np.arange(NUM_ROWS)
    blocks = [Block(part, rows()[part]) for part in np.array_split(order, num_blocks)]
    version = uuid.uuid4().hex

    def restore(actor: ActorHandle, shards: list[int]) -> None:
        ray.get([actor.add.remote(version, shard, blocks[shard]) for shard in shards])

    for place, shard in enumerate(rng.permutation(num_blocks).tolist()):
        restore(actors[place % len(actors)], [shard])
    return PooledFeatures(actors, version, restore)


@pytest.fixture(scope="module")
def wanted() -> dict[int, str]:
    features = LocalFeatures([Block(np.arange(NUM_ROWS), rows())])
    return {k: digest(kmeans(features, k, seed=2, iterations=8)) for k in (5, 40)}


@pytest.mark.parametrize("num_actors", [1, 2, 3])
def test_the_same_bits_whoever_holds_the_blocks(ray_cluster: None, wanted: dict[int, str], num_actors: int) -> None:
    actors = start_pool(f"pool-{uuid.uuid4().hex[:8]}", num_actors)
    for num_blocks in (1, 2, 7, 64):
        for shuffled in (False, True):
            features = pooled(actors, num_blocks, shuffled=shuffled)
            for num_clusters, hashed in wanted.items():
                assert digest(kmeans(features, num_clusters, seed=2, iterations=8)) == hashed
    for actor in actors:
        ray.kill(actor)


def test_an_actor_that_dies_in_the_middle_changes_no_bit(ray_cluster: None, wanted: dict[int, str]) -> None:
    actors = start_pool(f"pool-{uuid.uuid4().hex[:8]}", 3)
    features = pooled(actors, 7, shuffled=True)

    def kill(progress: Progress) -> None:
        if progress.iteration == 3:
            os.kill(ray.get(actors[1].pid.remote()), signal.SIGKILL)

    assert digest(kmeans(features, 40, seed=2, iterations=8, report=kill)) == wanted[40]
    local = whiten(LocalFeatures([Block(np.arange(NUM_ROWS), rows())]), 8)
    whitened = whiten(features, 8)
    os.kill(ray.get(actors[2].pid.remote()), signal.SIGKILL)
    assert digest(kmeans(whitened, 5, seed=2)) == digest(kmeans(local, 5, seed=2))
    for actor in actors:
        ray.kill(actor)


def test_a_dataset_is_clustered_like_an_array(ray_cluster: None) -> None:
    dataset = ray.data.from_numpy(np.array_split(rows(), 4))
    here, there = raycluster.kmeans(rows(), 9, seed=1), raycluster.kmeans(dataset, 9, seed=1)
    assert digest(here) == digest(there)
    with pytest.raises(UserError, match="seen 'nothing'"):
        raycluster.kmeans(dataset, 9, column="nothing")
