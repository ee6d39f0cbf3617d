"""Images that are decoded once give the same pixels as images that are read every time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from raycluster.data.image_cache import Pixels, decode_shard
from raycluster.data.loader import load_chunk
from raycluster.data.manifest import DataSettings, build_manifest, write_manifest
from raycluster.data.transforms import View
from raycluster.types import Chunk

VIEWS = [
    View(size=16),
    View(size=16, resize=20),
    View(size=16, crop_scale=(0.2, 1.0), flip=0.5, brightness=0.4, hue=0.1, grayscale=0.2),
    View(size=24, padding=4),
]


@pytest.fixture
def folder(tmp_path: Path, draw: Callable, encode: Callable) -> Path:
    """Small and large images of every kind, and one that is broken."""
    images = tmp_path / "images"
    images.mkdir()
    for index, (height, width, kind) in enumerate(
        [(20, 20, "PNG"), (31, 40, "JPEG"), (32, 32, "JPEG"), (90, 200, "JPEG"), (200, 90, "PNG"), (64, 64, "WEBP")]
    ):
        (images / f"{index}.{kind.lower()}").write_bytes(encode(draw(height, width, seed=index), kind))
    (images / "6.jpeg").write_bytes(encode(draw(20, 20))[:-60])
    (images / "7.png").write_bytes(b"no image")
    return images


@pytest.mark.parametrize("view", VIEWS, ids=repr)
def test_every_view_has_the_same_pixels(folder: Path, tmp_path: Path, view: View) -> None:
    settings, uri = DataSettings(uri=str(folder), shard_size=3), str(tmp_path / "manifest.parquet")
    manifest = build_manifest(settings)
    write_manifest(manifest, uri)
    images = [one for shard in range(len(manifest.shards)) for one in decode_shard(uri, shard, 16, settings)]
    assert [type(one) for one in images].count(bytes) == 2, "large JPEGs are best decoded at a reduced size"
    assert [isinstance(one, np.ndarray) for one in images].count(True) == 4

    def image_cache(manifest_uri: str, samples: NDArray[np.int64]) -> Iterator[Pixels]:
        assert manifest_uri == uri
        return (images[sample] for sample in samples)

    order = np.array([5, 0, 6, 3, 1, 7, 2, 4, 3])
    chunk = Chunk(0, 0, epoch=2, samples=order, repeats=np.arange(9, dtype=np.int32) // 8)
    load = partial(load_chunk, chunk, uri, view, seed=1, settings=settings)
    for read, kept in zip(load(), load(image_cache=image_cache), strict=True):
        assert np.array_equal(read.images, kept.images) and read.images.any()
        assert read.errors.tolist() == kept.errors.tolist() and (read.errors != "").sum() == 2
    assert [block.images.tobytes() for block in load(image_cache=lambda uri, samples: None)] == [
        block.images.tobytes() for block in load()
    ]
