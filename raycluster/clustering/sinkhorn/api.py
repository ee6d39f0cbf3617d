"""Balanced labels by optimal transport (Sinkhorn-Knopp; Asano et al., Self-labelling, ICLR 2020, section 3.2).

Of N rows with log-probabilities log p, the plan q with rows of mass 1/N and columns of mass `prior` that maximises
sharpness * sum(q log p) + entropy(q) is q_ik = softmax_k(sharpness * log p_ik + u_k) / N for one K-vector u, the
logarithm of its scaling. Only u and sums of K numbers per head pass between the rows and the solver. Nothing
underflows: only differences from the best score of a row are exponentiated.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from secrets import token_hex
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from raycluster.clustering.sinkhorn.labels import HeadLabels, labels_of
from raycluster.clustering.sinkhorn.passes import Passes
from raycluster.clustering.sinkhorn.solver import Problem, Solution, Solver
from raycluster.clustering.sinkhorn.sparse import Classifier, pack
from raycluster.features.matrix import feature_stats
from raycluster.types import Features, Head, UserError

Rounding = Literal["argmax", "exact"]

# Memory of the candidates of all heads, in units of that of the rows; the largest share of clusters and the least
# number per row that are kept.
_MEMORY = 3.0
_MAX_KEPT = 1 / 6
_MIN_KEPT = 128.0
_BYTES_PER_CANDIDATE = 12
_TOLERATED_EXCESS = 0.25  # of the rows


@dataclass(frozen=True, eq=False)
class Sinkhorn:
    """Balanced labels. Row i belongs to samples[i] (ascending).

    samples: (N,) int64. labels: (heads, N) int32. sizes: per head (K,) int64 rows of each cluster. scalings: per head
    (K,) float64 logarithms u, -inf where the prior is 0. marginal_errors: per head the largest relative deviation of a
    cluster's share of the plan from its prior. iterations: per head, passes over the rows. converged: per head, whether
    the plan reached the tolerance; argmax labels of rows with equal scores are unbalanced all the same. costs: per head
    the mean of -log p at the labels. rounding_costs: per head the excess of `costs` over that of the argmax labels; 0
    unless rounding is exact.
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
    ones. tolerance: of the largest relative deviation of a marginal; the result reports what was reached, also where
    max_iterations ends the search. start: per head the `scalings` of an earlier result. rounding: `argmax` of the
    plan, whose sizes are near N * prior unless rows have equal scores (then a UserWarning); or `exact`: sizes are
    N * prior rounded by largest remainders.
    Labels and figures are bitwise identical for any blocks in any order. Raises UserError if something is not finite or
    shapes do not fit.
    """
    if not (np.isfinite(sharpness) and sharpness > 0 and 0 < tolerance < 1 and max_iterations >= 1):
        raise UserError(
            "sharpness must be > 0 and finite, tolerance between 0 and 1, max_iterations >= 1; seen "
            f"{sharpness}, {tolerance} and {max_iterations}"
        )
    if rounding not in get_args(Rounding):
        raise UserError(f"rounding must be one of {', '.join(get_args(Rounding))}; seen {rounding!r}")
    feature_stats(features)
    classifiers = _classifiers(features, heads)
    counts = [len(head.bias) for head in classifiers]
    shares, scalings = _priors(priors, counts), []
    for prior, u in zip(shares, _starts(start, counts), strict=True):
        scalings.append(np.where(prior > 0, u, -np.inf))
    affordable = _MEMORY * 4 * features.dim / _BYTES_PER_CANDIDATE / len(counts)
    budgets = [max(_MIN_KEPT, min(affordable, _MAX_KEPT * len(prior))) for prior in shares]
    problems = [
        Problem(index, features.num_rows, prior, sharpness, tolerance, max_iterations, budget)
        for index, (prior, budget) in enumerate(zip(shares, budgets, strict=True))
    ]
    passes = Passes(features, classifiers, token_hex(8))
    try:
        found = _solve(passes, problems, scalings)
        labelled = labels_of(passes, [head.query for head in found], shares if rounding == "exact" else None)
    finally:
        passes.clear()
    return _result(labelled, found, problems)


def warn_of_ties(found: Sinkhorn, prior: NDArray[np.floating] | None) -> None:
    """Warn if the plan of the first head is balanced but many labels are not: argmax puts equal rows into one
    cluster. prior: (K,) shares in any unit, None for equal ones.
    """
    sizes = found.sizes[0]
    shares = np.ones(len(sizes)) if prior is None else np.asarray(prior, np.float64)
    excess = int(np.maximum(sizes - np.ceil(shares / shares.sum() * sizes.sum()), 0).sum())
    if found.converged[0] and excess > _TOLERATED_EXCESS * sizes.sum():
        warnings.warn(
            f"the plan is balanced, but its argmax puts {excess} of {sizes.sum()} rows into clusters beyond their "
            f"share (sizes {sizes.min()} to {sizes.max()}): many rows have equal or nearly equal scores. Use "
            'rounding="exact" for balanced sizes, or a larger sharpness',
            UserWarning,
            stacklevel=3,
        )


def _solve(passes: Passes, problems: list[Problem], starts: list[NDArray[np.float64]]) -> list[Solution]:
    """All heads together: one pass over the rows answers the next query of each."""
    solvers = [Solver(problem).steps(u) for problem, u in zip(problems, starts, strict=True)]
    found: dict[int, Solution] = {}
    queries = {index: next(solver) for index, solver in enumerate(solvers)}
    while queries:
        answers = passes.answer(list(queries.values()))
        for index, answer in zip(list(queries), answers, strict=True):
            try:
                queries[index] = solvers[index].send(answer)
            except StopIteration as done:
                found[index] = done.value
                del queries[index]
    return [found[index] for index in range(len(problems))]


def _result(labelled: list[HeadLabels], found: list[Solution], problems: list[Problem]) -> Sinkhorn:
    return Sinkhorn(
        samples=labelled[0].samples,
        labels=np.stack([head.labels for head in labelled]),
        sizes=[
            np.bincount(head.labels, minlength=len(problem.prior))
            for head, problem in zip(labelled, problems, strict=True)
        ],
        scalings=[head.scaling for head in found],
        marginal_errors=[head.error for head in found],
        iterations=[head.iterations for head in found],
        converged=[head.error <= problem.tolerance for head, problem in zip(found, problems, strict=True)],
        costs=[head.cost for head in labelled],
        rounding_costs=[head.rounding_cost for head in labelled],
    )


def _classifiers(features: Features, heads: Any) -> list[Classifier]:
    if heads is None:
        return [Classifier(None, np.zeros(features.dim, np.float32))]
    result = []
    for weight, bias in ((np.asarray(weight), np.asarray(bias)) for weight, bias in heads):
        if weight.ndim != 2 or weight.shape[1] != features.dim or bias.shape != weight.shape[:1] or not len(bias):
            raise UserError(
                f"a head is a weight (K, {features.dim}) and a bias (K,); seen {weight.shape} and {bias.shape}"
            )
        if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
            raise UserError("a head holds NaN or infinite values: the network diverged (lower the learning rate)")
        result.append(pack(weight, bias))
    if not result:
        raise UserError("heads is empty; wanted at least one pair of weight and bias, or None")
    return result


def _priors(priors: Any, counts: list[int]) -> list[NDArray[np.float64]]:
    given = [None] * len(counts) if priors is None else list(priors)
    if len(given) != len(counts):
        raise UserError(f"one prior per head, or None; seen {len(given)} priors and {len(counts)} heads")
    result = []
    for prior, num_clusters in zip(given, counts, strict=True):
        shares = np.ones(num_clusters) if prior is None else np.asarray(prior, np.float64)
        if shares.shape != (num_clusters,) or not np.isfinite(shares).all() or shares.min() < 0 or shares.sum() <= 0:
            raise UserError(f"a prior is {num_clusters} finite shares >= 0, not all 0; seen {prior!r}")
        result.append(shares / shares.sum())
    return result


def _starts(start: Any, counts: list[int]) -> list[NDArray[np.float64]]:
    given = [np.zeros(count) for count in counts] if start is None else [np.asarray(u, np.float64) for u in start]
    if [u.shape for u in given] != [(count,) for count in counts] or any(np.isnan(u).any() for u in given):
        raise UserError(f"start must be the scalings of heads with {counts} clusters; seen {[u.shape for u in given]}")
    return [np.where(np.isfinite(u), u, 0.0) for u in given]
