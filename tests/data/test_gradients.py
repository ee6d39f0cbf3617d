"""Sobel gradients in the data stream equal those of the network's input layer within float16."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from raycluster.data.gradients import sobel
from raycluster.data.loader import BLOCK_BYTES, load_chunk, rows_within
from raycluster.data.manifest import DataSettings, build_manifest, write_manifest
from raycluster.data.transforms import View, apply
from raycluster.events import Round
from raycluster.models.export import load_backbone
from raycluster.models.input_layers import Sobel
from raycluster.run.config import Config
from raycluster.run.local_workers import LocalWorkers
from raycluster.run.loop import pretrain
from raycluster.run.validation import check_network
from raycluster.training.objective import Batch
from raycluster.training.rotation import rotate_batch
from raycluster.types import IMAGE_STD, Chunk, UserError

SLOPE = sum(1 / (255 * std) for std in IMAGE_STD) / 3  # of the normalised mean per level of gray
VARIED = View(size=24, crop_scale=(0.3, 1), flip=0.5, brightness=0.4, grayscale=0.2)


def of_the_network(pixels: np.ndarray) -> np.ndarray:
    """(h, w, 3) uint8 -> (h, w, 2) float32."""
    images = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]
    return Sobel()(images)[0].permute(1, 2, 0).numpy()


def assert_equal_in_float16(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype == np.float16 and found.shape == expected.shape
    np.testing.assert_allclose(found.astype(np.float32), expected, rtol=2**-11, atol=1e-5)


def gray(plane: np.ndarray) -> np.ndarray:
    return np.repeat(plane[..., None], 3, axis=2).astype(np.uint8)


def test_gradients_of_a_ramp() -> None:
    x, y = np.meshgrid(np.arange(7), np.arange(7))
    inside = sobel(gray(2 * x + 3 * y))[1:-1, 1:-1] / SLOPE
    np.testing.assert_allclose(inside[..., 0], -16, rtol=1e-3)
    np.testing.assert_allclose(inside[..., 1], -24, rtol=1e-3)


def test_a_constant_image_has_no_gradient_inside_and_an_impulse_returns_the_kernels_flipped() -> None:
    assert np.abs(sobel(gray(np.full((6, 6), 90)))[1:-1, 1:-1]).max() < 1e-5
    impulse = np.zeros((7, 7))
    impulse[3, 3] = 100
    found = sobel(gray(impulse))[2:5, 2:5][::-1, ::-1] / (100 * SLOPE)
    horizontal = np.array([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]])
    np.testing.assert_allclose(found, np.stack((horizontal, horizontal.T), axis=-1), atol=2e-3)


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (9, 7), (64, 64)])
def test_the_network_computes_the_same_borders_included(shape: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    assert_equal_in_float16(sobel(pixels), of_the_network(pixels))


def test_views_are_augmented_before_their_gradients(draw, encode) -> None:
    for seed in range(8):  # some are flipped
        pixels = apply(draw(), VARIED, np.random.default_rng(seed))
        gradients = apply(draw(), replace(VARIED, sobel=True), np.random.default_rng(seed))
        assert_equal_in_float16(gradients, of_the_network(pixels))


def test_gradients_rotate_with_their_image(draw) -> None:
    pixels = torch.from_numpy(np.stack([draw(24, 24, seed) for seed in range(2)]))
    gradients = torch.from_numpy(np.stack([sobel(one) for one in pixels.numpy()]))
    labels, weights = torch.zeros(1, 2, dtype=torch.int64), torch.ones(2)
    (rotated,), *_ = rotate_batch(Batch((gradients,), labels, weights))
    (images,), *_ = rotate_batch(Batch((pixels,), labels, weights))
    assert rotated.dtype == torch.float16
    for ours, image in zip(rotated.numpy(), images.numpy(), strict=True):
        assert_equal_in_float16(ours, of_the_network(image))


def test_chunks_carry_gradients_in_blocks_of_bounded_size(tmp_path: Path) -> None:
    settings, uri = DataSettings(uri="digits"), str(tmp_path / "manifest.parquet")
    write_manifest(build_manifest(settings), uri)
    view = View(size=224, sobel=True)
    chunk = Chunk(0, 0, 0, np.arange(30), np.zeros(30, np.int32))
    blocks = list(load_chunk(chunk, uri, view, seed=0, settings=settings, microbatch=8))
    assert [len(block.samples) for block in blocks] == [16, 14]
    assert rows_within(BLOCK_BYTES, view, 8) == 16
    assert all(block.images.dtype == np.float16 and block.images.shape[1:] == (224, 224, 2) for block in blocks)
    assert all(block.images.any((1, 2, 3)).all() for block in blocks)


@pytest.mark.parametrize("rotation", ["false", pytest.param("true", marks=pytest.mark.slow)])
def test_a_run_is_the_same_within_float16(tiny: Callable[..., Config], tmp_path: Path, rotation: str) -> None:
    results = []
    for name, value in (("pixels", "false"), ("gradients", "true")):
        words = [f"views.train.sobel={value}", f"views.eval.sobel={value}", "model.input=sobel", "training.epochs=1"]
        config = tiny(tmp_path / name, *words, f"training.rotation={rotation}", "method.num_clusters=4")
        (first,) = [event for event in pretrain(config, LocalWorkers()) if isinstance(event, Round)]
        results.append((first.record["loss"], load_backbone(config.run.dir)))
    (loss, backbone), (other_loss, other) = results
    assert other_loss == pytest.approx(loss, rel=0.02)
    images = torch.randint(0, 256, (4, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(other(images), backbone(images), rtol=0.1, atol=0.05)


@pytest.mark.parametrize("section", ["train", "eval", "extra.small"])
def test_gradients_for_a_network_that_reads_pixels_are_refused(
    tiny: Callable[..., Config], tmp_path: Path, section: str
) -> None:
    words = ["views.extra={small: {size: 8}}", f"views.{section}.sobel=true"]
    with pytest.raises(UserError, match=rf"views\.{section}\.sobel: seen true; wanted false where model\.input is rgb"):
        check_network(tiny(tmp_path, *words))
    check_network(tiny(tmp_path, *words, "model.input=sobel"))
