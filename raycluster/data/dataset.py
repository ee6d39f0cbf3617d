"""A data set as a run streams it: its manifest, in memory and at a URI that tasks can read."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np
from numpy.typing import NDArray

from raycluster.data.class_order import MAX_WINDOW_SHARDS
from raycluster.data.loader import load_chunk
from raycluster.data.manifest import DataSettings, Manifest, build_manifest, read_manifest, write_manifest
from raycluster.data.seed_boxes import SeedBox
from raycluster.data.transforms import View
from raycluster.io import storage
from raycluster.runtime.workers import Collectives
from raycluster.types import Chunk, Crops, Loader, Shard

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageDataset:
    """A data set ready to be streamed: its manifest, in memory and where tasks can read it.

    crops: the samples, where they are parts of images; None where each image is one sample.
    """

    manifest: Manifest
    uri: str
    settings: DataSettings
    seed: int
    crops: Crops | None = None

    @cached_property
    def num_samples(self) -> int:
        """Number of samples: images, or crops of them."""
        return self.manifest.num_samples if self.crops is None else len(self.crops.images)

    @cached_property
    def shards(self) -> list[Shard]:
        """(start, stop) sample ids of what is read together."""
        if self.crops is None:
            return self.manifest.shards
        edges = np.searchsorted(self.crops.images, np.array(self.manifest.shards, np.int64).reshape(-1, 2))
        return [(start, stop) for start, stop in edges.tolist() if stop > start]

    @cached_property
    def labels(self) -> NDArray[np.int32] | None:
        """True classes of the samples (N,), -1 where unknown; None if none is known. For evaluation only."""
        labels = self.manifest.labels
        return labels if labels is None or self.crops is None else labels[self.crops.images]

    def path(self, sample: int) -> str:
        """The file of a sample."""
        image = sample if self.crops is None else int(self.crops.images[sample])
        return str(self.manifest.paths[image].as_py())

    @property
    def window_shards(self) -> int:
        """Neighbouring shards of an epoch that are shuffled together."""
        chosen = self.settings.shuffle_window_shards
        return self.manifest.window_shards if chosen == "auto" else chosen

    def locate(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        """The chunks with the places of their samples, as loaders need them."""
        if self.crops is None:
            return list(chunks)
        return [replace(chunk, crops=self.crops[chunk.samples]) for chunk in chunks]

    def loader(self, view: View | SeedBox, *extra_views: View, microbatch: int = 1) -> Loader:
        """Reads chunks in one or several views, or the boxes of seeds."""
        return partial(
            load_chunk,
            manifest_uri=self.uri,
            view=view,
            extra_views=extra_views,
            seed=self.seed,
            settings=self.settings,
            microbatch=microbatch,
        )


def open_dataset(
    data: DataSettings, uri: str, workers: Collectives, seed: int, crops: Crops | None = None
) -> ImageDataset:
    """The images of `data`, their manifest cached at `uri`. Collective."""
    workers.run_on_rank_zero(ensure_manifest, uri, data)
    return ImageDataset(read_manifest(uri, data), uri, data, seed, crops)


def ensure_manifest(uri: str, data: DataSettings, *, fresh: bool = False) -> None:
    """List the images of `data` unless `uri` exists, or again if `fresh`; log what the user should know of them."""
    if not fresh and storage.exists(uri):
        return
    manifest = build_manifest(data)
    write_manifest(manifest, uri)
    for line in (manifest.unread, _order(manifest, data)):
        if line:
            log.warning("%s", line)


def _order(manifest: Manifest, data: DataSettings) -> str:
    """A line on images that are ordered by class, "" if they are not or the user has chosen a window."""
    width = manifest.window_shards
    if width == 1 or data.shuffle_window_shards != "auto":
        return ""
    line = (
        f"{data.uri} lists its images class by class: epochs shuffle windows of {width} of {len(manifest.shards)} "
        "shards, which reads every file more often (data.shuffle_window_shards=auto)"
    )
    if width == MAX_WINDOW_SHARDS < len(manifest.shards):
        line += "; more would mix better: set data.shuffle_window_shards"
    return f"{line}; write the data set in random order to avoid that"
