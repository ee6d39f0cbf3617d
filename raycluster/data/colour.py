"""Changes of colour: brightness, contrast, saturation and hue as in torchvision's ColorJitter; and the stronger ones of
exemplar learning, along principal components, and of hue, saturation and value.

Dosovitskiy, Fischer, Springenberg, Riedmiller, Brox, "Discriminative unsupervised feature learning with exemplar
convolutional neural networks", TPAMI 2016, section 3.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Annotated

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance
from pydantic import Field

from raycluster.config import settings
from raycluster.types import UserError

Factor = Annotated[float, Field(gt=0)]


@settings
class ChangeHSV:
    """Saturation and value, each in [0, 1] and with draws of its own, become value^power * factor + offset, clipped.

    power, factor: ranges they are drawn from. offset: x for numbers from -x to x. hue: x for shifts from -x to x of the
    colour circle.
    """

    power: tuple[Factor, Factor] = (1.0, 1.0)
    factor: tuple[Factor, Factor] = (1.0, 1.0)
    offset: Annotated[float, Field(ge=0, le=1)] = 0.0
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0

    def __post_init__(self) -> None:
        for name, pair in (("power", self.power), ("factor", self.factor)):
            if pair[0] > pair[1]:
                raise UserError(f"{name} = {list(pair)} should be [low, high] with low <= high")

    def draw(self, draws: Iterator[float]) -> tuple[NDArray[np.float32], float]:
        """((3, 2) power, factor and offset of saturation and value, shift of the hue), from seven uniform numbers."""
        ranges = (self.power, self.factor, (-self.offset, self.offset))
        changes = [[low + (high - low) * next(draws) for _ in range(2)] for low, high in ranges]
        return np.array(changes, np.float32), (2 * next(draws) - 1) * self.hue


def scale_components(colours: NDArray[np.float32], factors: Sequence[float]) -> NDArray[np.float32]:
    """Multiply the deviation of each pixel from the mean colour, along each principal component, by a factor.

    colours: (h, w, 3) in [0, 1]. factors: of the components by ascending variance. The result is stretched to [0, 1],
    since it may lie outside; an image of one colour stays.
    """
    rows = colours.reshape(-1, 3)
    mean = rows.mean(0, dtype=np.float64)
    deviations = rows - mean.astype(np.float32)
    _, components = np.linalg.eigh((deviations.T @ deviations).astype(np.float64))
    matrix = (components * factors) @ components.T
    scaled = deviations @ matrix.astype(np.float32) + mean.astype(np.float32)
    low, high = scaled.min(), scaled.max()
    return ((scaled - low) / (high - low)).reshape(colours.shape) if high - low > 1 / 255 else colours


def change_hsv(colours: NDArray[np.float32], changes: NDArray[np.float32], hue: float) -> NDArray[np.float32]:
    """colours: (h, w, 3) RGB in [0, 1]. changes: (3, 2) power, factor and offset of saturation and of value. hue: shift
    on a circle of length 1.
    """
    values = cv2.cvtColor(colours, cv2.COLOR_RGB2HSV)
    power, factor, offset = changes
    values[..., 1:] = np.clip(values[..., 1:] ** power * factor + offset, 0, 1)
    values[..., 0] = (values[..., 0] + 360 * hue) % 360
    return np.asarray(cv2.cvtColor(values, cv2.COLOR_HSV2RGB), np.float32)


def jitter(image: Image.Image, factors: tuple[float, float, float, float], order: tuple[int, ...]) -> Image.Image:
    """Scale brightness, contrast and saturation by the first three `factors`, shift the hue by the last.

    order: of application, a permutation of 0-3. Neutral factors (1, 1, 1, 0) are skipped.
    """
    for index in order:
        if factors[index] != _NEUTRAL[index]:
            image = _COLOURS[index](image, factors[index])
    return image


def _contrast(image: Image.Image, factor: float) -> Image.Image:
    """Bitwise that of Pillow's ImageEnhance, in half the time: the mean of the pixels without a histogram in Python."""
    gray = np.frombuffer(image.convert("L").tobytes(), np.uint8)
    mean = int(int(gray.sum()) / len(gray) + 0.5)
    return Image.blend(Image.new("RGB", image.size, (mean, mean, mean)), image, factor)


def _hue(image: Image.Image, shift: float) -> Image.Image:
    hue, saturation, value = image.convert("HSV").split()
    shifted = hue.point([(level + int(shift * 255)) % 256 for level in range(256)])
    return Image.merge("HSV", (shifted, saturation, value)).convert("RGB")


_NEUTRAL = (1.0, 1.0, 1.0, 0.0)
_COLOURS: tuple[Callable[[Image.Image, float], Image.Image], ...] = (
    lambda image, factor: ImageEnhance.Brightness(image).enhance(factor),
    _contrast,
    lambda image, factor: ImageEnhance.Color(image).enhance(factor),
    _hue,
)
