"""Sinkhorn in the pool: bitwise identical for any blocks, any actors, any order, and after an actor died."""

from __future__ import annotations

import os
import signal
import uuid
from hashlib import sha256
from typing import Any

import numpy as np
import pytest
import ray
from ray.actor import ActorHandle

import raycluster
from raycluster.clustering.sinkhorn.api import Sinkhorn, sinkhorn
from raycluster.distributed.features.feature_pool import PooledFeatures
from raycluster.features.matrix import LocalFeatures
from raycluster.types import Block

pytestmark = pytest.mark.ray

NUM_ROWS, DIM = 900, 24
RNG = np.random.default_rng(0)
VALUES = RNG.standard_normal((NUM_ROWS, DIM)).astype(np.float32)
HEADS = [(RNG.standard_normal((k, DIM)) * scale, RNG.standard_normal(k)) for k, scale in ((6, 0.1), (40, 0.8))]


def digest(found: Sinkhorn) -> str:
    arrays = [found.samples, found.labels, *found.scalings, np.array([*found.marginal_errors, *found.costs])]
    return sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()


def pooled(actors: list[ActorHandle], num_blocks: int) -> PooledFeatures:
    """Blocks of rows in any order, assigned to the actors in any order."""
    rng = np.random.default_rng(num_blocks)
    blocks = [Block(part, VALUES[part]) for part in np.array_split(rng.permutation(NUM_ROWS), num_blocks)]
    version = uuid.uuid4().hex

    def restore(actor: ActorHandle, shards: list[int]) -> None:
        ray.get([actor.add.remote(version, shard, blocks[shard]) for shard in shards])

    for place, shard in enumerate(rng.permutation(num_blocks).tolist()):
        restore(actors[place % len(actors)], [shard])
    return PooledFeatures(actors, version, restore)


@pytest.fixture(scope="module")
def wanted() -> str:
    return digest(sinkhorn(LocalFeatures([Block(np.arange(NUM_ROWS), VALUES)]), HEADS, rounding="exact"))


@pytest.mark.parametrize("num_actors", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_bitwise_identical_for_any_blocks(pool_actors: list[ActorHandle], wanted: str, num_actors: int) -> None:
    for num_blocks in (1, 7, 64) if num_actors == 2 else (7,):
        assert digest(sinkhorn(pooled(pool_actors[:num_actors], num_blocks), HEADS, rounding="exact")) == wanted


def test_bitwise_identical_after_an_actor_died(pool_actors: list[ActorHandle], wanted: str) -> None:
    actors = pool_actors[:2]
    features, folds = pooled(actors, 7), 0
    fold = features.fold

    def deadly(*args: Any, **options: Any) -> Any:
        nonlocal folds
        folds += 1
        if folds == 9:
            os.kill(ray.get(actors[1].pid.remote()), signal.SIGKILL)
        return fold(*args, **options)

    features.fold = deadly  # type: ignore[method-assign]
    assert digest(sinkhorn(features, HEADS, rounding="exact")) == wanted and folds > 12


def test_a_dataset_is_labelled_like_an_array(ray_cluster: None) -> None:
    logits = VALUES @ HEADS[1][0].T.astype(np.float32)
    here, there = raycluster.sinkhorn(logits), raycluster.sinkhorn(ray.data.from_numpy(np.array_split(logits, 4)))
    assert digest(here) == digest(there)
