from __future__ import annotations

import cv2
import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageOps
from pydantic import ValidationError

from raycluster.data.decode import BrokenImage, decode, opened
from raycluster.data.transforms import View, apply, jitter, random_box
from raycluster.seeding import generator

LARGE = 10_000_000


def boxes(view: View, width: int, height: int, count: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.array([random_box(width, height, view, iter(rng.random(32).tolist())) for _ in range(count)])


def test_random_boxes_are_distributed_as_torchvision_draws_them() -> None:
    transforms = pytest.importorskip("torchvision.transforms")
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    theirs = []
    for _ in range(4000):
        top, left, height, width = transforms.RandomResizedCrop.get_params(
            torch.zeros(3, 60, 80), scale=[0.08, 1.0], ratio=[3 / 4, 4 / 3]
        )
        theirs.append((left, top, left + width, top + height))
    ours = boxes(View(size=8, crop_scale=(0.08, 1)), 80, 60, 4000)
    shares = np.linspace(0.02, 0.98, 25)
    for edge in range(4):
        difference = np.quantile(ours[:, edge], shares) - np.quantile(np.array(theirs)[:, edge], shares)
        assert np.abs(difference).max() <= 3
    sides = [(b[:, 2:] - b[:, :2]).prod(1) for b in (ours, np.array(theirs))]
    assert abs(sides[0].mean() / sides[1].mean() - 1) < 0.03


def test_random_boxes_lie_inside_and_fall_back_to_the_centre() -> None:
    found = boxes(View(size=8, crop_scale=(0.2, 1), crop_ratio=(0.5, 2)), 31, 17, 500)
    assert (found[:, :2] >= 0).all()
    assert (found[:, 2] <= 31).all()
    assert (found[:, 3] <= 17).all()
    assert (found[:, 2:] > found[:, :2]).all()
    assert boxes(View(size=8, crop_scale=(1, 1)), 100, 10, 3).tolist() == [[43, 0, 56, 10]] * 3
    assert boxes(View(size=8, crop_scale=(0.5, 1)), 1, 1, 2).tolist() == [[0, 0, 1, 1]] * 2


def test_the_centre_is_what_torchvision_takes(draw) -> None:
    functional = pytest.importorskip("torchvision.transforms.functional")
    for height, width, resize, size in ((60, 80, 32, 28), (80, 60, 33, 33), (61, 83, 0, 40), (40, 47, 64, 56)):
        image = Image.fromarray(draw(height, width))
        resized = functional.resize(image, resize) if resize else image
        theirs = np.asarray(functional.center_crop(resized, size)).astype(int)
        ours = apply(image, View(size=size, resize=resize), None)
        assert np.abs(ours - theirs).max() <= 1


def test_the_whole_image_scaled_is_what_torchvision_makes(draw) -> None:
    functional = pytest.importorskip("torchvision.transforms.functional")
    for side, size in ((70, 32), (60, 32), (33, 32), (20, 32)):
        image = Image.fromarray(draw(side, side))
        ours = apply(image, View(size=size, crop_scale=(1, 1), crop_ratio=(1, 1)), np.random.default_rng(0))
        if side > size:
            theirs = np.asarray(functional.resize(image, [size, size]))
            assert np.abs(ours.astype(int) - theirs).mean() < 1
        else:  # plain bilinear interpolation
            tensor = functional.pil_to_tensor(image)
            theirs = functional.resize(tensor, [size, size], antialias=False).permute(1, 2, 0).numpy()
            assert np.abs(ours.astype(int) - theirs).max() <= 1


def textured(height: int, width: int) -> Image.Image:
    """Noise of equal strength in every octave, as in photographs."""
    rng, total = np.random.default_rng(0), np.zeros((height, width, 3))
    for cell in (1, 2, 4, 8, 16, 32, 64):
        noise = rng.integers(0, 256, (height // cell + 1, width // cell + 1, 3), np.uint8)
        total += np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))
    return Image.fromarray((total / 7).astype(np.uint8))


def edge_strength(pixels: np.ndarray) -> float:
    """RMS of the Sobel gradient of the gray image."""
    gray = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    return float(np.sqrt(np.mean([cv2.Sobel(gray, cv2.CV_64F, *axes) ** 2 for axes in ((1, 0), (0, 1))])))


@pytest.mark.parametrize("factor", [1.05, 1.2, 1.46, 1.7, 1.95, 2.5])
def test_a_crop_that_shrinks_is_antialiased(factor: float) -> None:
    image = textured(300, 300)
    view = View(size=round(300 / factor), crop_scale=(0.9, 1))
    for seed in range(3):
        box = random_box(300, 300, view, iter(np.random.default_rng(seed).random(32).tolist()))
        expected = np.asarray(image.crop(box).resize((view.size, view.size), Image.Resampling.BILINEAR))
        seen = apply(image, view, np.random.default_rng(seed))
        assert max(box[2] - box[0], box[3] - box[1]) > view.size
        assert edge_strength(seen) == pytest.approx(edge_strength(expected), rel=0.01)
        assert np.abs(seen.astype(int) - expected).mean() < 1


@pytest.mark.parametrize("size", [56, 100])
def test_a_smaller_decode_keeps_the_edges(size: int, encode) -> None:
    image, view = textured(480, 640), View(size=size, crop_scale=(0.8, 1))
    data = encode(image, quality=98, subsampling=0)
    decoded = Image.fromarray(decode(data, max_pixels=LARGE))
    for seed in range(5):
        seen = apply(opened(data, max_pixels=LARGE), view, np.random.default_rng(seed))
        full = apply(decoded, view, np.random.default_rng(seed))
        assert edge_strength(seen) == pytest.approx(edge_strength(full), rel=0.015)
        assert np.abs(seen.astype(int) - full).mean() < 1


@pytest.mark.parametrize("factors", [(0.6, 1, 1, 0), (1.7, 1, 1, 0), (1, 0.3, 1, 0), (1, 1.4, 1, 0), (1, 1, 0, 0)])
@pytest.mark.parametrize("shift", [0, 0.3, -0.4, 0.5])
def test_colours_change_as_in_torchvision(factors, shift: float, draw) -> None:
    functional = pytest.importorskip("torchvision.transforms.functional")
    image = Image.fromarray(draw())
    factors = (*factors[:3], shift)
    theirs = image
    for index in (2, 0, 3, 1):
        names = ("adjust_brightness", "adjust_contrast", "adjust_saturation", "adjust_hue")
        if factors[index] != (1, 1, 1, 0)[index]:
            theirs = getattr(functional, names[index])(theirs, factors[index])
    assert (np.asarray(jitter(image, factors, (2, 0, 3, 1))) == np.asarray(theirs)).all()


def test_a_small_image_is_scaled_up_to_the_crop(draw) -> None:
    eight = draw(8, 8)
    assert (apply(eight, View(size=8), None) == eight).all()
    assert apply(eight, View(size=32), None).shape == (32, 32, 3)
    assert apply(draw(3, 500), View(size=20), None).shape == (20, 20, 3)
    assert apply(draw(500, 1), View(size=20, resize=24), None).shape == (20, 20, 3)


def test_padding_shifts_the_image_over_black() -> None:
    image = np.full((8, 8, 3), 200, np.uint8)
    view = View(size=8, padding=2)
    seen = [apply(image, view, np.random.default_rng(seed))[..., 0] > 0 for seed in range(400)]
    shifts = {(int(s.any(1).argmax()), int(s.any(0).argmax()), int(s.sum())) for s in seen}
    assert {rows * columns for rows in (6, 7, 8) for columns in (6, 7, 8)} == {area for *_, area in shifts}
    areas = np.array([s.sum() for s in seen])
    assert abs((areas == 64).mean() - 1 / 25) < 0.03
    assert all((apply(image, View(size=4, padding=0), np.random.default_rng(s)) == 200).all() for s in range(9))


def test_padding_after_scaling() -> None:
    image = np.full((16, 24, 3), 200, np.uint8)
    seen = [apply(image, View(size=8, resize=8, padding=3), np.random.default_rng(seed)) for seed in range(50)]
    assert all(s.shape == (8, 8, 3) for s in seen)
    assert any((s == 200).all() for s in seen)
    assert any((s[0] == 0).all() for s in seen)


def test_a_thin_image_is_not_scaled_up_without_bound() -> None:
    with pytest.raises(BrokenImage, match="1 x 60000 pixels would be scaled to 208 x 12480000"):
        apply(np.zeros((60_000, 1, 3), np.uint8), View(size=224, padding=8), np.random.default_rng(0))


def test_half_of_the_images_are_flipped(draw) -> None:
    image = draw(8, 8)
    seen = [apply(image, View(size=8, flip=0.5), np.random.default_rng(seed)) for seed in range(400)]
    flipped = [(s == image[:, ::-1]).all() for s in seen]
    assert all(f or (s == image).all() for f, s in zip(flipped, seen, strict=True))
    assert abs(np.mean(flipped) - 0.5) < 0.08


def test_vertical_flips_are_drawn_apart_from_horizontal_ones(draw) -> None:
    image = draw(8, 8)
    four = [image, image[::-1], image[:, ::-1], image[::-1, ::-1]]
    view, rng = View(size=8, flip=0.5, vertical_flip=0.5), np.random.default_rng(0)
    seen = [apply(image, view, rng) for _ in range(400)]
    shares = [np.mean([(one == other).all() for one in seen]) for other in four]
    assert sum(shares) == pytest.approx(1) and max(abs(share - 0.25) for share in shares) < 0.08


def test_a_fixed_crop_is_the_same_in_every_visit(draw) -> None:
    image, view = draw(60, 60), View(size=16, crop_scale=(0.1, 0.5), fixed_crop=True)
    assert not view.is_random

    def of_image(number: int, view: View, visit: int = 0) -> np.ndarray:
        return apply(image, view, np.random.default_rng(visit), generator(0, "fixed crop", number))

    assert (of_image(1, view) == of_image(1, view, visit=7)).all()
    assert (of_image(1, view) != of_image(2, view)).any()
    flipping = View(size=16, crop_scale=(0.1, 0.5), fixed_crop=True, flip=0.5)
    assert flipping.is_random
    kinds = [(of_image(1, flipping, visit) == of_image(1, view)).all() for visit in range(20)]
    assert 0 < sum(kinds) < 20, "the rest of the view varies"


def test_a_fifth_of_the_images_lose_their_colour(draw) -> None:
    seen = [apply(draw(8, 8), View(size=8, grayscale=0.2), np.random.default_rng(seed)) for seed in range(500)]
    gray = [(s.max(-1) == s.min(-1)).all() for s in seen]
    assert abs(np.mean(gray) - 0.2) < 0.06


def test_jitter_strengths_bound_the_factors() -> None:
    image = np.full((4, 4, 3), 100, np.uint8)
    view = View(size=4, brightness=0.4)
    levels = np.array([apply(image, view, np.random.default_rng(seed))[0, 0, 0] for seed in range(500)])
    assert 60 <= levels.min() < 64
    assert 136 < levels.max() <= 140
    assert abs(levels.mean() - 100) < 3


def test_histogram_and_sharpness_change_as_in_torchvision(draw) -> None:
    functional = pytest.importorskip("torchvision.transforms.functional")
    image = Image.fromarray(draw(40, 40))
    equal, stretched = functional.equalize(image), functional.autocontrast(image)
    for view, theirs in (
        (View(size=40, equalize=1), equal),
        (View(size=40, autocontrast=1), stretched),
        (View(size=40, equalize=1, sharpness=1), equal),
    ):
        assert view.is_random
        assert (apply(image, view, np.random.default_rng(0)) == np.asarray(theirs)).all()
    seen = [apply(image, View(size=40, equalize=0.2), np.random.default_rng(seed)) for seed in range(500)]
    assert abs(np.mean([(one == np.asarray(equal)).all() for one in seen]) - 0.2) < 0.06
    blurred, sharpened = (np.asarray(functional.adjust_sharpness(image, factor)).astype(int) for factor in (0, 2))
    for seed in range(20):
        one = apply(image, View(size=40, sharpness=1), np.random.default_rng(seed))
        low, high = np.minimum(blurred, sharpened), np.maximum(blurred, sharpened)
        assert (low - 1 <= one).all() and (one <= high + 1).all()


def test_equalize_autocontrast_and_sharpness_exclude_each_other(draw) -> None:
    functional = pytest.importorskip("torchvision.transforms.functional")
    image = Image.fromarray(draw(40, 40) // 2)
    equal, stretched = (np.asarray(one) for one in (functional.equalize(image), functional.autocontrast(image)))
    view = View(size=40, equalize=1 / 3, autocontrast=1 / 3, sharpness=0.5)
    kinds = []
    for seed in range(600):
        seen = apply(image, view, np.random.default_rng(seed))
        sharpened = seen.max() <= 140  # the others reach 255
        kinds.append([(seen == equal).all(), (seen == stretched).all(), sharpened])
    assert (np.sum(kinds, axis=1) == 1).all()
    assert np.abs(np.mean(kinds, axis=0) - 1 / 3).max() < 0.06


def blurred(image: np.ndarray, sigma: float) -> np.ndarray:
    """A separable convolution with a sampled Gaussian, reflected at the edges."""
    reach = np.arange(-10, 11)
    weights = np.exp(-(reach**2) / (2 * sigma**2))
    padded = np.pad(image.astype(float), ((10, 10), (10, 10), (0, 0)), mode="reflect")
    for axis in (0, 1):
        padded = np.apply_along_axis(np.convolve, axis, padded, weights / weights.sum(), "valid")
    return padded


@pytest.mark.parametrize("sigma", [0.1, 0.6, 1.3, 2.0])
def test_a_blur_is_a_convolution_with_a_gaussian(draw, sigma: float) -> None:
    image = draw(40, 40)
    seen = apply(image, View(size=40, blur=1, blur_sigma=(sigma, sigma)), np.random.default_rng(0))
    assert np.abs(seen - blurred(image, sigma)).max() <= 1.5  # rounded to integers twice, and cut at 3 sigma
    pillow = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(sigma)), float)
    assert np.abs(seen - pillow)[5:-5, 5:-5].mean() < 1.5  # Pillow approximates a Gaussian by boxes


