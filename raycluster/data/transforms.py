"""Data augmentation: crop, flip and colour, drawn from the generator of a visit.

The distributions are those of torchvision's RandomResizedCrop, RandomCrop, CenterCrop, ColorJitter, RandomGrayscale,
GaussianBlur and RandomSolarize.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import permutations
from typing import Annotated

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps
from PIL.Image import Resampling
from pydantic import Field

from raycluster.config import settings
from raycluster.data.antialias import resize
from raycluster.data.colour import ChangeHSV, change_hsv, jitter, scale_components
from raycluster.data.decode import Box, BrokenImage, DecodableImage, Jpeg, rgb, set_jpeg_scale
from raycluster.data.gradients import sobel
from raycluster.data.patches import Factor, Patch, central_box, cut_patch
from raycluster.types import ImageArray, UserError

Share = Annotated[float, Field(ge=0, le=1)]
Strength = Annotated[float, Field(ge=0)]

_RATIO = (3 / 4, 4 / 3)
_ATTEMPTS = 10  # at a random resized crop, as in torchvision
_DRAWS = 2 * _ATTEMPTS + 28  # at least as many as one view consumes
_MAX_RESIZED = 2**26  # pixels of an image that is scaled before it is padded
_SOLARIZED = 128  # values from here on are inverted
_SIGMA = (0.1, 2.0)  # of SimCLR, and of what followed it
_ORDERS = list(permutations(range(4)))


@settings
class View:
    """Crop and augmentation of images; by default the centre crop alone.

    size: side of the result in pixels, at most 2048. resize: length to which the short side is scaled first, 0 for
    none; an image smaller than the crop is always scaled up to it. crop_scale, crop_ratio: ranges of the area (as a
    share of the image) and of width / height (default 3/4 to 4/3) of a random crop. padding: black pixels added on each
    side before a random crop of `size`. patch: a random, scaled and rotated square near the box of a sample, or near
    the centre, instead of a crop. fixed_crop: the random crop of an image is the same in every visit. flip,
    vertical_flip: probabilities of a horizontal and of a vertical flip. brightness, contrast, saturation: x for
    factors from 1 - x to 1 + x. hue: x for shifts from -x to x of the colour circle. jitter: probability that these
    four are applied. grayscale: probability of conversion to gray. blur: probability of a Gaussian blur. blur_sigma:
    range of its standard deviation in pixels of the result, null for 0.1 to 2. solarize: probability of inverting
    values from 128 on. equalize, autocontrast: probabilities of equalizing the histogram of each channel, or of
    stretching it to the full range. sharpness: x for a factor from 1 - x (blurred) to 1 + x, if neither is applied.
    colour_components: range of the factors by which colours deviate more from their mean along each of their principal
    components. hsv: powers, factors and offsets of saturation and value, and shifts of the hue.
    sobel: the stream carries Sobel gradients in float16 instead of pixels, which needs model.input sobel.
    """

    size: Annotated[int, Field(ge=1, le=2048)]
    resize: Annotated[int, Field(ge=0, le=4096)] = 0
    crop_scale: tuple[Share, Share] | None = None
    crop_ratio: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] | None = None
    padding: Annotated[int, Field(ge=0)] | None = None
    patch: Patch | None = None
    fixed_crop: bool = False
    flip: Share = 0.0
    vertical_flip: Share = 0.0
    brightness: Strength = 0.0
    contrast: Strength = 0.0
    saturation: Strength = 0.0
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    jitter: Share = 1.0
    grayscale: Share = 0.0
    blur: Share = 0.0
    blur_sigma: tuple[Annotated[float, Field(gt=0, le=100)], Annotated[float, Field(gt=0, le=100)]] | None = None
    solarize: Share = 0.0
    equalize: Share = 0.0
    autocontrast: Share = 0.0
    sharpness: Strength = 0.0
    colour_components: tuple[Factor, Factor] | None = None
    hsv: ChangeHSV | None = None
    sobel: bool = False

    def __post_init__(self) -> None:
        errors = list(_config_errors(self))
        if errors:
            raise UserError("; ".join(errors))

    @property
    def jitters(self) -> bool:
        """Whether brightness, contrast, saturation or hue vary."""
        return bool(self.brightness or self.contrast or self.saturation or self.hue)

    @property
    def filters(self) -> bool:
        """Whether histogram, sharpness, blur or solarization vary."""
        return bool(self.equalize or self.autocontrast or self.sharpness or self.blur or self.solarize)

    @property
    def recolours(self) -> bool:
        """Whether colours vary along their components, or in saturation and value."""
        return self.colour_components is not None or self.hsv is not None

    @property
    def crops(self) -> bool:
        """Whether a random part of the image is taken."""
        return self.crop_scale is not None or self.padding is not None or self.patch is not None

    @property
    def is_random(self) -> bool:
        """Whether two visits of an image may differ."""
        flips = self.flip > 0 or self.vertical_flip > 0
        colours = self.jitters or self.filters or self.recolours or self.grayscale > 0
        return (self.crops and not self.fixed_crop) or colours or flips

    def blank(self, count: int) -> ImageArray:
        """`count` rows of zeros in the shape and type of this view."""
        side = (count, self.size, self.size)
        return np.zeros((*side, 2), np.float16) if self.sobel else np.zeros((*side, 3), np.uint8)

    def render(
        self,
        image: DecodableImage | NDArray[np.uint8],
        rng: np.random.Generator | None,
        crop_rng: np.random.Generator | None,
        box: NDArray[np.float32] | None,
    ) -> ImageArray:
        """See `apply`."""
        return apply(image, self, rng, crop_rng, box)


@settings
class Views:
    """train: what the network learns from. eval: what is clustered and evaluated. extra: further views by name, for
    methods that see an image in several.
    """

    train: View
    eval: View
    extra: dict[str, View] = Field(default_factory=dict)

    def section(self, name: str) -> View:
        """The view of this name. Raises UserError if there is none."""
        known = {"train": self.train, "eval": self.eval, **self.extra}
        if name not in known:
            raise UserError(
                f"the method needs views.extra.{name}; wanted one of {', '.join(known)}, or add that section"
            )
        return known[name]


def apply(
    image: DecodableImage | NDArray[np.uint8],
    view: View,
    rng: np.random.Generator | None,
    crop_rng: np.random.Generator | None = None,
    box: NDArray[np.float32] | None = None,
) -> ImageArray:
    """The view of one image: (size, size, 3) uint8, or its gradients, (size, size, 2) float16, where `sobel` is set.

    image: (h, w, 3) RGB, or what `decode.opened` gives (a JPEG is decoded here, at a reduced size where possible).
    rng: of this visit; may be None for a view that is not random. crop_rng: of this image, for a fixed crop. box: of
    the sample in the image, edges as fractions of width and height; None for the whole image. Raises BrokenImage.
    """
    pixels = _augmented(image, view, rng, crop_rng, box)
    return sobel(pixels) if view.sobel else pixels


def whole(image: DecodableImage, view: View) -> NDArray[np.uint8]:
    """The image scaled to `resize`, and at least so that a square of `size` fits."""
    size = _resized(image.size, view)
    if size == image.size:
        return np.asarray(rgb(image))
    if size[0] * size[1] > _MAX_RESIZED:
        raise BrokenImage(f"{image.size[0]} x {image.size[1]} pixels would be scaled to {size[0]} x {size[1]}")
    box = set_jpeg_scale(image, (0, 0, *image.size), size)
    return _pixels(rgb(image).resize(size, Resampling.BILINEAR, box))


def _augmented(
    image: DecodableImage | NDArray[np.uint8],
    view: View,
    rng: np.random.Generator | None,
    crop_rng: np.random.Generator | None,
    box: NDArray[np.float32] | None,
) -> NDArray[np.uint8]:
    if box is not None and view.patch is None:
        image = _part(image, box)
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    assert rng is not None or not view.is_random, "a random view needs a generator"
    draws, crop_draws = _draws(rng), _draws(crop_rng)
    pixels = _cropped(image, view, crop_draws if view.fixed_crop else draws, box)
    if not view.is_random:
        return pixels
    flipped = next(draws) < view.flip
    if view.recolours:
        pixels = _recoloured(pixels, view, draws)
    if view.jitters and (view.jitter == 1 or next(draws) < view.jitter):
        pixels = _pixels(_jittered(Image.fromarray(pixels), view, draws))
    if view.grayscale and next(draws) < view.grayscale:
        pixels = _pixels(Image.fromarray(pixels).convert("L").convert("RGB"))
    if view.filters:
        pixels = _filtered(pixels, view, draws)
    if view.vertical_flip and next(draws) < view.vertical_flip:
        pixels = pixels[::-1]
    return np.asarray(cv2.flip(pixels, 1), np.uint8) if flipped else pixels  # NumPy's reversed copy is slow


def _draws(rng: np.random.Generator | None) -> Iterator[float]:
    """Uniform numbers in [0, 1) for one view; none without a generator."""
    return iter(() if rng is None else rng.random(_DRAWS).tolist())


def random_box(width: int, height: int, view: View, draws: Iterator[float]) -> Box:
    """The box of a random resized crop: (left, top, right, bottom) in whole pixels.

    draws: uniform numbers in [0, 1).
    """
    assert view.crop_scale is not None
    low, high = view.crop_ratio or _RATIO
    for _ in range(_ATTEMPTS):
        area = width * height * _between(*view.crop_scale, next(draws))
        ratio = math.exp(_between(math.log(low), math.log(high), next(draws)))
        across, down = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < across <= width and 0 < down <= height:
            left, top = int(next(draws) * (width - across + 1)), int(next(draws) * (height - down + 1))
            return left, top, left + across, top + down
    ratio = min(max(width / height, low), high)
    across, down = min(width, max(1, round(height * ratio))), min(height, max(1, round(width / ratio)))
    left, top = (width - across) // 2, (height - down) // 2
    return left, top, left + across, top + down


def _config_errors(view: View) -> Iterator[str]:
    if view.crop_ratio is not None and view.crop_scale is None:
        yield f"crop_ratio = {list(view.crop_ratio)} has no effect without crop_scale; set that or drop this"
    if view.jitter != 1 and not view.jitters:
        yield f"jitter = {view.jitter} has no effect without brightness, contrast, saturation or hue; drop it"
    if view.blur_sigma is not None and not view.blur:
        yield f"blur_sigma = {list(view.blur_sigma)} has no effect without blur; set that or drop this"
    for name, pair in _ranges(view):
        if pair is not None and (pair[0] > pair[1] or pair[1] == 0):
            yield f"{name} = {list(pair)} should be [low, high] with low <= high and high > 0"
    ways = [name for name in ("crop_scale", "padding", "patch") if getattr(view, name) is not None]
    if len(ways) > 1:
        yield f"{ways[0]} and {ways[1]} are two ways to crop; drop one of them"
    if view.fixed_crop and not view.crops:
        yield "fixed_crop has no effect without crop_scale, padding or patch; set one of them or drop it"
    if view.padding is not None and view.padding >= view.size:
        yield f"padding = {view.padding} leaves crops of size = {view.size} without an image; set it below size"
    if view.crop_scale is not None and view.resize:
        yield f"resize = {view.resize} has no effect with crop_scale, which takes a share of any size; drop it"
    if view.equalize + view.autocontrast > 1:
        yield (
            f"equalize = {view.equalize} and autocontrast = {view.autocontrast} are never applied together; "
            "their sum should be at most 1"
        )
    if view.resize and view.resize + 2 * (view.padding or 0) < view.size:
        yield f"resize = {view.resize} is too small to cut size = {view.size} out of it; raise it, or set 0"


def _ranges(view: View) -> Iterator[tuple[str, tuple[float, float] | None]]:
    for name in ("crop_scale", "crop_ratio", "colour_components", "blur_sigma"):
        yield name, getattr(view, name)


def _between(low: float, high: float, share: float) -> float:
    return low + (high - low) * share


def _part(image: DecodableImage | NDArray[np.uint8], box: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The rectangle of an image, at least one pixel. box: edges as fractions."""
    pixels = image if isinstance(image, np.ndarray) else np.asarray(rgb(image))
    height, width = pixels.shape[:2]
    left, top, right, bottom = np.rint(box * (width, height, width, height)).astype(int).tolist()
    left, top = min(left, width - 1), min(top, height - 1)
    return pixels[top : max(bottom, top + 1), left : max(right, left + 1)]


