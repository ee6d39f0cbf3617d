"""Weighted k-nearest-neighbour classification on frozen features (Wu et al. 2018, section 3.4)."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from raycluster.evaluation.base import Declaration, Metric
from raycluster.features.matrix import check_labelled, device

DECLARATION = Declaration(metrics=(Metric("knn_accuracy", "knn", percent=True),))

_SIMILARITIES = 1 << 23


def evaluate(
    train_x: NDArray[np.floating],
    train_y: ArrayLike,
    test_x: NDArray[np.floating],
    test_y: ArrayLike,
    *,
    num_neighbours: int = 20,
    temperature: float = 0.07,
) -> dict[str, float]:
    """Share of test rows whose class wins the vote of their nearest training rows, as `knn_accuracy`.

    train_x: (N, D), test_x: (M, D), float32 or float16. train_y: (N,), test_y: (M,) classes >= 0. A neighbour at cosine
    similarity s has exp(s / temperature) votes; the lowest class wins a tie. Fewer training rows than neighbours: all
    vote. Raises UserError on shapes that do not fit, values that are not finite and missing labels.
    """
    known, wanted = check_labelled(train_x, train_y), check_labelled(test_x, test_y)
    train = _unit_rows(train_x)
    votes_of = torch.from_numpy(known).to(device())
    num_classes = int(known.max()) + 1
    size = max(1, _SIMILARITIES // len(train))
    num_right = 0
    for start in range(0, len(test_x), size):
        similarities = _unit_rows(test_x[start : start + size]) @ train.T
        similarity, neighbour = similarities.topk(min(num_neighbours, len(train)))
        votes = torch.zeros(len(similarity), num_classes, device=device())
        votes.scatter_add_(1, votes_of[neighbour], torch.exp((similarity - 1) / temperature))
        num_right += int((votes.argmax(dim=1).cpu().numpy() == wanted[start : start + size]).sum())
    return {"knn_accuracy": num_right / len(wanted)}


def _unit_rows(values: NDArray[np.floating]) -> torch.Tensor:
    """Rows divided by their norm; zero rows stay zero."""
    rows = torch.from_numpy(values.astype(np.float32)).to(device())
    return torch.nn.functional.normalize(rows, dim=1)
