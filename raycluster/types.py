"""Nouns shared by every room: what travels between them, and the one kind of error a user can cause."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class UserError(ValueError):
    """A mistake only the user can mend: says what was seen, what was wanted and what to change.

    Jobs print it without a traceback and exit with code 2; every other exception is a defect of raycluster.
    """


class Stopped(Exception):
    """Somebody asked the run to stop, and its state is saved."""


class ChunkFailed(Exception):
    """A chunk could not be loaded, for a reason that is neither the user's mistake nor one broken picture.

    lane: of the chunk; in extraction its shard.
    """

    def __init__(self, lane: int, reason: str) -> None:
        super().__init__(lane, reason)
        self.lane, self.reason = lane, reason

    def __str__(self) -> str:
        return f"chunk of lane or shard {self.lane}: {self.reason}"


class Block(NamedTuple):
    """Rows of the feature matrix that lie together: one shard.

    samples: (n,) int64 sample ids. values: (n, D) float32 or float16, row i belongs to samples[i].
    """

    samples: NDArray[np.int64]
    values: NDArray[np.floating]


@dataclass(frozen=True)
class Chunk:
    """A piece of a lane that is read by one task: which images, in which order, seen how.

    lane: the lane (in training) or shard (in extraction) it belongs to. start: position of its first row in that lane.
    samples: (n,) int64 sample ids. repeats: (n,) int32, 0 for the first visit of a sample in its epoch, 1 for the
    second... epoch: names the augmentation, with sample and repeat.
    """

    lane: int
    start: int
    epoch: int
    samples: NDArray[np.int64]
    repeats: NDArray[np.int32]


class ImageBlock(NamedTuple):
    """Decoded rows of one chunk, in order.

    samples: (n,) int64. images: (n, height, width, 3) uint8 RGB. errors: (n,) str, "" where the image was decoded; else
    why it was not (its pixels are then zero).
    """

    lane: int
    start: int
    samples: NDArray[np.int64]
    images: NDArray[np.uint8]
    errors: NDArray[np.str_]


Loader = Callable[[Chunk], Iterable[ImageBlock]]
"""Reads, decodes and augments one chunk."""


@dataclass(frozen=True)
class Wanted:
    """The features that a method assigns labels from.

    layer: of the backbone, None for the last. kind: `flat` (the map before its ReLU), `pooled` (its global average) or
    `activations` (after the ReLU: what the heads read). view: the section of `views` in which images are seen,
    `cluster` or `train`. visits: of an image, whose features are averaged. harvested: instead, where there was one, the
    activations of the latest visit in training.
    """

    layer: str | None = None
    kind: str = "flat"
    view: str = "cluster"
    visits: int = 1
    harvested: bool = False


Head = tuple[NDArray[np.float32], NDArray[np.float32]]
"""Weight (K, D) and bias (K,) of a linear classifier of the activations of the last layer."""


@dataclass(frozen=True)
class Assignments:
    """What one reassignment found.

    labels: (heads, N) int32 by sample id, -1 for samples that take no part. num_clusters: per head. figures: what
    the clustering says of itself, for metrics. state: arrays a method keeps for the next round (centroids, scalings).
    """

    labels: NDArray[np.int32]
    num_clusters: tuple[int, ...]
    figures: dict[str, float] = field(default_factory=dict)
    state: dict[str, NDArray[np.generic]] = field(default_factory=dict)
