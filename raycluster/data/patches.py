"""Square patches of images: how they vary in place, size and orientation.

Dosovitskiy, Fischer, Springenberg, Riedmiller, Brox, "Discriminative unsupervised feature learning with exemplar
convolutional neural networks", TPAMI 2016, section 3.1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated

import cv2
import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from raycluster.config import settings
from raycluster.types import UserError

Factor = Annotated[float, Field(gt=0)]


@settings
class Patch:
    """A random square near the place of a sample: near its box, or near the centre of an image that has none.

    scale: range of factors on the side of the box. translation: standard deviation of the shift in either direction, in
    sides of the box; the square is moved back into the image. rotation: x for angles from -x to x degrees. What lies
    beyond the border of the image is reflected.
    """

    scale: tuple[Factor, Factor] = (1.0, 1.0)
    translation: Annotated[float, Field(ge=0)] = 0.0
    rotation: Annotated[float, Field(ge=0, le=180)] = 0.0

    def __post_init__(self) -> None:
        if self.scale[0] > self.scale[1]:
            raise UserError(f"scale = {list(self.scale)} should be [low, high] with low <= high")


def central_box(width: int, height: int, size: int) -> NDArray[np.float32]:
    """The box of a square of `size` pixels at the centre."""
    x, y = size / width / 2, size / height / 2
    return np.array([0.5 - x, 0.5 - y, 0.5 + x, 0.5 + y], np.float32)


def cut_patch(
    pixels: NDArray[np.uint8], box: NDArray[np.float32], patch: Patch, size: int, draws: Iterator[float]
) -> NDArray[np.uint8]:
    """A patch near `box`, (h, w, 3) -> (size, size, 3), by bilinear interpolation of the image.

    box: edges as fractions of width and height. draws: uniform numbers in [0, 1), of which four are taken.
    """
    height, width = pixels.shape[:2]
    left, top, right, bottom = (box * np.array([width, height, width, height], np.float64)).tolist()
    side = min(right - left, bottom - top)
    scaled = side * _between(*patch.scale, next(draws))
    x, y = (side * patch.translation * shift for shift in _normal(draws))
    x, y = _inside((left + right) / 2 + x, scaled, width), _inside((top + bottom) / 2 + y, scaled, height)
    angle = math.radians(_between(-patch.rotation, patch.rotation, next(draws)))
    matrix = _mapping((x, y), scaled / size, angle, size)
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    patch_pixels = cv2.warpAffine(pixels, matrix, (size, size), flags=flags, borderMode=cv2.BORDER_REFLECT_101)
    return np.asarray(patch_pixels, np.uint8)


def _mapping(centre: tuple[float, float], step: float, angle: float, size: int) -> NDArray[np.float64]:
    """(2, 3) from pixels of the patch to pixels of the image. step: pixels of the image per pixel of the patch."""
    cos, sin, middle = step * math.cos(angle), step * math.sin(angle), (size - 1) / 2
    x, y = centre[0] - 0.5 - (cos - sin) * middle, centre[1] - 0.5 - (sin + cos) * middle
    return np.array([[cos, -sin, x], [sin, cos, y]])


def _inside(centre: float, side: float, extent: int) -> float:
    """The centre moved so that the side lies in an extent, to its middle if it is longer."""
    return extent / 2 if side >= extent else min(max(centre, side / 2), extent - side / 2)


def _normal(draws: Iterator[float]) -> tuple[float, float]:
    """Two numbers from N(0, 1) (Box and Muller)."""
    radius, angle = math.sqrt(-2 * math.log(1 - next(draws))), 2 * math.pi * next(draws)
    return radius * math.cos(angle), radius * math.sin(angle)


def _between(low: float, high: float, share: float) -> float:
    return low + (high - low) * share
