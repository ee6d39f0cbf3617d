"""From a chunk of the plan to pixels: read, decode, crop and vary; the same pixels wherever it is done."""

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

BLOCK_BYTES = 4 << 20  # of pixels: large enough to move cheaply, small enough to start soon


def rows_within(num_bytes: int, size: int, microbatch: int) -> int:
    """Rows of size x size pixels that fit into so many bytes: whole microbatches, at least one."""
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

    microbatch: blocks end where a lane's microbatches of so many rows do, which then need not be put together.
    Each visit is varied by generator(seed, "augment", epoch, sample, repeat). A picture that is broken or gone becomes
    black, with the reason in `errors`; what cannot be read for other reasons raises UserError after some attempts, and
    whatever else goes wrong ChunkFailed. image_cache: pictures that need not be read; the pixels are the same.
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
                images[index] = _seen(next(data), view, rng, settings.max_image_pixels)
            except BrokenImage as error:
                errors[index] = str(error)
        yield ImageBlock(
            chunk.stream, chunk.start + start, chunk.samples[start:stop], images, np.array(errors, np.str_)
        )


def _seen(content: Pixels, view: View, rng: np.random.Generator | None, max_pixels: int) -> np.ndarray:
    if isinstance(content, BrokenImage):
        raise content
    return apply(opened(content, max_pixels=max_pixels) if isinstance(content, bytes) else content, view, rng)
