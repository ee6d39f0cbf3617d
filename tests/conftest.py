"""One Ray cluster for all tests that want one, and surroundings in which tests neither wait nor disturb others."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from ray.actor import ActorHandle

    from raycluster.run.config import Config

# Read by Ray and by the thread pools when they are imported, hence before anything else.
os.environ.update(
    {
        "OMP_NUM_THREADS": "2",
        "RAY_worker_niceness": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",
        "RAY_DEDUP_LOGS": "0",
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
        "RAY_DATA_PARQUET_FOOTER_NUM_ACTORS": "1",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "8",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    }
)
os.environ.pop("RAY_ADDRESS", None)  # a test must never join, and disturb, a cluster that is in use

TINY = """
data: {uri: digits, shard_size: 300}
views: {train: {size: 16, crop_scale: [0.5, 1.0]}, eval: {size: 16}}
model: {name: smallnet, widths: [4, 8, 16]}
method: {name: deepcluster, num_clusters: 10, layer: conv3, descriptor: pooled, pca_dim: 8, iterations: 5}
training: {epochs: 2, global_batch: 128, microbatch: 32, mode: exact, threads: 1}
evaluation: {max_samples: 600}
run: {dir: unset}
"""

settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What asks for the cluster carries the marker `ray`."""
    for item in items:
        if "ray_cluster" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.ray)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A cluster of one node with 4 processors (on paper) and 3 training slots, shared by the whole session."""
    import ray

    folder = tempfile.mkdtemp(prefix="rc-", dir="/tmp")  # sockets lie below: their paths may have 107 characters
    ray.init(
        address="local",
        num_cpus=4,
        resources={"train_slot": 3},
        object_store_memory=400_000_000,
        include_dashboard=False,
        log_to_driver=False,
        _temp_dir=folder,
    )
    try:
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def shared_actors(ray_cluster: None) -> list[ActorHandle]:
    """Three actors of a feature pool; use `pool_actors`."""
    from raycluster.distributed.features.feature_pool import start_pool

    return start_pool("shared", 3)


@pytest.fixture
def pool_actors(shared_actors: list[ActorHandle]) -> list[ActorHandle]:
    """Three empty actors of a feature pool, which tests may kill: Ray restarts them."""
    import ray
    from ray.exceptions import RayActorError

    for actor in shared_actors:
        while True:
            try:
                ray.get(actor.have.remote(""))  # drops all other versions
                break
            except RayActorError:
                time.sleep(0.1)
    return shared_actors


@pytest.fixture(scope="session")
def tiny_yaml() -> str:
    """The configuration of `tiny` as a file has it."""
    return TINY


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Config]:
    """tiny(run_dir, "key=value", ...): a complete run on the digits that takes seconds, in exact mode."""
    from raycluster.config import parse
    from raycluster.run.config import Config

    def make(run_dir: Path, *overrides: str) -> Config:
        return parse(Config, TINY, [f"run.dir={run_dir}", *overrides])

    return make


@pytest.fixture
def digits_folder(tmp_path: Path) -> Path:
    """300 of the digits as PNG files in one flat folder."""
    from PIL import Image
    from sklearn.datasets import load_digits

    folder = tmp_path / "digits"
    folder.mkdir()
    for index, digit in enumerate(load_digits().images[:300]):
        Image.fromarray((digit * 15).astype("uint8")).save(folder / f"{index:03d}.png")
    return folder
