"""Data types of Sinkhorn's passes: packed classifiers, candidate windows, candidates and plans in row-sparse form."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

PANEL = 64


class Classifier(NamedTuple):
    """packed: (K / 64, D, 64) float32 weights, zero-padded; None where the rows are logits. bias: (K,) float32."""

    packed: NDArray[np.float32] | None
    bias: NDArray[np.float32]

    def weight(self) -> NDArray[np.float32] | None:
        """(K, D), or None."""
        if self.packed is None:
            return None
        return self.packed.transpose(0, 2, 1).reshape(-1, self.packed.shape[1])[: len(self.bias)]


class CandidateWindow(NamedTuple):
    """The range of candidates: within `depth` of the best score, sharpness * logit + scaling (K,), of their row."""

    sharpness: float
    scaling: NDArray[np.float64]
    depth: float


class Candidates(NamedTuple):
    """Candidate clusters of n rows: those of row i are at first[i] to first[i + 1], in ascending order.

    first: (n + 1,) int64. cluster: int32. score: float64, below the best of its row. top: (n,) float64 that best.
    norm: (n,) float64 logarithm of the sum of e^logit.
    """

    first: NDArray[np.int64]
    cluster: NDArray[np.int32]
    score: NDArray[np.float64]
    top: NDArray[np.float64]
    norm: NDArray[np.float64]


def pack(weight: NDArray[np.floating], bias: NDArray[np.floating]) -> Classifier:
    """Pack (K, D) and (K,) once for many rows."""
    num_clusters, dim = weight.shape
    padded = np.zeros((-(-num_clusters // PANEL) * PANEL, dim), np.float32)
    padded[:num_clusters] = weight
    packed = np.ascontiguousarray(padded.reshape(-1, PANEL, dim).transpose(0, 2, 1))
    return Classifier(packed, np.ascontiguousarray(bias, np.float32))


class Plan(NamedTuple):
    """Shares of n rows in clusters at one scaling, without those that are negligible; laid out as `Candidates`.

    share: float64, those of a row have the sum 1. value: the sum of log(sum of e^score) in units of the caller.
    """

    first: NDArray[np.int64]
    cluster: NDArray[np.int32]
    share: NDArray[np.float64]
    value: int
