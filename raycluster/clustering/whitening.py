"""PCA whitening and row normalisation (Caron et al. 2018, section 3.3), exact in any order of summation.

Values are rounded to integers small enough for sums of their float64 products to be exact, so the moments and the
whitened features are bitwise identical for any blocks and any order of summation in a library.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import scipy.linalg
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from raycluster.features.matrix import FeatureStats, device, feature_stats
from raycluster.types import Block, Features, Head, UserError

# 20 bits and a sign-free centre: |q| <= 2^19, so 2^14 products of 38 bits fit the 53 bits of a float64.
_BITS = 20
_EXACT_ROWS = 1 << 14
_PIECE_ENTRIES = 1 << 22
# Columns multiplied at a time: bounds memory, and spares almost half the work of a symmetric product.
_STRIPE = 1024
# Smaller eigenvalues are raised to this share of the largest (as in DeeperCluster's code), not to amplify noise.
_FLOOR = 1e-5


class Whitening(NamedTuple):
    """Map x to (x - mean) @ projection, whose columns are uncorrelated with variance 1, by descending variance of x.

    mean: (D,) float64. projection: (D, d) float64. step: (D,) float64, what each column of x is rounded to.
    """

    mean: NDArray[np.float64]
    projection: NDArray[np.float64]
    step: NDArray[np.float64]


def fit_whitening(features: Features, dim: int) -> Whitening:
    """Whitening of features to dim columns; directions of (almost) no variance are not amplified.

    Raises UserError if values are not finite, or if dim is larger than the number of columns or of rows.
    """
    stats = feature_stats(features)
    if not 1 <= dim <= min(features.dim, stats.num_rows):
        raise UserError(
            f"cannot whiten {stats.num_rows} rows of {features.dim} columns to {dim}: the whitened width must be at "
            f"least 1 and at most either; choose another width, or add rows"
        )
    mean, covariance, step = _covariance(features, stats)
    return Whitening(mean, _projection(covariance, dim), step)


def whiten(features: Features, dim: int) -> Features:
    """Whitened features of dim columns, each row divided by its Euclidean norm; a row at the mean stays zero."""
    return apply_whitening(features, fit_whitening(features, dim))


def apply_whitening(features: Features, whitening: Whitening) -> Features:
    """Features whitened by what was fitted to them, each row divided by its Euclidean norm."""
    weights, unit = _exact_weights(whitening)
    return features.map(_project, whitening.mean, whitening.step, weights, unit)


def classifier(
    centroids: NDArray[np.floating], mean: NDArray[np.float64], projection: NDArray[np.float64], scale: float
) -> Head:
    """Weight (K, D) and bias (K,) that map x to `scale` times the products of (K, d) centroids with whitened x.

    mean, projection: of a `Whitening`. Rows are not divided by their norm.
    """
    with threadpool_limits(1, user_api="blas"):  # as in `_projection`
        weight = scale * (centroids @ projection.T)
        return weight.astype(np.float32), -(weight @ mean).astype(np.float32)


def _grid(stats: FeatureStats) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Centre and step (D,) of the integer grid of each column; a constant column has step 1."""
    low, high = stats.low.astype(np.float64), stats.high.astype(np.float64)
    bits = min(_BITS, (64 - stats.num_rows.bit_length()) // 2)
    step = (high - low) / 2.0**bits
    return (low + high) / 2, np.where(step > 0, step, 1.0)


def _covariance(
    features: Features, stats: FeatureStats
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Mean (D,), covariance (D, D) and the step (D,) to which values were rounded for it."""
    centre, step = _grid(stats)
    (sums,) = features.fold(_sums, centre, step)
    products = np.empty((features.dim, features.dim))
    for start in range(0, features.dim, _STRIPE):
        stop = min(start + _STRIPE, features.dim)
        (stripe,) = features.fold(_products, centre, step, start, stop)
        products[:stop, start:stop] = stripe
        products[start:stop, :stop] = stripe.T
    mean = sums / stats.num_rows
    covariance = (products / stats.num_rows - np.outer(mean, mean)) * np.outer(step, step)
    return centre + mean * step, covariance, step


def _rounded(block: Block, centre: NDArray[np.float64], step: NDArray[np.float64]) -> Iterator[torch.Tensor]:
    """Values as integer multiples of the step about the centre, (n, D) float64, in chunks of rows."""
    size = min(_EXACT_ROWS, max(1, _PIECE_ENTRIES // len(step)))
    for start in range(0, len(block.values), size):
        yield torch.from_numpy(np.rint((block.values[start : start + size] - centre) / step)).to(device())


def _sums(block: Block, centre: NDArray[np.float64], step: NDArray[np.float64]) -> tuple[NDArray[np.int64]]:
    sums = np.zeros(len(step), np.int64)
    for quantized in _rounded(block, centre, step):
        sums += quantized.sum(dim=0).cpu().numpy().astype(np.int64)
    return (sums,)


def _products(
    block: Block, centre: NDArray[np.float64], step: NDArray[np.float64], start: int, stop: int
) -> tuple[NDArray[np.int64]]:
    """Sums of products of columns 0..stop with columns start..stop, (stop, stop - start)."""
    products = np.zeros((stop, stop - start), np.int64)
    for quantized in _rounded(block, centre, step):
        products += (quantized[:, :stop].T @ quantized[:, start:stop]).cpu().numpy().astype(np.int64)
    return (products,)


def _projection(covariance: NDArray[np.float64], dim: int) -> NDArray[np.float64]:
    """The dim principal directions as columns (D, dim), each divided by the deviation along it."""
    last = len(covariance) - 1
    with threadpool_limits(1, user_api="blas"):  # results must not depend on the number of threads
        variances, directions = scipy.linalg.eigh(covariance, subset_by_index=(last - dim + 1, last))
    variances, directions = variances[::-1], directions[:, ::-1]
    signs = np.sign(directions[np.abs(directions).argmax(axis=0), np.arange(dim)])
    if variances[0] <= 0:
        return np.zeros_like(directions)
    projection: NDArray[np.float64] = directions * signs / np.sqrt(np.maximum(variances, _FLOOR * variances[0]))
    return projection


def _exact_weights(whitening: Whitening) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The projection of rounded rows as integers (D, d) and the unit (d,) of each column, for an exact product."""
    scaled = whitening.projection * whitening.step[:, None]
    # A rounded value about the mean has at most 21 bits with its sign; the sum of D products must stay below 53.
    bits = 53 - (_BITS + 1) - len(scaled).bit_length()
    largest = np.abs(scaled).max(axis=0)
    unit = np.where(largest > 0, largest, 1.0) / 2.0**bits
    return np.rint(scaled / unit), unit


def _project(
    block: Block,
    mean: NDArray[np.float64],
    step: NDArray[np.float64],
    weights: NDArray[np.float64],
    unit: NDArray[np.float64],
) -> NDArray[np.float32]:
    result = np.empty((len(block.values), len(unit)), np.float32)
    matrix = torch.tensor(weights, device=device())
    start = 0
    for quantized in _rounded(block, mean, step):
        rows = (quantized @ matrix).cpu().numpy() * unit
        norms = np.sqrt(np.square(rows).sum(axis=1, keepdims=True))
        result[start : start + len(rows)] = rows / np.where(norms > 0, norms, 1.0)
        start += len(rows)
    return result
