"""Arrays, tensors and files of embeddings as `Features`."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from raycluster.features.matrix import LocalFeatures
from raycluster.io.embeddings import BLOCK_ROWS, check_matrix, read
from raycluster.types import Block, Features, UserError


def as_features(x: Any, *, column: str | None = None) -> Features:
    """Rows of an array, a tensor, or the files at a path or URI; their sample ids are 0, 1, 2... in their order.

    x: (N, D) numpy array or torch tensor of any real type; a .npy or .parquet file, or a folder of them (in the order
    of their names); or Features, returned as they are. column: of Parquet files, the one that holds lists of numbers;
    None if there is only one. Nothing is copied: values other than float16 and float32 become float32 when they are
    used. Raises UserError for another shape or type, sparse or masked arrays, and files that hold no embeddings.
    """
    if hasattr(x, "fold"):
        features: Features = x
        return features
    if isinstance(x, (str, os.PathLike)):
        matrices = list(read(os.fspath(x), column))
    else:
        matrices = [check_matrix(as_array(x, "the embeddings"), "the embeddings")]
    blocks, first = [], 0
    for matrix in matrices:
        for start in range(0, len(matrix), BLOCK_ROWS):
            values = matrix[start : start + BLOCK_ROWS]
            blocks.append(Block(np.arange(first, first + len(values)), values))
            first += len(values)
    return LocalFeatures(blocks)


def as_array(x: Any, name: str) -> NDArray[Any]:
    """A numpy array of an array, a tensor on any device, or nested lists; bfloat16 becomes float32.

    name: for messages. Raises UserError for sparse, masked and ragged input.
    """
    if isinstance(x, torch.Tensor):
        if x.layout != torch.strided:
            raise UserError(f"{name} must be dense; seen a tensor of layout {x.layout}. Pass x.to_dense()")
        dense = x.detach().cpu()
        return (dense.float() if dense.dtype == torch.bfloat16 else dense).numpy()
    if hasattr(x, "toarray") and hasattr(x, "nnz"):
        raise UserError(f"{name} must be dense; seen a sparse {type(x).__name__} of shape {x.shape}. Pass x.toarray()")
    if np.ma.is_masked(x):
        raise UserError(
            f"{name} must be complete; seen {np.ma.count_masked(x)} masked values. Leave these rows out, or fill them "
            "with x.filled(value)"
        )
    try:
        return np.asarray(x)
    except (ValueError, TypeError) as error:  # ragged lists, lists of tensors that numpy cannot hold
        raise UserError(f"{name} must be rows of one length; seen {type(x).__name__}: {error}") from None
