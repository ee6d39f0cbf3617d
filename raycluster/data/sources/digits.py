"""`digits`: 1797 handwritten digits of 8 x 8 pixels that come with scikit-learn (Alpaydin & Kaynak, 1998, test set)."""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
import pyarrow as pa
from PIL import Image

from raycluster.data.sources.base import Found, entries, even_shards, repeated

NAME = "digits"
_BRIGHTEST = 16


def find(shard_size: int) -> Found:
    """In scikit-learn's order, which is mixed already."""
    from sklearn.datasets import load_digits

    labels = load_digits().target
    count = len(labels)
    return Found(
        entries=entries(
            [f"digits/{index:04d}.png" for index in range(count)], repeated([NAME], [count]), row=np.arange(count)
        ),
        shards=even_shards(count, shard_size),
        labels=pa.array(labels),
        is_shuffled=True,
    )


@lru_cache(maxsize=1)
def images() -> list[bytes]:
    """PNG files, 8-bit gray, ink white on black."""
    from sklearn.datasets import load_digits

    return [_png(np.round(image * (255 / _BRIGHTEST)).astype(np.uint8)) for image in load_digits().images]


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
