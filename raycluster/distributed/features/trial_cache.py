"""What the trials of a sweep share: decoded images and first features, one copy of each in the object store."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from ray.actor import ActorHandle

from raycluster.data.image_cache import Pixels, decode_shard
from raycluster.data.manifest import DataSettings, read_manifest
from raycluster.features.matrix import device
from raycluster.io import storage
from raycluster.run.local_workers import LocalWorkers
from raycluster.types import Block, Chunk, ImageBlock, Loader

SHARE_OF_STORE = 0.25  # of the object store, for images and for features each


class SharedImages:
    """Decoded data sets in the object store, by file name of the manifest: a `data.image_cache.ImageCache`."""

    def __init__(self) -> None:
        self._starts: dict[str, NDArray[np.int64]] = {}
        self._refs: dict[str, list[ray.ObjectRef]] = {}
        self._here: dict[tuple[str, int], list[Pixels]] = {}

    def add(self, manifest_uri: str, settings: DataSettings, smallest_view: int) -> None:
        """Decode a data set, one task per shard; skipped if its first shard shows that it exceeds `memory_budget`."""
        shards = read_manifest(manifest_uri).shards
        task: Any = ray.remote(num_cpus=1)(_decode).options(num_returns=2)
        decode = partial(task.remote, manifest_uri, smallest_view=smallest_view, settings=settings)
        images, size = decode(0)
        if ray.get(size) * len(shards) > memory_budget():
            return
        self._refs[_name(manifest_uri)] = [images, *(decode(shard)[0] for shard in range(1, len(shards)))]
        self._starts[_name(manifest_uri)] = np.array([start for start, _ in shards])

    def __call__(self, manifest_uri: str, samples: NDArray[np.int64]) -> Iterator[Pixels] | None:
        name = _name(manifest_uri)
        return self._images(name, samples) if name in self._refs else None

    def _images(self, name: str, samples: NDArray[np.int64]) -> Iterator[Pixels]:
        starts = self._starts[name]
        for sample, shard in zip(samples.tolist(), np.searchsorted(starts, samples, "right") - 1, strict=True):
            if (name, shard) not in self._here:
                self._here[name, shard] = ray.get(self._refs[name][shard])
            yield self._here[name, shard][sample - starts[shard]]


def memory_budget() -> float:
    """Bytes of the object store that images, or features, may take."""
    return SHARE_OF_STORE * float(ray.cluster_resources().get("object_store_memory", 0.0))


def _name(manifest_uri: str) -> str:
    return storage.without_options(manifest_uri)[0].rpartition("/")[2]


def _decode(manifest_uri: str, shard: int, smallest_view: int, settings: DataSettings) -> tuple[list[Pixels], int]:
    images = decode_shard(manifest_uri, shard, smallest_view, settings)
    return images, sum(len(one) if isinstance(one, bytes) else getattr(one, "nbytes", 0) for one in images)


class FeatureCache:
    """Stores the features of whole shards for later trials, up to `bytes_left`; one actor, which owns them."""

    def __init__(self, bytes_left: float) -> None:
        self._bytes_left = bytes_left
        self._refs: dict[str, dict[int, ray.ObjectRef]] = {}

    def add(self, key: str, shard: int, block: Block) -> None:
        if shard not in self._refs.setdefault(key, {}) and block.values.nbytes <= self._bytes_left:
            self._bytes_left -= block.values.nbytes
            self._refs[key][shard] = ray.put(block)

    def find(self, key: str) -> dict[int, ray.ObjectRef]:
        """The blocks under this key, by shard."""
        return self._refs.get(key, {})


def start_feature_cache() -> ActorHandle:
    """A cache owned by the caller, best effort: its loss only costs time."""
    remote: Any = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(FeatureCache)
    actor: ActorHandle = remote.remote(memory_budget())
    return actor


class SharingWorkers(LocalWorkers):
    """One worker in the trial's own process, which reads and extracts only what no earlier trial has.

    key: identifies all that features depend on except the weights. begins: whether the run starts from the beginning;
    its first features then come from weights that depend on the seed alone, and are shared.
    """

    def __init__(self, images: SharedImages, feature_cache: ActorHandle, key: str, *, begins: bool) -> None:
        super().__init__(device())
        self._images, self._feature_cache, self._key = images, feature_cache, key
        self._shared = set[str]()
        self._begins = begins
        self._sizes: dict[int, int] = {}

    def stream(self, chunks: Sequence[Chunk], load: Loader) -> Iterator[ImageBlock]:
        self._sizes = {chunk.stream: len(chunk.samples) for chunk in chunks}
        return super().stream(chunks, partial(load, image_cache=self._images))  # type: ignore[call-arg]

    def missing(self, version: str, shards: Sequence[int]) -> list[int]:
        if self._begins or version.startswith("untrained"):
            self._shared.add(version)
        self._begins = False
        if version in self._shared:
            found = ray.get(self._feature_cache.find.remote(f"{self._key} {version}"))
            for shard in set(super().missing(version, shards)) & set(found):
                super().put(version, shard, ray.get(found[shard]))
        return super().missing(version, shards)

    def put(self, version: str, shard: int, block: Block) -> None:
        super().put(version, shard, block)
        # A shard with corrupt images is read by every trial, which must report them.
        if version in self._shared and len(block.samples) == self._sizes.get(shard):
            self._feature_cache.add.remote(f"{self._key} {version}", shard, block)
