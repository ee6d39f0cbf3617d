from __future__ import annotations

import numpy as np
import pytest
from sklearn.datasets import load_digits

from raycluster.evaluation.probes import knn
from raycluster.types import UserError


def test_votes_by_hand() -> None:
    train = np.array([[1, 0], [0.8, 0.6], [0.8, -0.6]], np.float32)
    test = np.array([[5, 0]], np.float32)
    near = knn.evaluate(train, [0, 1, 1], test, [0], num_neighbours=3, temperature=0.07)
    assert near == {"knn_accuracy": 1.0}  # one vote of 1 against two of exp(-0.2 / 0.07) = 0.057
    far = knn.evaluate(train, [0, 1, 1], test, [0], num_neighbours=3, temperature=1.0)
    assert far == {"knn_accuracy": 0.0}  # one vote of 1 against two of exp(-0.2) = 0.82


def test_more_neighbours_asked_for_than_there_are() -> None:
    assert knn.evaluate(np.eye(2, dtype=np.float32), [0, 1], np.eye(2, dtype=np.float16), [0, 1])["knn_accuracy"] == 1


def test_equals_a_naive_vote_on_digits_in_any_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    images, classes = load_digits(return_X_y=True)
    train, test, train_y, test_y = images[:600], images[600:900], classes[:600], classes[600:900]
    found = knn.evaluate(train, train_y, test, test_y)
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (train, test)]
    similarity = unit[1] @ unit[0].T
    right = 0
    for row, wanted in zip(similarity, test_y, strict=True):
        best = np.argsort(-row)[:20]
        votes = np.bincount(train_y[best], np.exp(row[best] / 0.07), minlength=10)
        right += votes.argmax() == wanted
    assert found["knn_accuracy"] == pytest.approx(right / 300, abs=1.01 / 300)
    monkeypatch.setattr(knn, "_SIMILARITIES", 1)
    assert knn.evaluate(train, train_y, test, test_y) == found


def test_classes_unseen_in_training_and_zero_rows_are_counted_wrong_not_fatal() -> None:
    train = np.zeros((3, 2), np.float32)
    assert knn.evaluate(train, [0, 0, 1], np.zeros((2, 2), np.float32), [0, 9])["knn_accuracy"] == 0.5


def test_errors_are_named() -> None:
    rows = np.ones((2, 3), np.float32)
    with pytest.raises(UserError, match="an integer"):
        knn.evaluate(rows, [0, -1], rows, [0, 0])
