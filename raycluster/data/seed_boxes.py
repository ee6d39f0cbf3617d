"""Where the seeds of surrogate classes lie: squares of images, drawn in proportion to the strength of the edges.

Dosovitskiy, Fischer, Springenberg, Riedmiller, Brox, "Discriminative unsupervised feature learning with exemplar
convolutional neural networks", TPAMI 2016, section 3.1.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from raycluster.data.decode import BrokenImage, DecodableImage
from raycluster.data.transforms import View, whole


@dataclass(frozen=True)
class SeedBox:
    """In place of a view of an image: the box of a seed in it, (4,) float32, the same in every visit.

    size: side of the seed in pixels of the image scaled to `resize`, see View.
    """

    size: int
    resize: int = 0
    is_random = False
    fixed_crop = True

    def blank(self, count: int) -> NDArray[np.float32]:
        """`count` rows of zeros."""
        return np.zeros((count, 4), np.float32)

    def render(
        self,
        image: DecodableImage | NDArray[np.uint8],
        rng: np.random.Generator | None,
        crop_rng: np.random.Generator | None,
        box: NDArray[np.float32] | None,
    ) -> NDArray[np.float32]:
        """See `seed_box`. crop_rng: of the sample. Raises BrokenImage if the seed does not fit into the image."""
        assert crop_rng is not None
        image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
        if not self.resize and min(image.size) < self.size:
            raise BrokenImage(
                f"{image.size[0]} x {image.size[1]} pixels hold no patch of {self.size}: lower views.train.size, or "
                "set views.train.resize to enlarge the images"
            )
        return seed_box(whole(image, View(size=self.size, resize=self.resize)), self.size, crop_rng)


def seed_box(pixels: NDArray[np.uint8], size: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """A square of `size` pixels inside the image, whose centre is drawn in proportion to the strength of the edges.

    pixels: (h, w, 3) RGB, at least size x size. -> (4,) left, top, right and bottom edge as fractions of width and
    height. The strength is the magnitude of the Sobel gradient of the gray image; without edges all places are equally
    likely.
    """
    height, width = pixels.shape[:2]
    rows, columns = height - size + 1, width - size + 1
    middle = size // 2
    strength = edge_strength(pixels)[middle : middle + rows, middle : middle + columns].ravel()
    cumulated = np.cumsum(strength if strength.any() else np.ones_like(strength))
    place = min(int(np.searchsorted(cumulated, rng.random() * cumulated[-1], side="right")), rows * columns - 1)
    top, left = divmod(place, columns)
    return np.array([left / width, top / height, (left + size) / width, (top + size) / height], np.float32)


def edge_strength(pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
    """(h, w, 3) RGB -> (h, w) magnitude of the Sobel gradient of the gray image, reflected at the border."""
    gray = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    across, down = (cv2.Sobel(gray, cv2.CV_64F, *order) for order in ((1, 0), (0, 1)))
    return np.sqrt(across**2 + down**2)
