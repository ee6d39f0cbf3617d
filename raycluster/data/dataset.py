"""A data set as a run streams it: its manifest, in memory and where tasks can read it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from raycluster.data.loader import load_chunk
from raycluster.data.manifest import DataSettings, Manifest, build_manifest, read_manifest, write_manifest
from raycluster.data.transforms import View
from raycluster.io import storage
from raycluster.runtime.workers import Collectives
from raycluster.types import Loader


@dataclass(frozen=True)
class ImageDataset:
    """A data set ready to be streamed: its manifest, in memory and where tasks can read it."""

    manifest: Manifest
    uri: str
    settings: DataSettings
    seed: int

    def loader(self, view: View, microbatch: int = 1) -> Loader:
        return partial(
            load_chunk,
            manifest_uri=self.uri,
            view=view,
            seed=self.seed,
            settings=self.settings,
            microbatch=microbatch,
        )


def open_dataset(data: DataSettings, uri: str, workers: Collectives, seed: int) -> ImageDataset:
    """The images of `data`, their manifest cached at `uri`; collective."""
    workers.run_on_rank_zero(ensure_manifest, uri, data)
    return ImageDataset(read_manifest(uri, data), uri, data, seed)


def ensure_manifest(uri: str, data: DataSettings, *, fresh: bool = False) -> None:
    """List the images of `data` unless that was done before, or anew if `fresh`."""
    if fresh or not storage.exists(uri):
        write_manifest(build_manifest(data), uri)
