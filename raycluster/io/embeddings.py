"""Embeddings in .npy and Parquet files, at a path or URI."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raycluster.io import storage
from raycluster.types import UserError

BLOCK_ROWS = 1 << 12
_FILES = (".npy", ".parquet")


def read(uri: str, column: str | None = None) -> Iterator[NDArray[Any]]:
    """The (n, D) matrices of the files at a path or URI, in order, Parquet files in batches of rows."""
    for name in embedding_files(uri):
        if storage.without_options(name)[0].endswith(".npy"):
            yield _read_npy(name)
        else:
            yield from _read_parquet(name, column)


def embedding_files(uri: str) -> list[str]:
    """The files at a path or URI that may hold embeddings, in the order of their names. UserError if there is none."""
    is_folder = storage.file_info(uri).type.name == "Directory"
    files = storage.list_files(uri, recursive=True) if is_folder else [uri]
    wanted = [name for name in files if storage.without_options(name)[0].endswith(_FILES)]
    if not wanted:
        raise UserError(f"{storage.shown(uri)} holds no {' or '.join(_FILES)} files; seen {len(files)} others")
    return wanted


def _read_npy(uri: str) -> NDArray[Any]:
    """A local file is memory-mapped."""
    try:
        if "://" not in uri and storage.exists(uri):
            return check_matrix(np.load(uri, mmap_mode="r"), storage.shown(uri))
        return check_matrix(np.load(io.BytesIO(storage.read_bytes(uri))), storage.shown(uri))
    except (ValueError, OSError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{storage.shown(uri)} is not a .npy file of numbers: {error}") from None


def _read_parquet(uri: str, column: str | None) -> Iterator[NDArray[Any]]:
    file = _parquet(uri)
    name = column or _only_column(uri, file.schema_arrow)
    if name not in file.schema_arrow.names:
        raise UserError(
            f"{storage.shown(uri)} has no column {name!r}; it has {', '.join(map(repr, file.schema_arrow.names))}"
        )
    for batch in file.iter_batches(BLOCK_ROWS, columns=[name]):
        if batch.num_rows:
            yield matrix_of(batch.column(0), f"column {name!r} of {storage.shown(uri)}")


def only_column(uri: str) -> str:
    """The column of a Parquet file that holds lists of numbers. UserError unless there is exactly one."""
    return _only_column(uri, _parquet(uri).schema_arrow)


def _parquet(uri: str) -> pq.ParquetFile:
    filesystem, path = storage.filesystem(uri)
    return storage.attempt("open", uri, lambda: pq.ParquetFile(path, filesystem=filesystem))


def _only_column(uri: str, schema: pa.Schema) -> str:
    lists = [field.name for field in schema if _is_list(field.type)]
    if len(lists) != 1:
        raise UserError(
            f"{storage.shown(uri)} has {len(lists)} columns of lists ({', '.join(lists) or 'none'}): name the one with "
            f"the embeddings as column=..., one of {', '.join(schema.names)}"
        )
    return lists[0]


def _is_list(kind: pa.DataType) -> bool:
    """Whether a column holds lists; tensors, as Ray Data writes them, have an extension type of lists."""
    is_extension = hasattr(kind, "storage_type")
    return is_extension or pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def matrix_of(column: pa.Array, name: str) -> NDArray[Any]:
    """(n, D) of an Arrow column of lists of equal length. name: for messages."""
    if not _is_list(column.type):
        raise UserError(f"{name}: each row must be a list of numbers; seen {column.type}")
    if hasattr(column, "storage"):  # a tensor, as Ray Data writes it
        column = column.storage
    flat = column.flatten()
    if column.null_count or flat.null_count or not len(column) or len(flat) % len(column):
        raise UserError(f"{name}: rows must be lists of one length without nulls")
    lengths = np.diff(column.offsets.to_numpy()) if hasattr(column, "offsets") else np.array([column.type.list_size])
    if (lengths != lengths[0]).any():
        raise UserError(f"{name}: rows must be of one length; seen {lengths.min()} to {lengths.max()}")
    return check_matrix(flat.to_numpy(zero_copy_only=False).reshape(len(column), -1), name)


def check_matrix(values: NDArray[Any], name: str) -> NDArray[Any]:
    """`values` if they are (N, D) real numbers; UserError otherwise. name: for messages."""
    if values.ndim != 2 or values.dtype.kind not in "fiub":
        raise UserError(
            f"{name} must be real numbers of shape (N, D); seen {values.dtype} of shape {values.shape}"
            + (": one number per row is x.reshape(-1, 1)" if values.ndim == 1 else "")
        )
    return values
