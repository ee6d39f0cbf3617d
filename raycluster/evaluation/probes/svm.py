"""A linear support vector machine, one class against the rest, on the quadrants of the maps of all layers (Dosovitskiy
et al., TPAMI 2016, section 4.1).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.svm import LinearSVC

from raycluster.evaluation.base import Declaration, Metric
from raycluster.features.matrix import check_labelled
from raycluster.types import UserError

DECLARATION = Declaration(
    metrics=(
        Metric("svm_accuracy", "SVM", percent=True),
        Metric("svm_c", "C of the SVM", headline=False),
    ),
    input="quadrants",
)

_CHOICES_OF_C = (0.1, 1.0, 10.0, 100.0)
_FOLDS = 3


def evaluate(
    train_x: NDArray[np.floating], train_y: ArrayLike, test_x: NDArray[np.floating], test_y: ArrayLike
) -> dict[str, float]:
    """Share of test rows classified right, as `svm_accuracy`, and the C that was chosen, as `svm_c`.

    train_x: (N, D), test_x: (M, D), before the ReLU, which is applied here. train_y: (N,), test_y: (M,) classes >= 0.
    Columns are standardised by the training rows and divided by sqrt(D). C is chosen by cross-validation on the
    training rows alone. Raises UserError on shapes that do not fit, values that are not finite, missing labels, and
    a single class.
    """
    known, wanted = check_labelled(train_x, train_y), check_labelled(test_x, test_y)
    if len(np.unique(known)) < 2:
        raise UserError(f"all {len(known)} rows to learn from are of class {known[0]}; give images of several classes")
    train, test = np.maximum(train_x, 0), np.maximum(test_x, 0)
    mean, deviation = train.mean(0, dtype=np.float64), train.std(0, dtype=np.float64)
    scale = np.where(deviation > 1e-6 * np.abs(mean), deviation, 1.0) * train.shape[1] ** 0.5
    train, test = (((rows - mean) / scale).astype(np.float32) for rows in (train, test))
    c = _choose_c(train, known)
    return {"svm_accuracy": float(_machine(c).fit(train, known).score(test, wanted)), "svm_c": c}


def _choose_c(rows: NDArray[np.float32], classes: NDArray[np.int64]) -> float:
    """The C of the best mean accuracy, the smallest of equals; 1 where a class has too few rows."""
    rarest = int(np.unique(classes, return_counts=True)[1].min())
    if rarest < 2:
        return 1.0
    folds = StratifiedKFold(min(_FOLDS, rarest), shuffle=True, random_state=0)
    scores = [cross_val_score(_machine(c), rows, classes, cv=folds).mean() for c in _CHOICES_OF_C]
    return _CHOICES_OF_C[int(np.argmax(scores))]


def _machine(c: float) -> LinearSVC:
    return LinearSVC(C=c, dual="auto", max_iter=10_000, random_state=0)
