"""Arrays, tensors and files of embeddings as `Features`."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch

from raycluster.features.matrix import LocalFeatures
from raycluster.io.embeddings import BLOCK_ROWS, check_matrix, read
from raycluster.types import Block, Features


def as_features(x: Any, *, column: str | None = None) -> Features:
    """Rows of an array, a tensor, or the files at a path or URI; their sample ids are 0, 1, 2... in their order.

    x: (N, D) numpy array or torch tensor of any real type; a .npy or .parquet file, or a folder of them (in the order
    of their names); or Features, returned as they are. column: of Parquet files, the one that holds lists of numbers;
    None if there is only one. Nothing is copied: what is not float16 or float32 becomes float32 as it is used.
    Raises UserError for another shape or type, complex or text, and files that hold no embeddings.
    """
    if hasattr(x, "fold"):
        features: Features = x
        return features
    if isinstance(x, (str, os.PathLike)):
        parts = list(read(os.fspath(x), column))
    else:
        parts = [
            check_matrix(x.detach().cpu().numpy() if isinstance(x, torch.Tensor) else np.asarray(x), "the embeddings")
        ]
    blocks, first = [], 0
    for part in parts:
        for start in range(0, len(part), BLOCK_ROWS):
            values = part[start : start + BLOCK_ROWS]
            blocks.append(Block(np.arange(first, first + len(values)), values))
            first += len(values)
    return LocalFeatures(blocks)
