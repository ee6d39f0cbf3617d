"""Random patches: their geometry against plain numpy, and the distribution of scale, shift and angle."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError
from scipy.ndimage import map_coordinates

from raycluster.data.patches import Patch, central_box, cut_patch
from raycluster.data.transforms import View, apply

WIDE = Patch(scale=(0.7, 1.4), translation=0.2, rotation=20)


def box(left: float, top: float, side: float, width: int, height: int) -> np.ndarray:
    return np.array([left / width, top / height, (left + side) / width, (top + side) / height], np.float32)


def coordinates(size: int) -> np.ndarray:
    """(2, 60, 80) image whose red is its column and green its row, as cut from it: (2, size, size)."""
    rows, columns = np.mgrid[:60, :80]
    return np.stack([columns, rows, np.zeros_like(rows)], -1).astype(np.uint8)


def test_a_patch_without_variation_is_the_box() -> None:
    pixels = coordinates(16)
    found = cut_patch(pixels, box(20, 30, 16, 80, 60), Patch(), 16, iter([0.5, 0.9, 0.3, 0.1]))
    assert (found == pixels[30:46, 20:36]).all()


def test_a_patch_by_hand() -> None:
    """Twice as large and turned by 90 degrees: each output pixel is two image pixels further."""
    patch = Patch(scale=(2, 2), rotation=90)
    found = cut_patch(coordinates(4), box(38, 28, 4, 80, 60), patch, 4, iter([0.0, 0.0, 0.0, 1.0]))
    # around (39.5, 29.5), along a row of the output the image is read downwards, along a column to the left
    assert np.abs(found[..., 1] - [26.5, 28.5, 30.5, 32.5]).max() <= 0.5
    assert np.abs(found[..., 0].T - [42.5, 40.5, 38.5, 36.5]).max() <= 0.5


@pytest.mark.parametrize("place", [(3, 4, 16), (60, 40, 16), (0, 0, 16), (30, 20, 32)])
def test_patches_are_those_of_plain_interpolation(place: Sequence[int], draw) -> None:
    """Also near the border, where the image is reflected."""
    pixels, size = draw(60, 80), 16
    for seed in range(5):
        draws = np.random.default_rng(seed).random(4).tolist()
        found = cut_patch(pixels, box(*place, 80, 60), WIDE, size, iter(draws))
        side = place[2] * (0.7 + 0.7 * draws[0])
        radius = math.sqrt(-2 * math.log(1 - draws[1])) * 0.2 * place[2]
        x = place[0] + place[2] / 2 + radius * math.cos(2 * math.pi * draws[2])
        y = place[1] + place[2] / 2 + radius * math.sin(2 * math.pi * draws[2])
        x, y = np.clip(x, side / 2, 80 - side / 2), np.clip(y, side / 2, 60 - side / 2)
        angle = math.radians(40 * draws[3] - 20)
        offsets = (np.arange(size) + 0.5 - size / 2) * side / size
        across, down = np.meshgrid(offsets, offsets)
        columns = x + math.cos(angle) * across - math.sin(angle) * down - 0.5
        rows = y + math.sin(angle) * across + math.cos(angle) * down - 0.5
        expected = np.stack(
            [map_coordinates(pixels[..., c].astype(float), [rows, columns], order=1, mode="mirror") for c in range(3)],
            -1,
        )
        assert np.abs(found - expected).max() < 4  # OpenCV rounds positions to 1/32 of a pixel
        assert np.abs(found - expected).mean() < 1


def test_the_distribution_of_patches() -> None:
    """From an image of coordinates, the centre, side and angle of each patch can be read off."""
    rng, found = np.random.default_rng(0), []
    rows, columns = np.mgrid[:200, :200]
    pixels = np.stack([columns, rows, np.zeros_like(rows)], -1).astype(np.uint8)
    for _ in range(2000):
        patch = cut_patch(pixels, box(90, 90, 20, 200, 200), WIDE, 20, iter(rng.random(4).tolist())).astype(float)
        step = (patch[:, -1].mean(0) - patch[:, 0].mean(0)) / 19
        centre = patch.mean((0, 1))
        found.append([np.hypot(step[0], step[1]), centre[0], centre[1], np.degrees(np.arctan2(step[1], step[0]))])
    scale, x, y, angle = np.array(found).T
    assert 0.67 < scale.min() < 0.73 and 1.37 < scale.max() < 1.43 and abs(scale.mean() - 1.05) < 0.02
    for centre in (x, y):
        assert abs(centre.mean() - 99.5) < 0.5 and abs(centre.std() - 4) < 0.3
    assert -22 < angle.min() < -19 and 19 < angle.max() < 22 and abs(angle.mean()) < 1
    assert abs(np.corrcoef(x, y)[0, 1]) < 0.1


def test_a_shift_out_of_the_image_is_taken_back() -> None:
    far = Patch(translation=100)
    for seed in range(20):
        found = cut_patch(coordinates(8), box(30, 30, 8, 80, 60), far, 8, iter(np.random.default_rng(seed).random(4)))
        columns, rows = found[0, :, 0].astype(int), found[:, 0, 1].astype(int)
        assert columns[0] >= 0 and columns[-1] <= 79 and (np.diff(columns) == 1).all()
        assert rows[0] >= 0 and rows[-1] <= 59 and (np.diff(rows) == 1).all()


def test_without_a_box_the_centre_is_taken(draw) -> None:
    image = Image.fromarray(draw(48, 64))
    rng = np.random.default_rng
    assert (apply(image, View(size=16, patch=Patch()), rng(0)) == apply(image, View(size=16), None)).all()
    scaled, plain = View(size=16, resize=24, patch=Patch()), View(size=16, resize=24)
    assert np.abs(apply(image, scaled, rng(0)).astype(int) - apply(image, plain, None)).max() <= 3
    assert central_box(64, 48, 16).tolist() == pytest.approx([24 / 64, 16 / 48, 40 / 64, 32 / 48])


def test_a_fixed_patch_is_the_same_in_every_visit(draw) -> None:
    image, view = Image.fromarray(draw()), View(size=16, patch=WIDE, fixed_crop=True)
    first, second = (apply(image, view, None, np.random.default_rng(1)) for _ in range(2))
    assert (first == second).all()
    assert (first != apply(image, view, None, np.random.default_rng(2))).any()


def test_the_box_of_a_sample_moves_the_patch(draw) -> None:
    image, view, place = Image.fromarray(draw(60, 80)), View(size=16, patch=Patch()), box(20, 30, 16, 80, 60)
    assert (apply(image, view, np.random.default_rng(0), box=place) == np.asarray(image)[30:46, 20:36]).all()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"patch": {"scale": (1.4, 0.7)}}, "low <= high"),
        ({"patch": {}, "crop_scale": (0.2, 1)}, "crop_scale and patch are two ways to crop"),
        ({"patch": {}, "padding": 4}, "padding and patch are two ways to crop"),
        ({"patch": {"rotation": 200}}, "less than or equal to 180"),
        ({"patch": {}, "resize": 16}, "resize = 16 is too small"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict, says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        View(**{"size": 32, **options})
