"""Labels from the plan of each head, with what they cost."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from raycluster.clustering.sinkhorn.native import candidates
from raycluster.clustering.sinkhorn.passes import Passes, Query, chosen
from raycluster.clustering.sinkhorn.rounding import Choices, quantized, whole_sizes
from raycluster.clustering.sinkhorn.sparse import Candidates, Classifier
from raycluster.types import Block

_CHOICES = 16
_TOGETHER = 512


class Labels(NamedTuple):
    """Of one head, by sample id. samples, labels: (N,). cost: mean of -log p at the labels, rounding_cost: of which."""

    samples: NDArray[np.int64]
    labels: NDArray[np.int32]
    cost: float
    rounding_cost: float


class _Rows(NamedTuple):
    """Choices of n rows (see `Choices`) and the constant that turns a score less its scaling into log p."""

    samples: NDArray[np.int64]
    clusters: NDArray[np.int32]
    scores: NDArray[np.float64]
    norm: NDArray[np.float64]


def labels_of(passes: Passes, queries: list[Query], priors: list[NDArray[np.float64]] | None) -> list[Labels]:
    """Labels of each head at place.scaling + shift: the best cluster of each row, or of exact sizes for `priors`."""
    if priors is None:
        return [_best(rows, query) for rows, query in zip(_rows(passes, queries, 1), queries, strict=True)]
    return [
        _exact(passes, query, _rows(passes, [query], _CHOICES)[0], prior)
        for query, prior in zip(queries, priors, strict=True)
    ]


def _rows(passes: Passes, queries: list[Query], num_choices: int) -> list[_Rows]:
    parts = passes.gather(_choices, queries, num_choices)
    result = []
    for found in zip(*parts, strict=True):
        columns = [np.concatenate(column) for column in zip(*found, strict=True)]
        order = np.argsort(columns[0])
        result.append(_Rows(*(column[order] for column in columns)))
    return result


def _choices(
    block: Block, token: str, queries: list[Query], heads: list[Classifier], num_choices: int
) -> list[list[_Rows]]:
    found = []
    for query in queries:
        parts = [_ranked(part, query, num_choices) for part in chosen(block, token, query, heads[query.head])]
        found.append(_Rows(block.samples, *(np.concatenate(column) for column in zip(*parts, strict=True))))
    return [found]


def _ranked(
    part: Candidates, query: Query, num_choices: int
) -> tuple[NDArray[np.int32], NDArray[np.float64], NDArray[np.float64]]:
    num_rows = len(part.top)
    row = np.repeat(np.arange(num_rows), np.diff(part.first))
    score = part.score + query.shift[part.cluster]
    order = np.lexsort((part.cluster, -score, row)) if num_choices > 1 else _bests(part, row, score)
    first = part.first[:-1] if num_choices > 1 else np.arange(num_rows)
    place = np.arange(len(order)) - first[row[order]]
    order, place = order[place < num_choices], place[place < num_choices]
    clusters = np.full((num_rows, num_choices), -1, np.int32)
    scores = np.full((num_rows, num_choices), -np.inf)
    clusters[row[order], place], scores[row[order], place] = part.cluster[order], score[order]
    return clusters, scores, part.top - query.place.sharpness * part.norm


def _bests(part: Candidates, row: NDArray[np.intp], score: NDArray[np.float64]) -> NDArray[np.intp]:
    """Where the best score of each row is, the first of equal ones."""
    if not len(score):
        return np.empty(0, np.intp)
    ties = np.flatnonzero(score == np.maximum.reduceat(score, part.first[:-1])[row])
    return ties[np.flatnonzero(np.diff(row[ties], prepend=-1))]


def _log_probs(rows: _Rows, query: Query, labels: NDArray[np.int32]) -> NDArray[np.float64]:
    """(N,) log p at the labels; those of rows with no such choice are NaN."""
    scores = np.where(rows.clusters == labels[:, None], rows.scores, -np.inf).max(axis=1)
    scaling = (query.place.scaling + query.shift)[labels]
    found: NDArray[np.float64] = (scores - scaling + rows.norm) / query.place.sharpness
    return found


def _best(rows: _Rows, query: Query) -> Labels:
    labels = rows.clusters[:, 0]
    return Labels(rows.samples, labels, -float(_log_probs(rows, query, labels).mean()), 0.0)


def _exact(passes: Passes, query: Query, rows: _Rows, prior: NDArray[np.float64]) -> Labels:
    sizes = whole_sizes(prior, len(rows.samples))
    labels = quantized(Choices(rows.clusters, rows.scores), sizes)
    log_probs = _log_probs(rows, query, labels)
    capacity = sizes - np.bincount(labels[labels >= 0], minlength=len(sizes))
    homeless = np.flatnonzero(labels < 0)
    for start in range(0, len(homeless), _TOGETHER):
        some = homeless[start : start + _TOGETHER]
        labels[some], log_probs[some] = _settle(passes, query, rows.samples[some], capacity)
    before = _best(rows, query).cost
    cost = -float(log_probs.mean())
    return Labels(rows.samples, labels, cost, cost - before)


def _settle(
    passes: Passes, query: Query, samples: NDArray[np.int64], capacity: NDArray[np.int64]
) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    """Clusters with room for rows that have none, at the least loss, and log p there; takes the room."""
    values = passes.features.rows(samples)
    found = candidates(values, passes.heads[query.head], query.place._replace(depth=np.inf))
    used = np.flatnonzero(np.isfinite(query.place.scaling))
    log_probs = found.score.reshape(len(samples), len(used)) - query.place.scaling[used]
    log_probs = (log_probs + (found.top - query.place.sharpness * found.norm)[:, None]) / query.place.sharpness
    places = np.repeat(np.arange(len(used)), np.minimum(capacity[used], len(samples)))
    row, place = linear_sum_assignment(-log_probs[:, places])
    assert len(row) == len(samples)
    np.subtract.at(capacity, used[places[place]], 1)
    return used[places[place]].astype(np.int32), log_probs[row, places[place]]