def test_half_of_the_images_are_blurred_with_deviations_from_their_range(draw) -> None:
    image = draw(24, 24)
    view = View(size=24, blur=0.5, blur_sigma=(0.5, 1.5))
    seen = [apply(image, view, np.random.default_rng(seed)) for seed in range(300)]
    changed = [one for one in seen if (one != image).any()]
    assert abs(len(changed) / 300 - 0.5) < 0.08
    weak, strong = (edge_strength(blurred(image, sigma).astype(np.uint8)) for sigma in (0.5, 1.5))
    strengths = [edge_strength(one) for one in changed]
    assert 0.9 * strong < min(strengths) < 1.2 * strong and 0.8 * weak < max(strengths) < 1.1 * weak


def test_solarized_as_in_pillow(draw) -> None:
    image = draw(20, 20)
    inverted = np.asarray(ImageOps.solarize(Image.fromarray(image), 128))
    assert (apply(image, View(size=20, solarize=1), np.random.default_rng(0)) == inverted).all()
    seen = [apply(image, View(size=20, solarize=0.2), np.random.default_rng(seed)) for seed in range(500)]
    kinds = [(one == inverted).all() for one in seen]
    assert all(kind or (one == image).all() for kind, one in zip(kinds, seen, strict=True))
    assert abs(np.mean(kinds) - 0.2) < 0.06


