from __future__ import annotations

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA

from raycluster.evaluation.probes import knn, whitened_knn
from raycluster.types import UserError

IMAGES, CLASSES = load_digits(return_X_y=True)
ROWS = (IMAGES @ np.random.default_rng(0).standard_normal((64, 16))).astype(np.float32)
TRAIN, TEST, TRAIN_Y, TEST_Y = ROWS[:600], ROWS[600:900], CLASSES[:600], CLASSES[600:900]


def test_equals_knn_on_rows_whitened_by_scikit_learn() -> None:
    pca = PCA(whiten=True).fit(TRAIN)
    expected = knn.evaluate(pca.transform(TRAIN), TRAIN_Y, pca.transform(TEST), TEST_Y)["knn_accuracy"]
    found = whitened_knn.evaluate(TRAIN, TRAIN_Y, TEST, TEST_Y)
    assert found == {"whitened_knn_accuracy": pytest.approx(expected, abs=1.01 / 300)}


def test_a_common_direction_and_scales_of_columns_do_not_matter() -> None:
    scales = np.geomspace(1, 30, 16).astype(np.float32)
    found = [
        whitened_knn.evaluate(x * s + c, TRAIN_Y, y * s + c, TEST_Y)
        for x, y, s, c in ((TRAIN, TEST, 1, 0), (TRAIN, TEST, scales, 100 * scales))
    ]
    (first,), (second,) = (list(one.values()) for one in found)
    assert first == pytest.approx(second, abs=2.01 / 300)
    assert (
        first
        > knn.evaluate(TRAIN * scales + 100 * scales, TRAIN_Y, TEST * scales + 100 * scales, TEST_Y)["knn_accuracy"]
    )


def test_fewer_rows_than_columns() -> None:
    assert whitened_knn.evaluate(np.eye(3, 8, dtype=np.float16), [0, 1, 2], np.eye(3, 8, dtype=np.float16), [0, 1, 2])


def test_errors_are_named() -> None:
    with pytest.raises(UserError, match="an integer"):
        whitened_knn.evaluate(TRAIN, np.full(600, -1), TEST, TEST_Y)
