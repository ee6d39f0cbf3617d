"""Pictures decoded once for many runs, such that every view of them has the same pixels as when they are read anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from raycluster.data.decode import BrokenImage, Jpeg, opened, rgb
from raycluster.data.manifest import DataSettings, read_entries, shard_samples
from raycluster.data.reader import contents

Pixels = bytes | BrokenImage | NDArray[np.uint8]
"""A picture: its file, (h, w, 3) RGB, or why there is none."""

ImageCache = Callable[[str, NDArray[np.int64]], "Iterator[Pixels] | None"]
"""Pictures of a manifest (its URI) by sample id, or None if they are not held."""


def decode_shard(manifest_uri: str, shard: int, smallest_view: int, settings: DataSettings) -> list[Pixels]:
    """The pictures of one shard, in the order of their sample ids.

    smallest_view: side in pixels. A JPEG from which a view could be decoded at a reduced size stays as it is.
    """
    header, entries = read_entries(manifest_uri, shard_samples(manifest_uri, shard))
    return [_held(content, smallest_view, settings) for content in contents(entries, header.image_column)]


def _held(content: bytes | BrokenImage, smallest_view: int, settings: DataSettings) -> Pixels:
    if isinstance(content, BrokenImage):
        return content
    try:
        picture = opened(content, max_pixels=settings.max_image_pixels)
        if isinstance(picture, Jpeg) and min(picture.size) >= 2 * smallest_view:
            return content
        return np.asarray(rgb(picture))
    except BrokenImage as error:
        return error
