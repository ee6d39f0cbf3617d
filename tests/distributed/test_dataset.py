"""k-means in the pool: bitwise identical for any blocks, any actors, any order, and after an actor died."""

from __future__ import annotations

import os
import signal
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from ray.actor import ActorHandle

import raycluster
from raycluster.clustering.kmeans import hierarchical
from raycluster.clustering.kmeans.lloyd import LloydProgress, kmeans
from raycluster.clustering.kmeans.result import KMeans
from raycluster.clustering.whitening import whiten
from raycluster.distributed.cluster_files import ClusterSettings, cluster
from raycluster.distributed.features.dataset import pooled as as_pool
from raycluster.distributed.features.feature_pool import PooledFeatures
from raycluster.features.matrix import LocalFeatures
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
    """Blocks of rows in any order, assigned to the actors in any order."""
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


@pytest.mark.parametrize(
    "num_actors", [pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow), 3]
)
def test_bitwise_identical_for_any_blocks_and_after_a_death(
    pool_actors: list[ActorHandle], wanted: dict[int, str], num_actors: int
) -> None:
    """1, 2, 7, 64 blocks, in order and shuffled; then all of them at once, while an actor is killed."""
    actors = pool_actors[:num_actors]
    for num_blocks in (1, 2, 7, 64):
        for shuffled in (False, True):
            features = pooled(actors, num_blocks, shuffled=shuffled)
            assert digest(kmeans(features, 5, seed=2, iterations=8)) == wanted[5]
    killed = threading.Barrier(4, action=lambda: os.kill(ray.get(actors[-1].pid.remote()), signal.SIGKILL))

    def with_a_death(num_blocks: int) -> str:
        def kill(progress: LloydProgress) -> None:
            if progress.iteration == 3:
                killed.wait(timeout=60)

        features = pooled(actors, num_blocks, shuffled=True)
        return digest(kmeans(features, 40, seed=2, iterations=8, report=kill))

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(with_a_death, (1, 2, 7, 64))) == [wanted[40]] * 4


def test_a_whitened_copy_is_restored_when_its_actor_dies(pool_actors: list[ActorHandle]) -> None:
    actors = pool_actors[:2]
    local = whiten(LocalFeatures([Block(np.arange(NUM_ROWS), rows())]), 8)
    whitened = whiten(pooled(actors, 7, shuffled=True), 8)
    os.kill(ray.get(actors[1].pid.remote()), signal.SIGKILL)
    assert digest(kmeans(whitened, 5, seed=2)) == digest(kmeans(local, 5, seed=2))


def test_idle_actors_take_blocks_from_slow_ones(pool_actors: list[ActorHandle]) -> None:
    actors = pool_actors[:2]
    features = pooled(actors, 32, shuffled=False)
    slow = ray.get(actors[0].pid.remote())
    worked = features.fold(_who, slow, combine=_join)
    assert sum(worked.values()) == NUM_ROWS
    assert worked[slow] < NUM_ROWS / 2 < worked[ray.get(actors[1].pid.remote())]


def _who(block: Block, slow: int) -> dict[int, int]:
    """Rows by process; one process is slow."""
    if os.getpid() == slow:
        time.sleep(0.3)
    return {os.getpid(): len(block.samples)}


def _join(left: dict[int, int], right: dict[int, int]) -> dict[int, int]:
    return {who: left.get(who, 0) + right.get(who, 0) for who in left | right}


def test_a_tree_is_identical_on_several_actors(pool_actors: list[ActorHandle], monkeypatch: pytest.MonkeyPatch) -> None:
    actors = pool_actors[:2]
    here = raycluster.kmeans_tree(rows(), [4, 25], iterations=4)
    there = raycluster.kmeans_tree(pooled(actors, 7, shuffled=True), [4, 25], iterations=4)
    for level in range(2):
        assert np.array_equal(here.labels[level], there.labels[level])
        assert here.centroids[level].tobytes() == there.centroids[level].tobytes()
    monkeypatch.setattr(hierarchical, "_GATHERED_BYTES", 0)  # folds over the pool instead of gathering groups
    stayed = raycluster.kmeans_tree(pooled(actors, 7, shuffled=True), [4, 25], iterations=4)
    assert np.array_equal(here.labels[1], stayed.labels[1])
    assert here.centroids[1].tobytes() == stayed.centroids[1].tobytes()
    graph, other = raycluster.knn(rows(), 3), raycluster.knn(pooled(actors, 7, shuffled=True), 3)
    assert np.array_equal(graph.indices, other.indices) and np.array_equal(graph.distances, other.distances)


def test_a_dataset_is_clustered_like_an_array(ray_cluster: None) -> None:
    dataset = ray.data.from_numpy(np.array_split(rows(), 4))
    here, there = raycluster.kmeans(rows(), 9, seed=1), raycluster.kmeans(dataset, 9, seed=1)
    assert digest(here) == digest(there)
    with pytest.raises(UserError, match="seen 'nothing'"):
        raycluster.kmeans(dataset, 9, column="nothing")


@pytest.mark.parametrize("kind", [pytest.param("npy", marks=pytest.mark.slow), "parquet"])
def test_files_are_clustered_by_actors_like_in_one_process(ray_cluster: None, tmp_path: Path, kind: str) -> None:
    (tmp_path / "in").mkdir()
    for number, part in enumerate(np.array_split(rows(), 3)):
        if kind == "npy":
            np.save(tmp_path / "in" / f"{number}.npy", part)
        else:
            table = pa.table({"path": [str(index) for index in range(len(part))], "embedding": part.tolist()})
            pq.write_table(table, tmp_path / "in" / f"{number}.parquet")

    def clustered(**options: int) -> KMeans:
        out = str(tmp_path / f"out-{options.get('actors', 0)}")
        cluster(ClusterSettings(embeddings=str(tmp_path / "in"), num_clusters=9, out=out, whiten=16, **options))
        return raycluster.load_kmeans(f"{out}/kmeans.npz")

    here, there = clustered(), clustered(actors=2, max_block_bytes=5000)
    assert digest(here) == digest(there)
    outs = [(tmp_path / f"out-{actors}" / "labels.parquet").read_bytes() for actors in (0, 2)]
    assert outs[0] == outs[1]
    (tmp_path / "in" / ("9.npy" if kind == "parquet" else "9.parquet")).touch()
    with pytest.raises(UserError, match=r"holds \.npy and Parquet files"):
        clustered(actors=2)


def test_blocks_are_cut_to_size(ray_cluster: None) -> None:
    dataset = ray.data.from_numpy(np.array_split(rows(), 2))
    with as_pool(dataset, num_actors=2, max_block_bytes=24 * 4 * 100) as features:
        sizes = features.fold(_largest, combine=max)
        assert features.num_rows == NUM_ROWS and sizes == 100
        assert np.array_equal(features.rows(np.arange(NUM_ROWS)), rows())


def _largest(block: Block) -> int:
    return len(block.samples)
