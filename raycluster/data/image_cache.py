"""Images decoded once for many runs; every view of them is bitwise identical to one read from storage."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from raycluster.data.decode import BrokenImage, Jpeg, opened, rgb
from raycluster.data.manifest import DataSettings, read_entries, shard_samples
from raycluster.data.reader import contents

Pixels = bytes | BrokenImage | NDArray[np.uint8]
"""An image: its file, (h, w, 3) RGB, or why it cannot be used."""

ImageCache = Callable[[str, NDArray[np.int64]], "Iterator[Pixels] | None"]
"""Images of a manifest (its URI) by sample id, or None if they are not cached."""


def decode_shard(manifest_uri: str, shard: int, smallest_view: int, settings: DataSettings) -> list[Pixels]:
    """The images of one shard, in the order of their sample ids.

    smallest_view: side in pixels. JPEGs at least twice as large stay encoded: views may decode them at a reduced size.
    """
    header, entries = read_entries(manifest_uri, shard_samples(manifest_uri, shard))
    return [_decoded(content, smallest_view, settings) for content in contents(entries, header.image_column)]


def _decoded(content: bytes | BrokenImage, smallest_view: int, settings: DataSettings) -> Pixels:
    if isinstance(content, BrokenImage):
        return content
    try:
        image = opened(content, max_pixels=settings.max_image_pixels)
        if isinstance(image, Jpeg) and min(image.size) >= 2 * smallest_view:
            return content
        return np.asarray(rgb(image))
    except BrokenImage as error:
        return error
