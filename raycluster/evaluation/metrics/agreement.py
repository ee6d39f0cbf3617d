"""How well a clustering agrees with known classes (or with another clustering); numbers of clusters may differ."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import entr, gammaln

from raycluster.evaluation.base import Declaration, Metric
from raycluster.types import UserError

DECLARATION = Declaration(
    metrics=(
        Metric("nmi_arithmetic", "nmi arithmetic"),
        Metric("nmi_geometric", "nmi geometric"),
        Metric("ami", "ami"),
        Metric("ari", "ari"),
        Metric("purity", "purity"),
        Metric("matched_accuracy", "matched accuracy"),
        Metric("class_entropy", "class entropy", higher_is_better=False),
    ),
    input="clusters",
)


def evaluate(labels: ArrayLike, truth: ArrayLike) -> dict[str, float]:
    """Compare two labellings (N,) of the same samples; those with a negative label on either side are left out.

    nmi_arithmetic, nmi_geometric: mutual information over the mean of the two entropies (scikit-learn's default, resp.
    the one of Caron et al. 2018). ami: the same adjusted for chance, arithmetic. ari: adjusted Rand index (Hubert and
    Arabie 1985). purity: share of samples whose class is the most frequent one of their cluster. matched_accuracy:
    share of samples whose class is that of their cluster, where clusters are matched to classes one to one such that
    this is largest (Kuhn 1955); clusters without a class are wrong. class_entropy: of the classes in a cluster, in
    bits, mean over samples.
    Raises UserError if the lengths differ or no sample has both labels.
    """
    found, known = np.asarray(labels), np.asarray(truth)
    if found.shape != known.shape or found.ndim != 1:
        raise UserError(f"labels and truth must be (N,) for the same samples; seen {found.shape} and {known.shape}")
    both = (found >= 0) & (known >= 0)
    if not both.any():
        raise UserError(f"none of {len(both)} samples has both a cluster and a true label: does the data hold labels?")
    from scipy.optimize import linear_sum_assignment
    from sklearn.metrics import adjusted_rand_score

    found, known = found[both], known[both]
    table = _contingency(found, known)
    sizes = table.sum(axis=1, keepdims=True)
    return {
        "nmi_arithmetic": mutual_information(known, found),
        "nmi_geometric": mutual_information(known, found, mean="geometric"),
        "ami": _adjusted_mutual_information(found, known),
        "ari": float(adjusted_rand_score(known, found)),
        "purity": float(table.max(axis=1).sum() / len(found)),
        "matched_accuracy": float(table[linear_sum_assignment(table, maximize=True)].sum() / len(found)),
        "class_entropy": float(entr(table / sizes).sum(axis=1) @ sizes[:, 0] / len(found) / np.log(2)),
    }


def _contingency(found: NDArray[np.integer], known: NDArray[np.integer]) -> NDArray[np.int32]:
    """(clusters, classes) numbers of samples, of those that occur."""
    rows, columns = (np.unique(labels, return_inverse=True)[1] for labels in (found, known))
    table = np.zeros((rows.max() + 1, columns.max() + 1), np.int32)
    np.add.at(table, (rows, columns), 1)
    return table


def mutual_information(labels: NDArray[np.integer], others: NDArray[np.integer], mean: str = "arithmetic") -> float:
    """Mutual information of two labellings (N,) over a mean of their entropies: 0 independent, 1 the same."""
    from sklearn.metrics import normalized_mutual_info_score  # takes seconds, and only one worker asks for it

    return float(normalized_mutual_info_score(labels, others, average_method=mean))


def _adjusted_mutual_information(found: NDArray[np.integer], known: NDArray[np.integer]) -> float:
    """AMI with the arithmetic mean (Vinh et al. 2010), in seconds for thousands of clusters."""
    from sklearn.metrics import mutual_info_score

    sizes = [np.unique(labels, return_counts=True)[1] for labels in (found, known)]
    if len(sizes[0]) == len(sizes[1]) and len(sizes[0]) in (1, len(found)):
        return 1.0
    chance = _expected_mutual_information(*sizes)
    spread = sum(-(s / s.sum() * np.log(s / s.sum())).sum() for s in sizes) / 2 - chance
    smallest = np.finfo(np.float64).eps
    return float((mutual_info_score(known, found) - chance) / (spread if abs(spread) > smallest else smallest))


def _expected_mutual_information(found_sizes: NDArray[np.integer], known_sizes: NDArray[np.integer]) -> float:
    """Mean mutual information in nats of two random labellings with these cluster sizes.

    The overlap of two clusters is hypergeometric, so equal pairs of sizes are counted once.
    """
    total = int(found_sizes.sum())
    expected = 0.0
    columns = list(zip(*(part.tolist() for part in np.unique(known_sizes, return_counts=True)), strict=True))
    for a, times in zip(*(part.tolist() for part in np.unique(found_sizes, return_counts=True)), strict=True):
        for b, other_times in columns:
            overlap = np.arange(max(1, a + b - total), min(a, b) + 1, dtype=np.float64)
            ways = gammaln([a + 1, b + 1, total - a + 1, total - b + 1, total + 1]) @ [1, 1, 1, 1, -1]
            ways = ways - gammaln(overlap + 1) - gammaln(a - overlap + 1) - gammaln(b - overlap + 1)
            chance = np.exp(ways - gammaln(total - a - b + overlap + 1))
            expected += times * other_times * (chance * overlap / total * np.log(total * overlap / (a * b))).sum()
    return expected
