from __future__ import annotations

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from raycluster.evaluation.probes import linear_probe
from raycluster.types import UserError


def test_agrees_with_scikit_learn_on_digits() -> None:
    images, classes = load_digits(return_X_y=True)
    train, test, train_y, test_y = images[:500], images[500:1000], classes[:500], classes[500:1000]
    found = linear_probe.evaluate(train.astype(np.float32), train_y, test.astype(np.float32), test_y)
    mean, deviation = train.mean(axis=0), np.where(train.std(axis=0) > 0, train.std(axis=0), 1)
    model = LogisticRegression(C=1 / (500 * 1e-3), max_iter=1000).fit((train - mean) / deviation, train_y)
    wanted = model.score((test - mean) / deviation, test_y)
    assert found["linear_probe_accuracy"] == pytest.approx(wanted, abs=0.0061)
    assert found["linear_probe_train_accuracy"] > 0.98


def test_scale_offset_and_constant_columns_do_not_matter() -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((400, 4))
    classes = (rows[:, 0] + rows[:, 1] > 0).astype(np.int64)
    plain = rows.astype(np.float32)
    odd = np.hstack([rows * [1e-3, 1e3, 1, 1] + [0, 1e4, 0, -5], np.full((400, 1), 0.1)]).astype(np.float32)
    first = linear_probe.evaluate(plain[:200], classes[:200], plain[200:], classes[200:])
    second = linear_probe.evaluate(odd[:200], classes[:200], odd[200:], classes[200:])
    assert first["linear_probe_accuracy"] > 0.95
    assert second["linear_probe_accuracy"] == pytest.approx(first["linear_probe_accuracy"], abs=0.011)


def test_one_class_and_half_precision() -> None:
    rows = np.ones((4, 2), np.float16)
    assert linear_probe.evaluate(rows, [0, 0, 0, 0], rows, [0, 0, 0, 3])["linear_probe_accuracy"] == 0.75


def test_errors_are_named() -> None:
    rows = np.ones((2, 3), np.float32)
    with pytest.raises(UserError, match="not finite"):
        linear_probe.evaluate(rows * np.nan, [0, 1], rows, [0, 1])
