"""Seeds lie where the edges are: by hand, by frequency, and in the stream of the data tasks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raycluster.data.decode import BrokenImage
from raycluster.data.epoch_plan import shard_chunks
from raycluster.data.loader import load_chunk
from raycluster.data.manifest import DataSettings, build_manifest, write_manifest
from raycluster.data.seed_boxes import SeedBox, edge_strength, seed_box


def places(pixels: np.ndarray, size: int, count: int) -> np.ndarray:
    """(count, 2) left and top in pixels of drawn boxes."""
    height, width = pixels.shape[:2]
    boxes = np.array([seed_box(pixels, size, np.random.default_rng(seed)) for seed in range(count)])
    assert ((boxes[:, 2:] - boxes[:, :2]) * (width, height) == pytest.approx(size)) and (boxes >= 0).all()
    assert (boxes <= 1).all()
    return np.rint(boxes[:, :2] * (width, height)).astype(int)


def test_edges_by_hand() -> None:
    """One step from black to white between columns 3 and 4: a Sobel magnitude of 4 * 255 on both sides of it."""
    pixels = np.zeros((6, 8, 3), np.uint8)
    pixels[:, 4:] = 255
    expected = np.zeros((6, 8))
    expected[:, 3:5] = 4 * 255
    assert (edge_strength(pixels) == expected).all()
    found = places(pixels, 2, 50)
    assert set(found[:, 0]) == {2, 3}, "the centre, one pixel right of the left edge, lies on the step"
    assert set(found[:, 1]) == {0, 1, 2, 3, 4}


def test_frequency_is_proportional_to_strength() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (7, 9, 3), np.uint8)
    found = places(pixels, 4, 6000)
    counts = np.zeros((4, 6))
    np.add.at(counts, (found[:, 1], found[:, 0]), 1)
    expected = edge_strength(pixels)[2:6, 2:8]
    assert np.abs(counts / 6000 - expected / expected.sum()).max() < 0.015


def test_without_edges_all_places_are_equally_likely() -> None:
    found = places(np.full((5, 6, 3), 77, np.uint8), 4, 3000)
    shares = np.unique(found, axis=0, return_counts=True)[1] / 3000
    assert len(shares) == 2 * 3 and np.abs(shares - 1 / 6).max() < 0.03


def test_a_seed_as_large_as_the_image_is_the_image() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    assert seed_box(pixels, 8, np.random.default_rng(0)).tolist() == [0, 0, 1, 1]


def test_a_seed_larger_than_the_image_is_refused() -> None:
    image = Image.fromarray(np.zeros((20, 30, 3), np.uint8))
    with pytest.raises(BrokenImage, match=r"30 x 20 pixels hold no patch of 32: lower views\.train\.size, or set"):
        SeedBox(32).render(image, None, np.random.default_rng(0), None)
    assert SeedBox(32, resize=40).render(image, None, np.random.default_rng(0), None).shape == (4,)


def test_boxes_are_streamed(classes: Path, tmp_path: Path) -> None:
    """Whatever the chunks and the epoch: the box depends on image, seed and sample only."""
    settings, uri = DataSettings(uri=str(classes), shard_size=5), str(tmp_path / "manifest.parquet")
    write_manifest(build_manifest(settings), uri)
    (whole,) = shard_chunks([(0, 12)])
    found, fits = (
        np.concatenate([block.images for block in load_chunk(whole, uri, SeedBox(size), seed=3, settings=settings)])
        for size in (16, 48)
    )
    assert found.shape == (12, 4) and found.dtype == np.float32 and len(np.unique(found, axis=0)) > 6
    assert (fits[:, 1] == 0).all() and (fits[:, 3] == 1).all()
    for chunk in shard_chunks([(0, 5), (5, 12)], epoch=7):
        blocks = load_chunk(chunk, uri, SeedBox(16), seed=3, settings=settings)
        assert all((block.images == found[block.samples]).all() for block in blocks)
