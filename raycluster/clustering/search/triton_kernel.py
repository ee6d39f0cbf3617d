"""The Triton kernel of `gpu_search`, compiled at its first call. Importing this module needs Triton.

Centroids are scanned in blocks of 128, each in 8 groups of 16 that follow each other. Within a block their order is
changed: the members of a group lie 8 apart, where the tensor cores leave them in the registers of one thread.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch.nn.functional import pad

from raycluster.clustering.search.bounds import ROUNDING
from raycluster.clustering.search.centroids import QuantizedRows
from raycluster.clustering.search.int8_torch import GROUP

_ROWS, _COLUMNS = 128, 128
_BLOCKS = 16  # per program at most: enough to amortise loading its rows
_PROGRAMS = 1024  # several per multiprocessor; with fewer, programs scan fewer blocks
_LONGEST = 256  # longer vectors are multiplied in pieces
_PIECE = 128


class PackedBytes(NamedTuple):
    """Vectors in whole blocks. values: (n padded, D padded) int8. tables: (number of tables, n padded) float32."""

    values: torch.Tensor
    tables: torch.Tensor


def pack_rows(quantized: QuantizedRows) -> PackedBytes:
    """Rows as the kernel reads them: scales, and both errors in units of these."""
    lengths = (quantized.norms + quantized.errors) / quantized.scales
    tables = torch.stack([quantized.scales, quantized.errors / quantized.scales, lengths])
    missing = -len(quantized.values) % _ROWS
    return PackedBytes(_widened(quantized.values, missing), pad(tables, (0, missing)))


def pack_centroids(quantized: QuantizedRows, offsets: torch.Tensor) -> PackedBytes:
    """Centroids as the kernel reads them; the padding of the last block scores -infinity. offsets: (K,)."""
    missing = -len(offsets) % _COLUMNS
    offset_bounds = pad(offsets + quantized.norms.square() * ROUNDING, (0, missing), value=-torch.inf)
    tables = torch.stack([*(pad(table, (0, missing)) for table in quantized[1:]), offset_bounds])
    order = (
        torch.arange(len(offset_bounds), device=offset_bounds.device).view(-1, _COLUMNS // GROUP, GROUP).mT.flatten()
    )
    return PackedBytes(_widened(quantized.values, missing).index_select(0, order), tables.index_select(1, order))


def highest(rows: PackedBytes, centroids: PackedBytes) -> torch.Tensor:
    """The highest upper bound of the scores of each group of centroids, (n padded, K padded / GROUP) float32."""
    (num_rows, dim), num_centroids = rows.values.shape, len(centroids.values)
    group_bounds = torch.empty(num_rows, num_centroids // GROUP, device=rows.values.device)
    tiles = num_rows // _ROWS * num_centroids // _COLUMNS
    span = _COLUMNS * max(1, min(_BLOCKS, tiles // _PROGRAMS))
    grid = num_rows // _ROWS, -(-num_centroids // span)
    _highest[grid](*rows, *centroids, group_bounds, num_rows, num_centroids, span, **constants(dim), **options(dim))
    return group_bounds


def constants(dim: int) -> dict[str, int]:
    """Compile-time constants, by the padded length of vectors."""
    piece = dim if dim <= _LONGEST else _PIECE
    return {"DIM": dim, "PIECE": piece, "ROWS": _ROWS, "COLUMNS": _COLUMNS, "GROUP": GROUP}


def options(dim: int) -> dict[str, int]:
    """Compiler options: the deepest pipeline that fits the shared memory of every GPU that Triton supports."""
    return {"num_warps": 8, "num_stages": 2 if dim <= _LONGEST else 3, "enable_fp_fusion": True}


def _widened(values: torch.Tensor, missing: int) -> torch.Tensor:
    """(n, D) padded with zeros by so many rows, and to a number of columns that the kernel takes."""
    dim = values.shape[1]
    padded_dim = max(32, 1 << (dim - 1).bit_length()) if dim <= _LONGEST else -(-dim // _PIECE) * _PIECE
    return pad(values, (0, padded_dim - dim, 0, missing))


@triton.jit
def _highest(
    row_values: tl.tensor,
    row_tables: tl.tensor,
    centroid_values: tl.tensor,
    centroid_tables: tl.tensor,
    group_bounds: tl.tensor,
    num_rows: tl.tensor,
    num_centroids: tl.tensor,
    span: tl.tensor,
    DIM: tl.constexpr,
    PIECE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    entries = tl.arange(0, PIECE)
    left = row_values + rows[:, None] * DIM + entries[None, :]
    if DIM == PIECE:
        whole = tl.load(left)
    scales = tl.load(row_tables + rows)
    # In units of a row's scale both errors are of similar size for all rows, whatever their norm.
    error = tl.max(tl.load(row_tables + num_rows + rows), axis=0)
    length = tl.max(tl.load(row_tables + 2 * num_rows + rows), axis=0)
    groups = group_bounds + rows[:, None] * (num_centroids // GROUP) + tl.arange(0, COLUMNS // GROUP)[None, :]
    first = tl.program_id(1) * span
    for start in range(first, tl.minimum(first + span, num_centroids), COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        right = centroid_values + columns[None, :].to(tl.int64) * DIM + entries[:, None]
        if DIM == PIECE:
            products = tl.dot(whole, tl.load(right), out_dtype=tl.int32)
        else:
            products = tl.zeros((ROWS, COLUMNS), tl.int32)
            for at in range(0, DIM, PIECE):
                products = tl.dot(tl.load(left + at), tl.load(right + at), products, out_dtype=tl.int32)
        table = centroid_tables + columns
        missing = error * tl.load(table + num_centroids) + length * tl.load(table + 2 * num_centroids)
        scaled = products.to(tl.float32) * tl.load(table)[None, :] + missing[None, :]
        upper_bounds = scaled * scales[:, None] + tl.load(table + 3 * num_centroids)[None, :]
        members = tl.reshape(upper_bounds, (ROWS, GROUP, COLUMNS // GROUP))
        tl.store(groups + start // GROUP, tl.max(members, axis=1))
