"""Load the images of a chunk: read, decode, crop and augment. The pixels do not depend on the machine."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from raycluster.data.decode import BrokenImage, opened
from raycluster.data.image_cache import ImageCache, Pixels
from raycluster.data.manifest import DataSettings, read_entries
from raycluster.data.reader import contents
from raycluster.data.transforms import View, apply
from raycluster.seeding import generator
from raycluster.types import Chunk, ChunkFailed, ImageBlock, UserError

BLOCK_BYTES = 4 << 20  # of pixels: large enough to move cheaply, small enough for a short first wait


def rows_within(num_bytes: int, size: int, microbatch: int) -> int:
    """Rows of size x size RGB pixels that fit into `num_bytes`: whole microbatches, at least one."""
    return max(1, num_bytes // (3 * size**2) // microbatch) * microbatch


def load_chunk(
    chunk: Chunk,
    manifest_uri: str,
    view: View,
    *,
    seed: int,
    settings: DataSettings,
    image_cache: ImageCache | None = None,
    microbatch: int = 1,
) -> Iterator[ImageBlock]:
    """The images of `chunk` in its order, in blocks of at most 4 MiB of pixels, or one microbatch if that has more.

    Each visit is augmented by generator(seed, "augment", epoch, sample, repeat). An image that cannot be read or decoded
    becomes black, with the reason in `errors`. microbatch: rows; blocks end where microbatches of the stream do, so that
    these need no concatenation. image_cache: decoded images, with the same pixels. Raises UserError if storage stays
    unreachable, ChunkFailed for any other exception.
    """
    try:
        rows = rows_within(BLOCK_BYTES, view.size, microbatch)
        yield from _loaded(chunk, manifest_uri, view, rows, seed=seed, settings=settings, image_cache=image_cache)
    except UserError:
        raise
    except Exception as error:
        raise ChunkFailed(chunk.stream, f"{type(error).__name__}: {error}") from error


def _loaded(
    chunk: Chunk,
    manifest_uri: str,
    view: View,
    rows: int,
    *,
    seed: int,
    settings: DataSettings,
    image_cache: ImageCache | None,
) -> Iterator[ImageBlock]:
    data = image_cache(manifest_uri, chunk.samples) if image_cache else None
    if data is None:
        header, entries = read_entries(manifest_uri, chunk.samples)
        data = contents(entries, header.image_column)
    visits = list(zip(chunk.samples.tolist(), chunk.repeats.tolist(), strict=True))
    cuts = [0, *range(-chunk.start % rows or rows, len(visits), rows), len(visits)]
    for start, stop in pairwise(cuts if visits else []):
        part = visits[start:stop]
        images = np.zeros((len(part), view.size, view.size, 3), np.uint8)
        errors = [""] * len(part)
        for index, (sample, repeat) in enumerate(part):
            rng = generator(seed, "augment", chunk.epoch, sample, repeat) if view.is_random else None
            try:
                images[index] = _view_of(next(data), view, rng, settings.max_image_pixels)
            except BrokenImage as error:
                errors[index] = str(error)
        yield ImageBlock(
            chunk.stream, chunk.start + start, chunk.samples[start:stop], images, np.array(errors, np.str_)
        )


def _view_of(content: Pixels, view: View, rng: np.random.Generator | None, max_pixels: int) -> np.ndarray:
    if isinstance(content, BrokenImage):
        raise content
    return apply(opened(content, max_pixels=max_pixels) if isinstance(content, bytes) else content, view, rng)
