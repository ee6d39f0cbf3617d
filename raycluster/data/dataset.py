"""A data set as a run streams it: its manifest, in memory and at a URI that tasks can read."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial

from raycluster.data.class_order import MAX_WINDOW_SHARDS
from raycluster.data.loader import load_chunk
from raycluster.data.manifest import DataSettings, Manifest, build_manifest, read_manifest, write_manifest
from raycluster.data.transforms import View
from raycluster.io import storage
from raycluster.runtime.workers import Collectives
from raycluster.types import Loader

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageDataset:
    """A data set: its manifest, in memory and at `uri`, which all nodes can read."""

    manifest: Manifest
    uri: str
    settings: DataSettings
    seed: int

    @property
    def window_shards(self) -> int:
        """Neighbouring shards of an epoch that are shuffled together."""
        chosen = self.settings.shuffle_window_shards
        return self.manifest.window_shards if chosen == "auto" else chosen

    def loader(self, view: View, microbatch: int = 1) -> Loader:
        """See load_chunk."""
        return partial(
            load_chunk,
            manifest_uri=self.uri,
            view=view,
            seed=self.seed,
            settings=self.settings,
            microbatch=microbatch,
        )


def open_dataset(data: DataSettings, uri: str, workers: Collectives, seed: int) -> ImageDataset:
    """The images of `data`, with the manifest cached at `uri`. Collective."""
    workers.run_on_rank_zero(ensure_manifest, uri, data)
    return ImageDataset(read_manifest(uri, data), uri, data, seed)


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
