"""Balanced labels by optimal transport (Sinkhorn-Knopp; Asano et al., Self-labelling, ICLR 2020, section 3.2).

Of N rows with log-probabilities log p, the plan q with rows of mass 1/N and columns of mass `prior` that maximises
sharpness * sum(q log p) + entropy(q) is q_ik = softmax_k(sharpness * log p_ik + u_k) / N for one K-vector u, the
logarithm of its scaling. Only u and the marginals, K numbers per head, travel between the rows and the solver.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from raycluster.features import Features, extent
from raycluster.types import Block, UserError

Rounding = Literal["argmax", "exact"]
Head: TypeAlias = "tuple[NDArray[np.floating], NDArray[np.floating]]"

_ROWS = 256
_BITS = 61


@dataclass(frozen=True, eq=False)
class Sinkhorn:
    """Balanced labels. Row i belongs to samples[i] (ascending).

    samples: (N,) int64. labels: (heads, N) int32. sizes: per head (K,) int64 rows of each cluster. scalings: per head
    (K,) float64 logarithms u, -inf where the prior is 0. marginal_errors: per head the largest relative deviation of a
    cluster's share of the plan from its prior. iterations: per head. converged: per head, whether the tolerance was
    reached. costs: per head the mean of -log p at the labels. rounding_costs: per head by how much `costs` is above
    that of the argmax labels; 0 unless rounding is exact.
    """

    samples: NDArray[np.int64]
    labels: NDArray[np.int32]
    sizes: list[NDArray[np.int64]]
    scalings: list[NDArray[np.float64]]
    marginal_errors: list[float]
    iterations: list[int]
    converged: list[bool]
    costs: list[float]
    rounding_costs: list[float]


class _Problem(NamedTuple):
    """One head. weight: (K, D), bias: (K,) float64, or None where rows are log-probabilities. prior: (K,) float64."""

    weight: NDArray[np.float64] | None
    bias: NDArray[np.float64] | None
    prior: NDArray[np.float64]
    sharpness: float


def sinkhorn(
    features: Features,
    heads: Sequence[Head] | None = None,
    *,
    sharpness: float = 25.0,
    priors: Sequence[NDArray[np.floating] | None] | None = None,
    tolerance: float = 1e-3,
    max_iterations: int = 2000,
    start: Sequence[NDArray[np.floating]] | None = None,
    rounding: Rounding = "argmax",
) -> Sinkhorn:
    """Label every row once per head such that clusters get the shares `priors` of the rows, at the least cost.

    heads: per head a linear classifier, weight (K, D) and bias (K,); log p = log_softmax(weight f + bias). None for one
    head whose logits are the rows themselves, (N, K). priors: per head (K,) shares, scaled to sum 1; None for equal
    ones. tolerance: of the largest relative deviation of a marginal; what is reached is in the result, also where
    max_iterations end the search before. start: per head the `scalings` of an earlier result. rounding: `argmax` of the
    plan, whose sizes are nearly those wanted; or `exact`: sizes are N * prior rounded by largest remainders.
    Labels and figures are bit-identical for any blocks in any order. Raises UserError if something is not finite or
    shapes do not fit.
    """
    extent(features)
    problems = _problems(features, heads, priors, sharpness)
    scalings = _starts(problems, start)
    found = [_solve(features, one, u, tolerance, max_iterations) for one, u in zip(problems, scalings, strict=True)]
    parts = [_label(features, one, u, rounding) for one, (u, _, _) in zip(problems, found, strict=True)]
    return Sinkhorn(
        samples=parts[0][0],
        labels=np.stack([labels for _, labels, _, _ in parts]),
        sizes=[np.bincount(part[1], minlength=len(one.prior)) for one, part in zip(problems, parts, strict=True)],
        scalings=[u for u, _, _ in found],
        marginal_errors=[error for _, error, _ in found],
        iterations=[count for _, _, count in found],
        converged=[error <= tolerance for _, error, _ in found],
        costs=[cost for _, _, cost, _ in parts],
        rounding_costs=[extra for _, _, _, extra in parts],
    )


def _problems(features: Features, heads: Any, priors: Any, sharpness: float) -> list[_Problem]:
    if not (np.isfinite(sharpness) and sharpness > 0):
        raise UserError(f"sharpness must be > 0 and finite; seen {sharpness}")
    pairs: list[Any] = [(None, None)] if heads is None else list(heads)
    wanted = [None] * len(pairs) if priors is None else list(priors)
    if not pairs or len(wanted) != len(pairs):
        raise UserError(f"one prior per head, at least one head; seen {len(wanted)} priors and {len(pairs)} heads")
    result = []
    for (weight, bias), prior in zip(pairs, wanted, strict=True):
        if weight is not None:
            weight, bias = np.asarray(weight, np.float64), np.asarray(bias, np.float64)
            if weight.ndim != 2 or weight.shape[1] != features.dim or bias.shape != weight.shape[:1]:
                raise UserError(
                    f"a head is a weight (K, {features.dim}) and a bias (K,); seen {weight.shape} and {bias.shape}"
                )
            if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
                raise UserError("a head holds NaN or infinite values: the network diverged (lower the learning rate)")
        result.append(_Problem(weight, bias, _prior(prior, features.dim if weight is None else len(weight)), sharpness))
    return result


def _prior(prior: Any, num_clusters: int) -> NDArray[np.float64]:
    shares = np.ones(num_clusters) if prior is None else np.asarray(prior, np.float64)
    if shares.shape != (num_clusters,) or not np.isfinite(shares).all() or shares.min() < 0 or shares.sum() <= 0:
        raise UserError(f"a prior is {num_clusters} finite shares >= 0, not all 0; seen {prior!r}")
    return shares / shares.sum()


def _starts(problems: list[_Problem], start: Any) -> list[NDArray[np.float64]]:
    given = [np.zeros(len(one.prior)) for one in problems] if start is None else [np.asarray(u, float) for u in start]
    if [u.shape for u in given] != [one.prior.shape for one in problems]:
        raise UserError(f"start must be the scalings of {[len(one.prior) for one in problems]} clusters, one per head")
    result = []
    for one, u in zip(problems, given, strict=True):
        finite = np.where(np.isfinite(u), u, 0.0)
        result.append(np.where(one.prior > 0, finite - finite.mean(), -np.inf))
    return result


def _solve(
    features: Features, one: _Problem, u: NDArray[np.float64], tolerance: float, max_iterations: int
) -> tuple[NDArray[np.float64], float, int]:
    """(scaling, marginal error, iterations)."""
    scale = 2.0 ** (_BITS - features.num_rows.bit_length())
    used, best = one.prior > 0, (u, np.inf)
    for iteration in range(max_iterations):
        (sums,) = features.fold(_marginals, one, u, scale)
        marginals = sums[used] / (scale * features.num_rows)
        error = float(np.abs(marginals / one.prior[used] - 1).max())
        if error < best[1]:
            best = u, error
        if error <= tolerance:
            return u, error, iteration + 1
        u = u.copy()
        u[used] += np.log(one.prior[used]) - np.log(np.maximum(marginals, 1e-30))
        u[used] -= u[used].mean()
    return *best, max_iterations


def _scores(values: NDArray[np.floating], one: _Problem) -> NDArray[np.float64]:
    rows = values.astype(np.float64)
    logits = rows if one.weight is None else np.einsum("nd,kd->nk", rows, one.weight) + one.bias
    logits = logits - logits.max(axis=1, keepdims=True)  # keeps exp from overflowing
    return one.sharpness * (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))


def _marginals(block: Block, one: _Problem, u: NDArray[np.float64], scale: float) -> tuple[NDArray[np.int64]]:
    sums = np.zeros(len(u), np.int64)
    for start in range(0, len(block.values), _ROWS):
        plan = _scores(block.values[start : start + _ROWS], one) + u
        plan = np.exp(plan - plan.max(axis=1, keepdims=True))
        sums += np.rint(plan * (scale / plan.sum(axis=1, keepdims=True))).astype(np.int64).sum(axis=0)
    return (sums,)


def _label(
    features: Features, one: _Problem, u: NDArray[np.float64], rounding: Rounding
) -> tuple[NDArray[np.int64], NDArray[np.int32], float, float]:
    """(samples, labels, cost, by how much the cost rose through rounding), rows in the order of sample ids."""
    parts = features.collect(_plan, one, u)
    samples, scores = np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])
    order = np.argsort(samples)
    samples, scores = samples[order], scores[order]
    best = (scores + u).argmax(axis=1)
    labels = best if rounding == "argmax" else _exact(scores + u, best, sizes_of(one.prior, len(samples)))
    costs = [-float(np.take_along_axis(scores, x[:, None], 1).mean()) / one.sharpness for x in (labels, best)]
    return samples, labels.astype(np.int32), costs[0], costs[0] - costs[1]


def _plan(block: Block, one: _Problem, u: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    return block.samples, _scores(block.values, one)


def sizes_of(prior: NDArray[np.float64], num_rows: int) -> NDArray[np.int64]:
    """(K,) whole sizes with sum N, N * prior rounded down or up (largest remainders; the lowest of equal ones)."""
    wanted = prior * num_rows
    sizes = np.floor(wanted).astype(np.int64)
    missing = num_rows - int(sizes.sum())
    sizes[np.argsort(-(wanted - sizes), kind="stable")[:missing]] += 1
    return sizes


def _exact(plan: NDArray[np.float64], labels: NDArray[np.intp], sizes: NDArray[np.int64]) -> NDArray[np.intp]:
    """Move rows out of clusters that are too large, those first that lose least by it."""
    labels = labels.copy()
    counts = np.bincount(labels, minlength=len(sizes))
    while (counts > sizes).any():
        movable, room = np.flatnonzero(counts[labels] > sizes[labels]), np.flatnonzero(counts < sizes)
        loss = plan[movable, labels[movable]][:, None] - plan[np.ix_(movable, room)]
        row, place = np.unravel_index(int(loss.argmin()), loss.shape)
        counts[labels[movable[row]]] -= 1
        counts[room[place]] += 1
        labels[movable[row]] = room[place]
    return labels
