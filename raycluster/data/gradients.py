"""Sobel gradients in the data stream: those of the network's input layer, rounded to float16."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from raycluster.types import IMAGE_MEAN, IMAGE_STD

_WEIGHTS = np.array([1 / (3 * 255 * std) for std in IMAGE_STD], np.float32)
_OFFSET = np.float32(sum(mean / std for mean, std in zip(IMAGE_MEAN, IMAGE_STD, strict=True)) / 3)


def sobel(pixels: NDArray[np.uint8]) -> NDArray[np.float16]:
    """(h, w, 3) RGB -> (h, w, 2) horizontal and vertical gradient of the mean of the normalised channels.

    Zero padding of 1, no scaling, no magnitude, as in DeepCluster (Caron et al., ECCV 2018, section 3.3).
    """
    plane = pixels @ _WEIGHTS - _OFFSET
    gradients = [
        cv2.Sobel(plane, cv2.CV_32F, *order, scale=-1, borderType=cv2.BORDER_CONSTANT)  # its sign is the opposite
        for order in ((1, 0), (0, 1))
    ]
    return cv2.merge(gradients).astype(np.float16)
