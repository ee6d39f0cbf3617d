"""Images become features: every shard through the backbone, wherever a worker is free."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raycluster.data.dataset import ImageDataset
from raycluster.data.epoch_plan import shard_chunks
from raycluster.data.seed_boxes import SeedBox
from raycluster.data.transforms import View
from raycluster.events import FailureEvent, Progress
from raycluster.models.backbone import Backbone, pool, quadrants, training_mode
from raycluster.runtime.workers import Workers
from raycluster.seeding import seed_for
from raycluster.types import Block, ChunkFailed, ImageArray, ImageBlock, RunStopped, UserError

BATCH = 256  # rows of one forward pass; part of the result, since kernels may round differently at other sizes


class SkippedImage(NamedTuple):
    """An image that could not be used, and why."""

    sample: int
    reason: str


@dataclass(frozen=True)
class FeatureSpec:
    """Which output of the backbone describes an image.

    view: what it sees. layer: whose output before its ReLU, None for the last. kind: `flat`, `pooled` (global average),
    `activations` (flat, after the ReLU), `quadrants` (the maps of all layers up to this one, each max-pooled to 2 x 2)
    or `seed_boxes` (the boxes of seeds, of no network). visits: of each image, which are averaged, or with
    `concatenate` put side by side. epoch: names random views. microbatch: None for evaluation mode; else training mode,
    with batch norm over at most so many rows of a shard.
    """

    view: View
    layer: str | None = None
    kind: str = "flat"
    visits: int = 1
    epoch: int = 0
    microbatch: int | None = None
    concatenate: bool = False

    @property
    def rendered(self) -> View | SeedBox:
        """What is streamed of each image."""
        return SeedBox(self.view.size, self.view.resize) if self.kind == "seed_boxes" else self.view

    @torch.no_grad()
    def describe(
        self, backbone: nn.Module, images: ImageArray, device: torch.device, seed: int = 0
    ) -> NDArray[np.floating]:
        """(n * visits, h, w, 3 or 2) -> (n, D) float16 features; boxes (n, 4) float32 as they are.

        backbone: in evaluation mode; where `layer` is None any network of images. seed: of dropout.
        """
        if self.kind == "seed_boxes":
            return np.asarray(images, np.float32)
        batches = [torch.from_numpy(part).to(device).permute(0, 3, 1, 2) for part in self._split(images)]
        maps = [self._forward(backbone, batch, seed_for(seed, "batch", i)) for i, batch in enumerate(batches)]
        rows = torch.cat([pool(features) if self.kind == "pooled" else features.flatten(1) for features in maps])
        if self.kind == "activations":
            rows = rows.relu()
        if self.visits > 1:
            views = rows.float().unflatten(0, (-1, self.visits))
            rows = views.flatten(1) if self.concatenate else views.mean(1)
        return rows.to("cpu", torch.float16).numpy()

    def _split(self, images: ImageArray) -> Sequence[NDArray[Any]]:
        """What goes through the network together; in training mode, parts of nearly equal size."""
        if self.microbatch is not None:
            return np.array_split(images, max(1, -(-len(images) // self.microbatch)))
        return [images[start : start + BATCH] for start in range(0, max(len(images), 1), BATCH)]

    def _forward(self, backbone: nn.Module, batch: Tensor, seed: int) -> Tensor:
        if self.microbatch is None or len(batch) < 2:  # one row has no variance
            return self._output(backbone, batch)
        with training_mode(backbone, seed):
            return self._output(backbone, batch)

    def _output(self, backbone: nn.Module, batch: Tensor) -> Tensor:
        if self.kind == "quadrants":
            assert isinstance(backbone, Backbone)
            return quadrants(backbone, batch, self.layer)
        output: Tensor = backbone(batch) if self.layer is None else backbone(batch, self.layer)
        return output


def extract(
    backbone: nn.Module,
    dataset: ImageDataset,
    workers: Workers,
    *,
    feature_spec: FeatureSpec,
    version: str,
    shards: Sequence[int],
    drawn: NDArray[np.bool_] | None = None,
    again: bool = False,
) -> Iterator[Progress | SkippedImage | FailureEvent]:
    """Extract and store the features of `shards`, sharded over workers; lost ones are extracted again.

    version: names the weights. drawn: (N,) the samples to extract, at least one a shard, None for all. again: this is
    not the first call for this version. Yields progress and, at the end, the skipped images of all workers. Collective:
    every worker must exhaust it. Raises RunStopped on all workers soon after one was asked to stop, UserError if a
    shard fails twice.
    """
    skipped: list[SkippedImage] = []
    failed: list[ChunkFailed] = []
    was_training = backbone.training
    backbone.eval()
    whole = dataset.locate(shard_chunks(dataset.shards, feature_spec.epoch, feature_spec.visits, drawn))
    while missing := workers.missing(version, shards):
        if again:
            yield FailureEvent(f"{_some(missing)} of features were lost or failed; extracting them again", len(missing))
        again = True
        chunks = [whole[shard] for shard in workers.shard(missing)]
        done, total = 0, sum(len(chunk.samples) for chunk in chunks)
        stream = workers.stream(chunks, dataset.loader(feature_spec.rendered))
        try:
            for shard, group in groupby(stream, key=lambda block: block.stream):
                samples, images, errors = _whole_shard(list(group))
                good = errors == ""
                skipped += map(SkippedImage, samples[~good].tolist(), errors[~good].tolist())
                seed = seed_for(dataset.seed, "extract", feature_spec.epoch, shard)
                features = feature_spec.describe(backbone, images[good], workers.device, seed)
                workers.put(version, shard, Block(samples[good][:: feature_spec.visits], features))
                done += len(samples)
                yield Progress("extracting", done, total)
                if workers.stopping():
                    break
        except ChunkFailed as error:
            failed.append(error)
        if any(workers.all_gather([workers.stopping()])):
            raise RunStopped("stopped while extracting features; the same command resumes from the last checkpoint")
        skipped, failed = workers.all_gather(skipped), workers.all_gather(failed)
        _check_failed(failed, dataset)
    backbone.train(was_training)
    yield from sorted(set(skipped))


def _check_failed(failed: list[ChunkFailed], dataset: ImageDataset) -> None:
    """A shard may fail once: for lack of memory, or by a machine that is ill."""
    counts = Counter(error.stream for error in failed)
    for error in failed:
        if counts[error.stream] > 1:
            start, stop = dataset.shards[error.stream]
            raise UserError(
                f"shard {error.stream}, the {stop - start} images from {dataset.path(start)} to "
                f"{dataset.path(stop - 1)}, failed twice: {error.reason}. Mend or remove them, or give the tasks "
                "that read them more memory"
            )


def _some(shards: Sequence[int]) -> str:
    return "1 shard" if len(shards) == 1 else f"{len(shards)} shards"


def _whole_shard(blocks: list[ImageBlock]) -> tuple[NDArray[np.int64], ImageArray, NDArray[np.str_]]:
    return (
        np.concatenate([block.samples for block in blocks]),
        np.concatenate([block.images for block in blocks]),
        np.concatenate([block.errors for block in blocks]),
    )
