"""`knn` after PCA whitening: a few directions of large variance, as of brightness, then no longer decide the votes."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from raycluster.clustering.whitening import fit_whitening
from raycluster.evaluation.base import Declaration, Metric
from raycluster.evaluation.probes import knn
from raycluster.features.arrays import as_features
from raycluster.features.matrix import check_labelled

DECLARATION = Declaration(metrics=(Metric("whitened_knn_accuracy", "whitened knn", percent=True),))


def evaluate(
    train_x: NDArray[np.floating], train_y: ArrayLike, test_x: NDArray[np.floating], test_y: ArrayLike
) -> dict[str, float]:
    """As `knn.evaluate`, as `whitened_knn_accuracy`, on rows whitened by the moments of the training rows.

    All min(N, D) components are kept, small eigenvalues raised as in `raycluster.whiten`.
    """
    check_labelled(train_x, train_y)
    whitening = fit_whitening(as_features(train_x), min(train_x.shape))
    rows = [((x - whitening.mean) @ whitening.projection).astype(np.float32) for x in (train_x, test_x)]
    return {"whitened_knn_accuracy": knn.evaluate(rows[0], train_y, rows[1], test_y)["knn_accuracy"]}
