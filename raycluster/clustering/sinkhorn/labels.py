"""Labels from the plan of each head, and their cost."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from raycluster.clustering.sinkhorn.native import candidates
from raycluster.clustering.sinkhorn.passes import Passes, Query, block_candidates
from raycluster.clustering.sinkhorn.rounding import Choices, round_to_sizes, whole_sizes
from raycluster.clustering.sinkhorn.sparse import Candidates, Classifier
from raycluster.types import Block

_CHOICES = 16
_TOGETHER = 512


class HeadLabels(NamedTuple):
    """Of one head. samples, labels: (N,). cost: mean of -log p at the labels. rounding_cost: its excess over argmax."""

    samples: NDArray[np.int64]
    labels: NDArray[np.int32]
    cost: float
    rounding_cost: float


class _RowChoices(NamedTuple):
    """Choices of n rows (see `Choices`) and the constant that turns a score less its scaling into log p."""

    samples: NDArray[np.int64]
    clusters: NDArray[np.int32]
    scores: NDArray[np.float64]
    norm: NDArray[np.float64]


def labels_of(passes: Passes, queries: list[Query], priors: list[NDArray[np.float64]] | None) -> list[HeadLabels]:
    """Labels of each head at window.scaling + shift: the best cluster of each row, or of exact sizes for `priors`."""
    if priors is None:
        return [_best(rows, query) for rows, query in zip(_row_choices(passes, queries, 1), queries, strict=True)]
    return [
        _exact(passes, query, _row_choices(passes, [query], _CHOICES)[0], prior)
        for query, prior in zip(queries, priors, strict=True)
    ]


def _row_choices(passes: Passes, queries: list[Query], num_choices: int) -> list[_RowChoices]:
    parts = passes.gather(_choices, queries, num_choices)
    result = []
    for found in zip(*parts, strict=True):
        columns = [np.concatenate(column) for column in zip(*found, strict=True)]
        order = np.argsort(columns[0])
        result.append(_RowChoices(*(column[order] for column in columns)))
    return result


def _choices(
    block: Block, token: str, queries: list[Query], heads: list[Classifier], num_choices: int
) -> list[list[_RowChoices]]:
    found = []
    for query in queries:
        parts = [_ranked(part, query, num_choices) for part in block_candidates(block, token, query, heads[query.head])]
        found.append(_RowChoices(block.samples, *(np.concatenate(column) for column in zip(*parts, strict=True))))
    return [found]


def _ranked(
    part: Candidates, query: Query, num_choices: int
) -> tuple[NDArray[np.int32], NDArray[np.float64], NDArray[np.float64]]:
    num_rows = len(part.top)
    row = np.repeat(np.arange(num_rows), np.diff(part.first))
    score = part.score + query.shift[part.cluster]
    order = np.lexsort((part.cluster, -score, row)) if num_choices > 1 else _first_best(part, row, score)
    first = part.first[:-1] if num_choices > 1 else np.arange(num_rows)
    rank = np.arange(len(order)) - first[row[order]]
    order, rank = order[rank < num_choices], rank[rank < num_choices]
    clusters = np.full((num_rows, num_choices), -1, np.int32)
    scores = np.full((num_rows, num_choices), -np.inf)
    clusters[row[order], rank], scores[row[order], rank] = part.cluster[order], score[order]
    return clusters, scores, part.top - query.window.sharpness * part.norm


def _first_best(part: Candidates, row: NDArray[np.intp], score: NDArray[np.float64]) -> NDArray[np.intp]:
    """The index of the best score of each row, of equal ones the first."""
    if not len(score):
        return np.empty(0, np.intp)
    ties = np.flatnonzero(score == np.maximum.reduceat(score, part.first[:-1])[row])
    return ties[np.flatnonzero(np.diff(row[ties], prepend=-1))]


def _log_probs(rows: _RowChoices, query: Query, labels: NDArray[np.int32]) -> NDArray[np.float64]:
    """(N,) log p at the labels; those of rows with no such choice are NaN."""
    scores = np.where(rows.clusters == labels[:, None], rows.scores, -np.inf).max(axis=1)
    scaling = (query.window.scaling + query.shift)[labels]
    found: NDArray[np.float64] = (scores - scaling + rows.norm) / query.window.sharpness
    return found


def _best(rows: _RowChoices, query: Query) -> HeadLabels:
    labels = rows.clusters[:, 0]
    return HeadLabels(rows.samples, labels, -float(_log_probs(rows, query, labels).mean()), 0.0)


def _exact(passes: Passes, query: Query, rows: _RowChoices, prior: NDArray[np.float64]) -> HeadLabels:
    sizes = whole_sizes(prior, len(rows.samples))
    labels = round_to_sizes(Choices(rows.clusters, rows.scores), sizes)
    log_probs = _log_probs(rows, query, labels)
    capacity = sizes - np.bincount(labels[labels >= 0], minlength=len(sizes))
    unassigned = np.flatnonzero(labels < 0)
    for start in range(0, len(unassigned), _TOGETHER):
        leftover = unassigned[start : start + _TOGETHER]
        labels[leftover], log_probs[leftover] = _assign_leftover(passes, query, rows.samples[leftover], capacity)
    before = _best(rows, query).cost
    cost = -float(log_probs.mean())
    return HeadLabels(rows.samples, labels, cost, cost - before)


def _assign_leftover(
    passes: Passes, query: Query, samples: NDArray[np.int64], capacity: NDArray[np.int64]
) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    """Clusters with free capacity for rows that have none, at the least loss, and log p there; reduces the capacity."""
    values = passes.features.rows(samples)
    found = candidates(values, passes.heads[query.head], query.window._replace(depth=np.inf))
    used = np.flatnonzero(np.isfinite(query.window.scaling))
    log_probs = found.score.reshape(len(samples), len(used)) - query.window.scaling[used]
    log_probs = (log_probs + (found.top - query.window.sharpness * found.norm)[:, None]) / query.window.sharpness
    slots = np.repeat(np.arange(len(used)), np.minimum(capacity[used], len(samples)))
    row, slot = linear_sum_assignment(-log_probs[:, slots])
    assert len(row) == len(samples)
    np.subtract.at(capacity, used[slots[slot]], 1)
    return used[slots[slot]].astype(np.int32), log_probs[row, slots[slot]]