def test_colours_vary_with_their_probability(draw) -> None:
    image = draw(8, 8)
    view = View(size=8, brightness=0.8, hue=0.2, jitter=0.8)
    changed = [(apply(image, view, np.random.default_rng(seed)) != image).any() for seed in range(500)]
    assert abs(np.mean(changed) - 0.8) < 0.06


def test_a_view_depends_on_its_generator_only(draw, encode) -> None:
    view = View(
        size=20, crop_scale=(0.1, 1), flip=0.5, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.4, grayscale=0.2
    )
    data = encode(draw(200, 300))
    seen = [
        apply(opened(data, max_pixels=LARGE), view, generator(0, "augment", epoch, 17, repeat))
        for epoch, repeat in ((0, 0), (0, 1), (1, 0), (0, 0))
    ]
    assert (seen[0] == seen[3]).all()
    assert (seen[0] != seen[1]).any()
    assert (seen[0] != seen[2]).any()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"crop_ratio": (0.5, 2)}, "crop_ratio .* has no effect without crop_scale"),
        ({"crop_scale": (0.2, 1), "resize": 64}, "resize = 64 has no effect with crop_scale"),
        ({"crop_scale": (0.2, 1), "padding": 4}, "two ways to crop"),
        ({"crop_scale": (0.8, 0.2)}, "low <= high"),
        ({"resize": 16}, "resize = 16 is too small"),
        ({"equalize": 0.6, "autocontrast": 0.5}, "sum should be at most 1"),
        ({"crop_scale": (0.2, 1.5)}, "less than or equal to 1"),
        ({"flip": 1.5}, "less than or equal to 1"),
        ({"hue": 0.6}, "less than or equal to 0.5"),
        ({"size": 0}, "greater than or equal to 1"),
        ({"size": 100_000}, "less than or equal to 2048"),
        ({"resize": 100_000}, "less than or equal to 4096"),
        ({"fixed_crop": True}, "fixed_crop has no effect without crop_scale, padding or patch"),
        ({"padding": 32}, "padding = 32 leaves crops of size = 32 without an image"),
        ({"jitter": 0.8}, "jitter = 0.8 has no effect without brightness"),
        ({"blur_sigma": (0.1, 2)}, "blur_sigma .* has no effect without blur"),
        ({"blur": 0.5, "blur_sigma": (2, 1)}, "low <= high"),
        ({"zoom": 2}, "zoom"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict, says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        View(**{"size": 32, **options})
