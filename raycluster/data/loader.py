"""From a chunk of the plan to pixels: read, decode, crop and augment; the same pixels on any machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise

import numpy as np

from raycluster.data.decode import BrokenImage, opened
from raycluster.data.image_cache import ImageCache, Pixels
from raycluster.data.manifest import DataSettings, read_entries
from raycluster.data.reader import contents
from raycluster.data.seed_boxes import SeedBox
from raycluster.data.transforms import View
from raycluster.seeding import generator, reseeded_generator
from raycluster.types import Chunk, ChunkFailed, ImageArray, ImageBlock, UserError

BLOCK_BYTES = 4 << 20  # of pixels: large enough to move cheaply, small enough to start soon


def rows_within(num_bytes: int, view: View | SeedBox, microbatch: int) -> int:
    """Rows of a view that fit into so many bytes: whole microbatches, at least one."""
    return max(1, num_bytes // view.blank(1).nbytes // microbatch) * microbatch


def load_chunk(
    chunk: Chunk,
    manifest_uri: str,
    view: View | SeedBox,
    *,
    seed: int,
    settings: DataSettings,
    extra_views: Sequence[View] = (),
    image_cache: ImageCache | None = None,
    microbatch: int = 1,
) -> Iterator[ImageBlock]:
    """The images of `chunk` in its order, in blocks of at most 4 MiB of pixels, or one microbatch if that has more.

    microbatch: blocks end where the stream's microbatches of so many rows do, which then need not be concatenated.
    Each visit is augmented by generator(seed, "augment", epoch, sample, repeat), extra views by their number besides.
    A broken or missing image becomes black, with the reason in `errors`; storage that stays out of reach raises
    UserError after some attempts, anything else ChunkFailed. image_cache: images that need not be read; the pixels are
    the same.
    """
    try:
        rows = rows_within(BLOCK_BYTES, view, microbatch)
        cuts = [0, *range(-chunk.start % rows or rows, len(chunk.samples), rows), len(chunk.samples)]
        contents = _contents(chunk, manifest_uri, image_cache)
        render = _Renderer(chunk, (view, *extra_views), seed, settings.max_image_pixels)
        for start, stop in pairwise(cuts if len(chunk.samples) else []):
            yield render.block(start, list(islice(contents, stop - start)))
    except UserError:
        raise
    except Exception as error:
        raise ChunkFailed(chunk.stream, f"{type(error).__name__}: {error}") from error


def _contents(chunk: Chunk, manifest_uri: str, image_cache: ImageCache | None) -> Iterator[Pixels]:
    """The bytes or pixels of each row's image."""
    images = chunk.samples if chunk.crops is None else chunk.crops.images
    cached = image_cache(manifest_uri, images) if image_cache else None
    if cached is not None:
        return cached
    header, entries = read_entries(manifest_uri, images)
    return contents(entries, header.image_column)


@dataclass(frozen=True)
class _Renderer:
    """Decodes and augments the rows of a chunk in each view."""

    chunk: Chunk
    views: tuple[View | SeedBox, ...]
    seed: int
    max_pixels: int

    def block(self, start: int, contents: Sequence[Pixels]) -> ImageBlock:
        """The rows from `start` on, one for each content."""
        chunk, stop = self.chunk, start + len(contents)
        images = [view.blank(len(contents)) for view in self.views]
        errors = [""] * len(contents)
        for index, content in enumerate(contents):
            try:
                for rows, pixels in zip(images, self._views(start + index, content), strict=True):
                    rows[index] = pixels
            except BrokenImage as error:
                errors[index] = str(error)
        samples = chunk.samples[start:stop]
        return ImageBlock(
            chunk.stream, chunk.start + start, samples, images[0], np.array(errors, np.str_), (*images[1:],)
        )

    def _views(self, row: int, content: Pixels) -> Iterator[ImageArray]:
        if isinstance(content, BrokenImage):
            raise content
        sample, repeat = int(self.chunk.samples[row]), int(self.chunk.repeats[row])
        for number, view in enumerate(self.views):
            image = opened(content, max_pixels=self.max_pixels) if isinstance(content, bytes) else content
            box = None if self.chunk.crops is None else self.chunk.crops.boxes[row]
            further = [number] if number else []
            work = (self.chunk.epoch, sample, repeat, *further)
            rng = reseeded_generator(self.seed, "augment", *work) if view.is_random else None
            crop_rng = generator(self.seed, "fixed crop", sample, *further) if view.fixed_crop else None
            yield view.render(image, rng, crop_rng, box)
