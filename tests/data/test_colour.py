"""Strong changes of colour against plain numpy and the standard library."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest
from pydantic import ValidationError

from raycluster.data.colour import ChangeHSV, change_hsv, scale_components
from raycluster.data.transforms import View, apply


def test_components_by_hand() -> None:
    """Red varies between .2 and .8, green between .4 and .6, blue not at all: these are the components."""
    red, green = np.meshgrid([0.2, 0.8], [0.4, 0.6])
    colours = np.stack([red, green, np.full((2, 2), 0.5)], -1).astype(np.float32)
    found = scale_components(colours, (5, 2, 0.5))  # of blue, green, red
    expected = np.stack([0.5 + 0.5 * (red - 0.5), 0.5 + 2 * (green - 0.5), np.full((2, 2), 0.5)], -1)
    expected = (expected - expected.min()) / (expected.max() - expected.min())
    assert found == pytest.approx(expected, abs=1e-6)


def test_components_are_those_of_a_singular_value_decomposition() -> None:
    colours = np.random.default_rng(0).random((9, 7, 3)).astype(np.float32) * (1, 0.6, 0.3)
    factors = (0.7, 1.9, 0.5)
    rows = colours.reshape(-1, 3).astype(np.float64)
    mean = rows.mean(0)
    left, values, right = np.linalg.svd(rows - mean, full_matrices=False)
    expected = (left * values * factors[::-1]) @ right + mean  # singular values descend
    expected = (expected - expected.min()) / (expected.max() - expected.min())
    assert scale_components(colours.astype(np.float32), factors).reshape(-1, 3) == pytest.approx(expected, abs=1e-5)


def test_an_image_of_one_colour_stays() -> None:
    colours = np.full((4, 4, 3), 0.25, np.float32)
    assert (scale_components(colours, (2, 2, 2)) == colours).all()


def test_hsv_is_that_of_the_standard_library() -> None:
    colours = np.random.default_rng(0).random((6, 5, 3)).astype(np.float32)
    changes = np.array([[0.5, 3.0], [1.2, 0.8], [-0.05, 0.1]], np.float32)
    found = change_hsv(colours, changes, 0.07)
    for colour, changed in zip(colours.reshape(-1, 3).tolist(), found.reshape(-1, 3), strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*colour)
        saturation, value = min(max(saturation**0.5 * 1.2 - 0.05, 0), 1), min(max(value**3 * 0.8 + 0.1, 0), 1)
        assert changed == pytest.approx(colorsys.hsv_to_rgb((hue + 0.07) % 1, saturation, value), abs=1e-4)


def test_draws_cover_their_ranges() -> None:
    view = ChangeHSV(power=(0.25, 4), factor=(0.7, 1.4), offset=0.1, hue=0.1)
    rng = np.random.default_rng(0)
    changes, hues = zip(*(view.draw(iter(rng.random(7).tolist())) for _ in range(4000)), strict=True)
    for index, (low, high) in enumerate([(0.25, 4), (0.7, 1.4), (-0.1, 0.1)]):
        for of in (0, 1):
            values = np.array(changes)[:, index, of]
            assert values.min() == pytest.approx(low, abs=0.01) and values.max() == pytest.approx(high, abs=0.01)
            assert values.mean() == pytest.approx((low + high) / 2, abs=0.06)
    assert -0.1 <= min(hues) < -0.099 and 0.099 < max(hues) <= 0.1
    assert abs(np.corrcoef(np.array(changes)[:, 0].T)[0, 1]) < 0.05, "saturation and value have draws of their own"


def test_views_change_colours_at_random(draw) -> None:
    pixels = draw(32, 32)
    neutral = View(size=32, colour_components=(1, 1), hsv=ChangeHSV())
    stretched = (pixels.astype(float) - pixels.min()) / (pixels.max() - pixels.min()) * 255
    assert np.abs(apply(pixels, neutral, np.random.default_rng(0)) - stretched).max() <= 1
    strong = View(size=32, colour_components=(0.5, 2), hsv=ChangeHSV(power=(0.25, 4), factor=(0.7, 1.4), offset=0.1))
    first, second, again = (apply(pixels, strong, np.random.default_rng(seed)) for seed in (0, 1, 0))
    assert (first == again).all() and np.abs(first.astype(int) - second).mean() > 5
    assert strong.is_random and View(size=32, hsv=ChangeHSV()).is_random


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"colour_components": (2, 0.5)}, r"colour_components = \[2.0, 0.5\] should be"),
        ({"hsv": {"power": (4, 0.25)}}, "power = .* low <= high"),
        ({"hsv": {"factor": (0, 1)}}, "greater than 0"),
        ({"hsv": {"hue": 0.6}}, "less than or equal to 0.5"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict, says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        View(**{"size": 32, **options})
