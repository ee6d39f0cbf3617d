"""Images become features: every shard through the backbone, in evaluation mode, wherever a worker is free."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from raycluster.data.load import load_chunk
from raycluster.data.manifest import DataSettings, Manifest
from raycluster.data.plan import shard_chunks
from raycluster.data.transforms import View
from raycluster.models.backbone import Backbone, pool
from raycluster.types import Block, ImageBlock, Loader, Stopped
from raycluster.workers import Workers

BATCH = 256  # rows of one forward pass; part of the result, since kernels may round differently at other sizes


class Progress(NamedTuple):
    """How far a phase is: `done` of `total` images, and what the phase has to say."""

    phase: str
    done: int
    total: int
    note: str = ""


class Skipped(NamedTuple):
    """An image that could not be used, and why."""

    sample: int
    reason: str


@dataclass(frozen=True)
class Pictures:
    """A data set ready to be streamed: its manifest, in memory and where tasks can read it."""

    manifest: Manifest
    uri: str
    settings: DataSettings
    seed: int

    def loader(self, view: View) -> Loader:
        return partial(load_chunk, manifest_uri=self.uri, view=view, seed=self.seed, settings=self.settings)


@dataclass(frozen=True)
class Descriptor:
    """Which output of the backbone describes an image.

    view: what it sees. layer: whose output before its ReLU, None for the last. kind: `flat`, `pooled` (global average)
    or `activations` (flat, after the ReLU). visits: of each image, which are averaged. epoch: names random views.
    """

    view: View
    layer: str | None = None
    kind: str = "flat"
    visits: int = 1
    epoch: int = 0

    @torch.no_grad()
    def describe(self, backbone: Backbone, images: NDArray[np.uint8], device: torch.device) -> NDArray[np.float16]:
        """(n * visits, h, w, 3) pixels -> (n, D) float16 features."""
        batches = [
            torch.from_numpy(images[start : start + BATCH]).to(device).permute(0, 3, 1, 2)
            for start in range(0, max(len(images), 1), BATCH)
        ]
        maps = [backbone(batch, self.layer) for batch in batches]
        rows = torch.cat([pool(features) if self.kind == "pooled" else features.flatten(1) for features in maps])
        if self.kind == "activations":
            rows = rows.relu()
        if self.visits > 1:
            rows = rows.float().unflatten(0, (-1, self.visits)).mean(1)
        return rows.to("cpu", torch.float16).numpy()


def extract(
    backbone: Backbone,
    pictures: Pictures,
    workers: Workers,
    *,
    descriptor: Descriptor,
    version: str,
    shards: Sequence[int],
) -> Iterator[Progress | Skipped]:
    """Put the features of `shards` under `version`, sharing the work; what a lost machine takes with it is done again.

    Yields progress and, at the end, the skipped images of all workers. Collective: every worker must exhaust it.
    Raises Stopped on all workers soon after one was asked to stop.
    """
    skipped: list[Skipped] = []
    was_training = backbone.training
    backbone.eval()
    whole = shard_chunks(pictures.manifest.shards, descriptor.epoch, descriptor.visits)
    while missing := workers.missing(version, shards):
        chunks = [whole[shard] for shard in workers.share(missing)]
        done, total = 0, sum(len(chunk.samples) for chunk in chunks)
        for shard, group in groupby(
            workers.stream(chunks, pictures.loader(descriptor.view)), key=lambda block: block.lane
        ):
            samples, images, errors = _whole_shard(list(group))
            good = errors == ""
            skipped += [
                Skipped(int(sample), str(error)) for sample, error in zip(samples[~good], errors[~good], strict=True)
            ]
            features = descriptor.describe(backbone, images[good], workers.device)
            workers.put(version, shard, Block(samples[good][:: descriptor.visits], features))
            done += len(samples)
            yield Progress("extracting", done, total)
            if workers.stopping():
                break
        if any(workers.gather([workers.stopping()])):
            raise Stopped("stopped while extracting features; the same command goes on from the last checkpoint")
        skipped = workers.gather(skipped)
    backbone.train(was_training)
    yield from sorted(set(skipped))


def _whole_shard(blocks: list[ImageBlock]) -> tuple[NDArray[np.int64], NDArray[np.uint8], NDArray[np.str_]]:
    return (
        np.concatenate([block.samples for block in blocks]),
        np.concatenate([block.images for block in blocks]),
        np.concatenate([block.errors for block in blocks]),
    )
