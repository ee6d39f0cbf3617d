"""Spherical k-means (Dhillon and Modha 2001): the E step by dot products, the M step with normalised means."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

import raycluster
from raycluster.clustering.kmeans.lloyd import LloydProgress, kmeans
from raycluster.features.matrix import LocalFeatures
from raycluster.types import Block

ROWS = np.random.default_rng(0).standard_normal((400, 8)).astype(np.float16)


def blocks(values: NDArray, number: int, order: NDArray | None = None) -> LocalFeatures:
    samples = np.arange(len(values)) if order is None else order
    return LocalFeatures([Block(part, values[part]) for part in np.array_split(samples, number)])


def on_circle(*degrees: float) -> NDArray[np.float32]:
    return np.stack([np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))], axis=1).astype(np.float32)


def by_dot_products(values: NDArray, centroids: NDArray, steps: int) -> tuple[NDArray, NDArray]:
    """The textbook algorithm in float64; an empty cluster would be an error."""
    rows = values.astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    for _ in range(steps):
        labels = (rows @ centroids.T).argmax(axis=1)
        means = np.stack([rows[labels == cluster].mean(axis=0) for cluster in range(len(centroids))])
        centroids = means / np.linalg.norm(means, axis=1, keepdims=True)
    return (rows @ centroids.T).argmax(axis=1), centroids


def test_by_hand() -> None:
    """Lengths of rows count for nothing: the long row at 40 degrees does not pull its centroid."""
    rows = on_circle(0, 20, 40, 180, 190) * np.array([[1], [2], [100], [3], [1]], np.float32)
    found = kmeans(blocks(rows, 2), 2, init=on_circle(10, 100), spherical=True, plain=True)
    assert found.labels.tolist() == [0, 0, 0, 1, 1]
    np.testing.assert_allclose(found.centroids, on_circle(20, 185), atol=1e-6)
    assert found.predict(np.array([[1000.0, 1.0], [-0.001, 0.0]])).tolist() == [0, 1]


@pytest.mark.parametrize("steps", [0, 1, 10])
def test_equals_the_textbook_algorithm(steps: int) -> None:
    init = ROWS[:12].astype(np.float64) / np.linalg.norm(ROWS[:12].astype(np.float64), axis=1, keepdims=True)
    found = kmeans(blocks(ROWS, 3), 12, init=init, iterations=steps, spherical=True, plain=True)
    labels, centroids = by_dot_products(ROWS, init, steps)
    assert found.labels.tolist() == labels.tolist() and not found.num_repaired
    np.testing.assert_allclose(found.centroids, centroids, atol=1e-5)


def test_centroids_have_norm_1_after_every_step() -> None:
    seen: list[LloydProgress] = []
    kmeans(blocks(ROWS, 2), 12, seed=1, spherical=True, plain=True, iterations=10, report=seen.append)
    norms = [np.linalg.norm(step.state.centroids, axis=1) for step in seen]
    assert len(norms) > 2 and np.allclose(norms, 1, atol=1e-6)


def test_bitwise_identical_for_any_blocks() -> None:
    options = {"seed": 3, "spherical": True, "plain": True, "iterations": 10}
    expected = kmeans(blocks(ROWS, 1), 12, **options)  # type: ignore[arg-type]
    for number in (2, 7, 64):
        order = np.random.default_rng(number).permutation(len(ROWS))
        found = kmeans(blocks(ROWS, number, order), 12, **options)  # type: ignore[arg-type]
        assert np.array_equal(found.labels, expected.labels) and np.array_equal(found.centroids, expected.centroids)


def test_is_public() -> None:
    found = raycluster.kmeans(ROWS, 5, spherical=True)
    assert found.spherical and np.allclose(np.linalg.norm(found.centroids, axis=1), 1, atol=1e-6)