def _cropped(
    image: DecodableImage, view: View, draws: Iterator[float], box: NDArray[np.float32] | None
) -> NDArray[np.uint8]:
    if view.patch is not None:
        pixels = whole(image, view)
        place = central_box(pixels.shape[1], pixels.shape[0], view.size) if box is None else box
        return cut_patch(pixels, place, view.patch, view.size, draws)
    return _random_crop(image, view, draws)


def _random_crop(image: DecodableImage, view: View, draws: Iterator[float]) -> NDArray[np.uint8]:
    if view.crop_scale is None:
        return _pixels(_placed(image, view, draws))
    box, side = random_box(*image.size, view, draws), (view.size, view.size)
    inner = set_jpeg_scale(image, box, side)
    if inner != box:  # its edges lie between pixels
        return _pixels(rgb(image).resize(side, Resampling.BILINEAR, inner))
    left, top, right, bottom = map(int, box)
    pixels = image.pixels() if isinstance(image, Jpeg) else np.asarray(rgb(image))
    return resize(pixels[top:bottom, left:right], view.size)


def _placed(image: DecodableImage, view: View, draws: Iterator[float]) -> Image.Image:
    """A crop of `size` from the image scaled to `resize`: random if there is padding, else at the centre."""
    size, padding = view.size, view.padding
    across, down = _resized(image.size, view)
    if padding is None:
        left, top = round((across - size) / 2), round((down - size) / 2)
    else:
        left = int(next(draws) * (across + 2 * padding - size + 1)) - padding
        top = int(next(draws) * (down + 2 * padding - size + 1)) - padding
    box = left, top, left + size, top + size
    if (across, down) == image.size:
        return rgb(image).crop(box)
    if min(left, top) < 0 or box[2] > across or box[3] > down:
        if across * down > _MAX_RESIZED:
            raise BrokenImage(f"{image.size[0]} x {image.size[1]} pixels would be scaled to {across} x {down}")
        return rgb(image).resize((across, down), Resampling.BILINEAR).crop(box)
    x, y = image.size[0] / across, image.size[1] / down
    return _scaled(image, (left * x, top * y, min(box[2] * x, image.size[0]), min(box[3] * y, image.size[1])), size)


