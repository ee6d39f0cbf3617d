"""Scaling with antialiasing, close to the bilinear filter of Pillow and several times faster."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

cv2.setNumThreads(0)  # tasks run in parallel already


def resize(pixels: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """(h, w, 3) -> (side, side, 3) by bilinear interpolation; an axis that shrinks is smoothed first."""
    across, down = _smoothing(pixels.shape[1] / side), _smoothing(pixels.shape[0] / side)
    smooth: cv2.typing.MatLike = pixels
    if len(across) > 1 or len(down) > 1:
        smooth = cv2.sepFilter2D(pixels, -1, across, down, borderType=cv2.BORDER_REPLICATE)
    return np.asarray(cv2.resize(smooth, (side, side), interpolation=cv2.INTER_LINEAR), np.uint8)


def _smoothing(factor: float) -> NDArray[np.float64]:
    """The weights that make bilinear interpolation a triangle filter of half-width `factor`, as in Pillow.

    The variance of that filter is factor^2 / 6, of which interpolation has 1 / 6. The others are of a mixture of the
    triangles of half-width n and n + 1, whose variances are (n^2 - 1) / 6 and so on.
    """
    whole = max(1, int(factor))
    share = max(0.0, (factor**2 - whole**2) / (2 * whole + 1))
    if whole == 1 and not share:
        return np.ones(1)
    weights = share * _triangle(whole + 1)
    weights[1:-1] += (1 - share) * _triangle(whole)
    return weights


def _triangle(half_width: int) -> NDArray[np.float64]:
    box = np.full(half_width, 1 / half_width)
    return np.convolve(box, box)
