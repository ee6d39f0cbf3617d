"""Error bounds of the float32 and 8-bit products that propose nearest centroids, each stated once.

Higham, Accuracy and Stability of Numerical Algorithms, section 3.1: a float32 inner product of D terms, summed in any
order, is off by at most D u / (1 - D u) of |x| |c|, u = 2^-24. `kernel.c` is compiled with INFLATE and ROUNDING.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

# Above every rounding error of a norm in float32, which is at most half of (D + 8) 2^-24 for D up to MAX_DIM.
INFLATE = 1.001
# One product and one sum in float32 are off by far less than this share of their size.
ROUNDING = 2.0**-19
MAX_DIM = 1 << 15
_NORM_RANGE = (2.0**-40, 2.0**40)  # squares of shorter vectors would vanish, of longer ones overflow
_UNDERFLOW = 2.0**-125  # per term
# A product's inputs keep 24 bits of mantissa in full float32; torch may be set to 11 or 8.
_INPUT_ERROR = {"highest": 0.0, "high": 2.0**-10, "medium": 2.0**-7}


def rounding_error(dim: int, input_error: float = 0.0) -> float:
    """Twice the relative error of a float32 product over dim terms, summed in any order, inputs centred beforehand."""
    return 2.04 * ((dim + 8) * 2.0**-24 + 2 * input_error)


def product_error(dim: int) -> float:
    """`rounding_error` at the precision that torch is set to."""
    return rounding_error(dim, _INPUT_ERROR[torch.get_float32_matmul_precision()])


def score_error(norms: torch.Tensor, max_norm: float, dim: int) -> torch.Tensor:
    """How far two float32 scores x.c - |c|^2 / 2 of a row may be off together.

    norms: of rows about the centre, any shape. max_norm: the largest norm of the centroids about it.
    """
    return product_error(dim) * max_norm * (norms + max_norm / 2) + dim * _UNDERFLOW


def distance_error(norms: NDArray[np.floating], max_norm: float, dim: int) -> NDArray[np.floating]:
    """How far two float32 squared distances of a row may be off together; as in `score_error`."""
    return product_error(dim) * (norms + max_norm) ** 2 + dim * _UNDERFLOW


def int8_bounds_hold(max_norm: float, dim: int) -> bool:
    """Whether the error bounds of 8-bit products hold for centroids of this length."""
    return _NORM_RANGE[0] < max_norm < _NORM_RANGE[1] and dim <= MAX_DIM