def _recoloured(pixels: NDArray[np.uint8], view: View, draws: Iterator[float]) -> NDArray[np.uint8]:
    colours: NDArray[np.float32] = pixels.astype(np.float32) / np.float32(255)
    if view.colour_components is not None:
        colours = scale_components(colours, [_between(*view.colour_components, next(draws)) for _ in range(3)])
    if view.hsv is not None:
        colours = change_hsv(colours, *view.hsv.draw(draws))
    return np.rint(colours * 255).astype(np.uint8)


def _resized(size: tuple[int, int], view: View) -> tuple[int, int]:
    short = max(view.resize or min(size), view.size - 2 * (view.padding or 0))
    if size[0] <= size[1]:
        return short, short * size[1] // size[0]
    return short * size[0] // size[1], short


def _scaled(image: DecodableImage, box: Box, size: int) -> Image.Image:
    box = set_jpeg_scale(image, box, (size, size))
    return rgb(image).resize((size, size), Resampling.BILINEAR, box)


def _pixels(image: Image.Image) -> NDArray[np.uint8]:
    # On small images tobytes is faster than the array interface.
    return np.frombuffer(image.tobytes(), np.uint8).reshape(image.size[1], image.size[0], 3)


def _jittered(image: Image.Image, view: View, draws: Iterator[float]) -> Image.Image:
    order = _ORDERS[int(next(draws) * len(_ORDERS))]
    brightness, contrast, saturation = (
        _between(max(0.0, 1 - strength), 1 + strength, next(draws))
        for strength in (view.brightness, view.contrast, view.saturation)
    )
    return jitter(image, (brightness, contrast, saturation, _between(-view.hue, view.hue, next(draws))), order)


def _filtered(pixels: NDArray[np.uint8], view: View, draws: Iterator[float]) -> NDArray[np.uint8]:
    if view.blur and next(draws) < view.blur:
        sigma = _between(*(view.blur_sigma or _SIGMA), next(draws))
        pixels = np.asarray(cv2.GaussianBlur(pixels, (0, 0), sigma, borderType=cv2.BORDER_REFLECT_101), np.uint8)
    if view.solarize and next(draws) < view.solarize:
        pixels = np.where(pixels < _SOLARIZED, pixels, 255 - pixels)
    if view.equalize or view.autocontrast or view.sharpness:
        pixels = _pixels(_corrected(Image.fromarray(pixels), view, draws))
    return pixels


def _corrected(image: Image.Image, view: View, draws: Iterator[float]) -> Image.Image:
    choice, strength = next(draws), next(draws)
    if choice < view.equalize:
        return ImageOps.equalize(image)
    if choice < view.equalize + view.autocontrast:
        return ImageOps.autocontrast(image)
    if view.sharpness:
        factor = _between(max(0.0, 1 - view.sharpness), 1 + view.sharpness, strength)
        return ImageEnhance.Sharpness(image).enhance(factor)
    return image
