"""Embeddings to cluster: features of augmented images, before and after one more training epoch."""

from __future__ import annotations

import io
import time

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from raycluster.clustering.whitening import whiten
from raycluster.features.matrix import LocalFeatures
from raycluster.io import storage
from raycluster.models.backbone import Backbone
from raycluster.models.heads import Heads
from raycluster.models.smallnet import Model
from raycluster.training.config import TrainingSettings
from raycluster.training.optimiser import Optimisers
from raycluster.training.step import Microbatch, Network, Step
from raycluster.types import Block

_BATCH = 256
_MICROBATCH = 32


def run(data: str, out: str, views: int = 4, epochs: int = 2, dim: int = 256, layer: str = "conv4") -> str:
    """Write OUT/before.npy and OUT/after.npy, (views * images, dim) float32, PCA-whitened and normalised rows.

    data: folder of Parquet shards with the columns `image` and `label`, whose names begin with `train`.
    """
    began = time.perf_counter()
    images, labels = _read(data)
    backbone = Model().build(0)
    heads, settings = Heads(backbone.num_features, (int(labels.max()) + 1,), 0), TrainingSettings()
    step = Step(Network(backbone, heads), Optimisers(backbone, heads, settings), settings)
    losses = [_train(step, images, labels, epoch) for epoch in range(epochs)]
    _write(storage.join(out, "before.npy"), _embed(backbone, images, layer, views, dim))
    losses.append(_train(step, images, labels, epochs))
    _write(storage.join(out, "after.npy"), _embed(backbone, images, layer, views, dim))
    shown = ", ".join(f"{loss:.2f}" for loss in losses)
    return (
        f"{views * len(images)} x {dim} embeddings of {layer}, twice, in {out}; training loss by epoch {shown}; "
        f"{time.perf_counter() - began:.0f} s"
    )


def _read(uri: str) -> tuple[Tensor, Tensor]:
    """(N, 3, h, w) uint8 RGB, (N,) int64."""
    images: list[NDArray[np.uint8]] = []
    labels: list[int] = []
    for file in storage.list_files(uri):
        if file.rpartition("/")[2].startswith("train"):
            table = pq.read_table(io.BytesIO(storage.read_bytes(file)), columns=["image", "label"])
            images += [
                np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB")) for encoded in table["image"].to_pylist()
            ]
            labels += table["label"].to_pylist()
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)


def _augment(images: Tensor, draw: torch.Generator) -> Tensor:
    """A random crop of each image padded by four pixels, flipped with probability 0.5; uint8."""
    height, width = images.shape[2:]
    padded = nn.functional.pad(images.float(), (4, 4, 4, 4), mode="reflect").to(torch.uint8)
    rows, columns = torch.randint(9, (2, len(images)), generator=draw).tolist()
    flips = (torch.rand(len(images), generator=draw) < 0.5).tolist()
    crops = []
    for image, top, left, flip in zip(padded, rows, columns, flips, strict=True):
        crop = image[:, top : top + height, left : left + width]
        crops.append(crop.flip(2) if flip else crop)
    return torch.stack(crops)


def _train(step: Step, images: Tensor, labels: Tensor, epoch: int) -> float:
    """Train one epoch; returns its mean loss."""
    draw, losses = torch.Generator().manual_seed(epoch), []
    for rows in torch.randperm(len(images), generator=draw).split(_BATCH):
        if len(rows) == _BATCH:
            pixels = _augment(images[rows], draw).permute(0, 2, 3, 1).contiguous()
            parts = zip(pixels.split(_MICROBATCH), labels[rows].split(_MICROBATCH), strict=True)
            batch = [Microbatch(part, wanted[None], torch.ones(len(part)), 0) for part, wanted in parts]
            losses.append(step(batch, epoch=float(epoch)).loss)
    return float(np.mean(losses))


@torch.no_grad()
def _embed(backbone: Backbone, images: Tensor, layer: str, views: int, dim: int) -> NDArray[np.float32]:
    backbone.eval()
    draw, parts = torch.Generator().manual_seed(99), []
    for _ in range(views):
        for part in images.split(_BATCH):
            maps = backbone(_augment(part, draw), layer)
            parts.append(nn.functional.adaptive_avg_pool2d(maps, 2).flatten(1).numpy())
    cuts = np.cumsum([0] + [len(part) for part in parts])
    blocks = [Block(np.arange(cut, cut + len(part)), part) for cut, part in zip(cuts, parts, strict=False)]
    backbone.train()
    return whiten(LocalFeatures(blocks), dim).rows(np.arange(cuts[-1]))


def _write(uri: str, values: NDArray[np.float32]) -> None:
    buffer = io.BytesIO()
    np.save(buffer, values)
    storage.write_bytes(uri, buffer.getvalue())
