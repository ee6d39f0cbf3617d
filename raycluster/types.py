"""Data types shared across packages, and the exceptions that users see."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")
Shard = tuple[int, int]
"""(start, stop) sample ids of images that are read together."""


class UserError(ValueError):
    """A mistake only the user can mend: says what was seen, what was wanted and what to change.

    Jobs print it without a traceback and exit with code 2; every other exception is a defect of raycluster.
    """


class RunStopped(Exception):
    """Somebody asked the run to stop, and its state is saved."""


class ChunkFailed(Exception):
    """A chunk could not be loaded, for a reason that is neither the user's mistake nor one broken picture.

    stream: of the chunk; in extraction its shard.
    """

    def __init__(self, stream: int, reason: str) -> None:
        super().__init__(stream, reason)
        self.stream, self.reason = stream, reason

    def __str__(self) -> str:
        return f"chunk of lane or shard {self.stream}: {self.reason}"


class Block(NamedTuple):
    """Rows of the feature matrix that lie together: one shard.

    samples: (n,) int64 sample ids. values: (n, D) float32 or float16, row i belongs to samples[i].
    """

    samples: NDArray[np.int64]
    values: NDArray[np.floating]


class Features(Protocol):
    """Rows of features in blocks (shards), each row known by its sample id.

    num_rows: N. dim: D. memory_budget: bytes that one sum may take.

    Every ``function`` is a module-level function of ``(block, *args)``: it may run in another process. It must accept a
    block of no rows, and must not change the block.
    """

    num_rows: int
    dim: int
    memory_budget: int

    def fold(self, function: Callable[..., T], *args: Any, combine: Callable[[T, T], T] = ...) -> T:
        """Combine ``function(piece, *args)`` over all rows; a piece is a block, a part of one, or several together.

        combine: by default adds tuples element by element. It must be associative and commutative to the bit
        (integers, maxima), and may write over its arguments.
        """
        ...

    def map(self, function: Callable[..., NDArray[np.floating]], *args: Any) -> Features:
        """New features with the same samples: ``function(block, *args)`` gives the (n, D') values of one block."""
        ...

    def collect(self, function: Callable[..., T], *args: Any) -> list[T]:
        """``function(block, *args)`` of every block, in shard order."""
        ...

    def map_jobs(self, function: Callable[..., T], jobs: Sequence[tuple[Any, ...]]) -> list[T]:
        """``function(features, *job)`` of every job, in order: whole problems, side by side on several machines."""
        ...

    def rows(self, samples: NDArray[np.int64]) -> NDArray[np.float32]:
        """The (len(samples), D) float32 rows of these sample ids, in the order asked."""
        ...


@dataclass(frozen=True)
class Crops:
    """Samples that are parts of images: sample i is the rectangle boxes[i] of image images[i].

    images: (M,) int64 image ids, ascending. boxes: (M, 4) float32: left, top, right and bottom edge as fractions of
    the width and height.
    """

    images: NDArray[np.int64]
    boxes: NDArray[np.float32]

    def __getitem__(self, samples: NDArray[np.int64]) -> Crops:
        return Crops(self.images[samples], self.boxes[samples])


@dataclass(frozen=True)
class Chunk:
    """A piece of a lane that is read by one task: which images, in which order, seen how.

    stream: the lane (in training) or shard (in extraction) it belongs to. start: position of its first row in that lane.
    samples: (n,) int64 sample ids. repeats: (n,) int32, 0 for the first visit of a sample in its epoch, 1 for the
    second... epoch: names the augmentation, with sample and repeat. crops: (n,) rows of where the samples lie, None
    where each sample is a whole image.
    """

    stream: int
    start: int
    epoch: int
    samples: NDArray[np.int64]
    repeats: NDArray[np.int32]
    crops: Crops | None = None


class ImageBlock(NamedTuple):
    """Decoded rows of one chunk, in order.

    samples: (n,) int64. images: (n, height, width, 3) uint8 RGB. errors: (n,) str, "" where the image was decoded; else
    why it was not (its pixels are then zero). extra_views: the same rows in further views, each (n, height, width, 3).
    """

    stream: int
    start: int
    samples: NDArray[np.int64]
    images: NDArray[np.uint8]
    errors: NDArray[np.str_]
    extra_views: tuple[NDArray[np.uint8], ...] = ()


Loader = Callable[[Chunk], Iterable[ImageBlock]]
"""Reads, decodes and augments one chunk."""


@dataclass(frozen=True)
class FeatureRequest:
    """The features that a method assigns labels from.

    layer: of the backbone, None for the last. kind: `flat` (the map before its ReLU), `pooled` (its global average) or
    `activations` (after the ReLU: what the heads read). view: the section of `views` in which images are seen,
    `eval` or `train`. visits: of an image, whose features are averaged. online: instead, where there was one, the
    activations of the latest visit in training.
    """

    layer: str | None = None
    kind: str = "flat"
    view: str = "eval"
    visits: int = 1
    online: bool = False


Head = tuple[NDArray[np.float32], NDArray[np.float32]]
"""Weight (K, D) and bias (K,) of a linear classifier of the activations of the last layer."""


@dataclass(frozen=True)
class LabelSet:
    """One labelling of all samples, learned by a head of its own.

    labels: (N,) int32 by sample id, -1 for samples that are excluded. num_classes: K, the size of the head. weight: of
    its loss, relative to the other label sets.
    """

    labels: NDArray[np.int32]
    num_classes: int
    weight: float = 1.0


@dataclass(frozen=True)
class Assignments:
    """What one reassignment found for N samples.

    label_sets: any number of labellings, none where the labels do not depend on the sample. metrics: of the
    clustering. state: arrays that a method keeps for its next call (centroids, scalings).
    """

    num_samples: int
    label_sets: tuple[LabelSet, ...]
    metrics: dict[str, float] = field(default_factory=dict)
    state: dict[str, NDArray[np.generic]] = field(default_factory=dict)

    @property
    def labels(self) -> NDArray[np.int32]:
        """(label sets, N) int32, a copy."""
        return np.array([one.labels for one in self.label_sets], np.int32).reshape(-1, self.num_samples)

    @property
    def num_classes(self) -> tuple[int, ...]:
        """K of each label set."""
        return tuple(one.num_classes for one in self.label_sets)

    @property
    def included(self) -> NDArray[np.bool_]:
        """(N,) whether a sample is trained on: it has a label in some set, or there are no label sets."""
        included = np.full(self.num_samples, not self.label_sets)
        for one in self.label_sets:
            included |= one.labels >= 0
        return included
