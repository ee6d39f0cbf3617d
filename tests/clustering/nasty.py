"""Rows and centroids that fit 8 bits badly, and what is nearest by definition."""

from __future__ import annotations

import numpy as np

KINDS = ["none", "copies", "near", "constant", "whole", "outlier", "far", "lengths", "small", "large", "same"]


def naive(values: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """The nearest centroid of every row, by float64 distances."""
    distance = values.astype(np.float64)[:, None] - centroids.astype(np.float64)[None]
    labels: np.ndarray = np.square(distance).sum(axis=2).argmin(axis=1)
    return labels


def problem(
    rng: np.random.Generator, num_rows: int, num_centroids: int, dim: int, kind: str
) -> tuple[np.ndarray, np.ndarray]:
    """Rows and centroids of one of KINDS."""
    values = rng.standard_normal((num_rows, dim)).astype(np.float32)
    centroids = rng.standard_normal((num_centroids, dim)).astype(np.float32)
    if kind == "copies":
        centroids = values[rng.integers(num_rows, size=num_centroids)]
    elif kind == "near":
        centroids = (values[:1] + 1e-6 * centroids).astype(np.float32)
    elif kind == "constant":
        values[:, 0] = centroids[:, 0] = 1e3
    elif kind == "whole":
        values, centroids = np.rint(values), np.rint(centroids)
    elif kind == "outlier":
        centroids[0] *= 1e4
        values[0] *= np.float32(1e4)
    elif kind == "far":
        values, centroids = values + np.float32(100), centroids + np.float32(100)
    elif kind == "lengths":
        values *= (10.0 ** rng.integers(-30, 6, size=(num_rows, 1))).astype(np.float32)
    elif kind in ("small", "large"):
        factor = np.float32(1e-10 if kind == "small" else 1e10)
        values, centroids = values * factor, centroids * factor
    elif kind == "same":
        centroids = np.resize(centroids[:2], centroids.shape)
    return values, centroids
