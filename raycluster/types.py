"""Data types shared across packages, and the exceptions that users see."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")

IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)
"""Of the colours (red, green, blue, in [0, 1]) of ImageNet, by which images are normalised."""

Shard = tuple[int, int]
"""(start, stop) sample ids of images that are read together."""


class UserError(ValueError):
    """An error that the user can correct; the message says what was seen, what was expected and what to change.

    Jobs print it without a traceback and exit with code 2; any other exception is a bug in raycluster.
    """


class RunStopped(Exception):
    """The run stopped on request, and its state is saved."""


class ChunkFailed(Exception):
    """A chunk could not be loaded, for a reason that is neither a `UserError` nor a single corrupt image.

    stream: of the chunk; in feature extraction its shard.
    """

    def __init__(self, stream: int, reason: str) -> None:
        super().__init__(stream, reason)
        self.stream, self.reason = stream, reason

    def __str__(self) -> str:
        return f"chunk of stream or shard {self.stream}: {self.reason}"


class Block(NamedTuple):
    """Contiguous rows of the feature matrix: one shard.

    samples: (n,) int64 sample ids. values: (n, D) float32 or float16, row i belongs to samples[i].
    """

    samples: NDArray[np.int64]
    values: NDArray[np.floating]


class Features(Protocol):
    """A feature matrix in blocks (shards), whose rows are identified by sample id.

    num_rows: N. dim: D. memory_budget: bytes that one partial sum may take.

    Every ``function`` is a module-level function of ``(block, *args)``: it may run in another process. It must accept
    an empty block and must not modify the block.
    """

    num_rows: int
    dim: int
    memory_budget: int

    def fold(self, function: Callable[..., T], *args: Any, combine: Callable[[T, T], T] = ...) -> T:
        """Combine ``function(rows, *args)`` over all rows, given as a block, a part of one, or several joined.

        combine: by default adds tuples element by element. It must be associative and commutative with bitwise
        identical results (integers, maxima), and may overwrite its arguments.
        """
        ...

    def map(self, function: Callable[..., NDArray[np.floating]], *args: Any) -> Features:
        """New features with the same samples: ``function(block, *args)`` gives the (n, D') values of one block."""
        ...

    def collect(self, function: Callable[..., T], *args: Any) -> list[T]:
        """``function(block, *args)`` of every block, in shard order."""
        ...

    def map_jobs(self, function: Callable[..., T], jobs: Sequence[tuple[Any, ...]]) -> list[T]:
        """``function(features, *job)`` of every job, in order; jobs run in parallel on several machines."""
        ...

    def rows(self, samples: NDArray[np.int64]) -> NDArray[np.float32]:
        """The (len(samples), D) float32 rows of these sample ids, in this order."""
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
    """Consecutive rows of a stream, read by one task.

    stream: index of the stream (training) or shard (feature extraction). start: position of the first row in it.
    samples: (n,) int64 sample ids. repeats: (n,) int32 index of the visit of a sample in its epoch, from 0. epoch,
    samples and repeats determine the augmentation. crops: (n,) rows of where the samples lie, None where each sample is
    a whole image.
    """

    stream: int
    start: int
    epoch: int
    samples: NDArray[np.int64]
    repeats: NDArray[np.int32]
    crops: Crops | None = None


ImageArray = NDArray[np.uint8] | NDArray[np.float16] | NDArray[np.float32]
"""Views of images: RGB (..., 3) uint8, or Sobel gradients (..., 2) float16; or boxes in them, (..., 4) float32."""


class ImageBlock(NamedTuple):
    """Decoded rows of one chunk, in order.

    samples: (n,) int64. images: (n, height, width, 3) uint8 RGB, or (n, height, width, 2) float16 Sobel gradients; or
    (n, 4) float32 boxes.
    errors: (n,) str, "" for a decoded image, else the reason (the values are then zero). extra_views: the same rows in
    further views, each of such a shape.
    """

    stream: int
    start: int
    samples: NDArray[np.int64]
    images: ImageArray
    errors: NDArray[np.str_]
    extra_views: tuple[ImageArray, ...] = ()


Loader = Callable[[Chunk], Iterable[ImageBlock]]
"""Reads, decodes and augments one chunk."""


@dataclass(frozen=True)
class FeatureRequest:
    """The features from which a method assigns labels.

    layer: of the backbone, None for the last. kind: `flat` (the map before its ReLU), `pooled` (its global average),
    `activations` (after the ReLU: the input of the heads), `quadrants` (the maps of all layers up to this one before
    their ReLU, each max-pooled to 2 x 2), `projections` (what the neck returns, where there is one), or `seed_boxes` (4
    columns, of no network: see `data.seed_boxes`). view: the section of `views` that is applied. visits: number of
    views per image, whose features are averaged, or with `concatenate` put side by side. online: use the input of the
    heads at the latest visit in training where there was one, in the first `visits` views of the objective. training:
    extract in training mode: batch norm by the statistics of `training.microbatch` images, and dropout. run: directory
    of a finished run on the same images whose network is used, None for the network in training.
    """

    layer: str | None = None
    kind: str = "flat"
    view: str = "eval"
    visits: int = 1
    online: bool = False
    training: bool = False
    run: str | None = None
    concatenate: bool = False


Head = tuple[NDArray[np.float32], NDArray[np.float32]]
"""Weight (K, D) and bias (K,) of a linear classifier of the activations of the last layer."""


@dataclass(frozen=True)
class LabelSet:
    """One labelling of all samples, learned by a head of its own.

    labels: (N,) int32 by sample id, -1 for excluded samples. num_classes: K, the size of the head. weight: of its loss,
    relative to the other label sets.
    """

    labels: NDArray[np.int32]
    num_classes: int
    weight: float = 1.0


@dataclass(frozen=True)
class Assignments:
    """What one reassignment found for N samples.

    label_sets: any number of labellings, none where the labels do not depend on the sample. metrics: of the
    clustering. state: arrays that a method keeps for its next call (centroids, scalings). drawn: (N,) bool, the
    samples that this round draws from the pool; None for all. crops: where the samples lie in their images while the
    network is trained on these labels; None where they always do.
    """

    num_samples: int
    label_sets: tuple[LabelSet, ...]
    metrics: dict[str, float] = field(default_factory=dict)
    state: dict[str, NDArray[np.generic]] = field(default_factory=dict)
    drawn: NDArray[np.bool_] | None = None
    crops: Crops | None = None

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
        """(N,) whether a sample is trained on: it is drawn, and has a label in some set or there are no label sets."""
        included = np.full(self.num_samples, not self.label_sets)
        for one in self.label_sets:
            included |= one.labels >= 0
        return included if self.drawn is None else included & self.drawn
