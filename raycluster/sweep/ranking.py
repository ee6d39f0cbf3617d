"""Rank correlation of label-free scores with accuracies over the combinations of a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from scipy.stats import kendalltau, spearmanr

from raycluster.evaluation.base import label_free_metrics, labelled_metrics
from raycluster.sweep.plan import Combination

MIN_COMBINATIONS = 4  # fewer agree by chance too easily


class Ranking(NamedTuple):
    """Rank correlation of `score` with `accuracy` over `combinations` combinations: 1 equal order, -1 reversed."""

    score: str
    accuracy: str
    spearman: float
    kendall: float
    combinations: int


def rankings(combinations: Sequence[Combination]) -> list[Ranking]:
    """One per label-free score and accuracy that all finished combinations have; empty for too few of them."""
    finished = [one for one in combinations if one.objective is not None]
    if len(finished) < MIN_COMBINATIONS:
        return []
    names = [name for name in labelled_metrics() if name in finished[0].rows[0].records[-1]]
    found = []
    for score in label_free_metrics():
        for accuracy in names:
            x, y = ([one.figure(name) for one in finished] for name in (score, accuracy))
            if None in x or None in y or len(set(x)) == 1 or len(set(y)) == 1:
                continue
            spearman, kendall = float(spearmanr(x, y).statistic), float(kendalltau(x, y).statistic)
            found.append(Ranking(score, accuracy, spearman, kendall, len(finished)))
    return found
