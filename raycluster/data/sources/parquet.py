"""Parquet files with a column of encoded images: binary, or struct{bytes, path} as Hugging Face writes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import types

from raycluster.data.sources.base import File, Found, entries, in_parallel, repeated, shards_of_units
from raycluster.io import storage
from raycluster.types import UserError

EXTENSIONS = ("parquet", "pq")
LABEL_NAMES = ("label", "labels", "cls")
_IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "bytes", "content")


class _Scanned(NamedTuple):
    groups: list[int]
    paths: pa.Array
    labels: pa.Array | None
    class_names: list[str] | None


def find(files: Sequence[File], image_column: str, labels: str, shard_size: int) -> Found:
    """Rows in the order of files and rows. `labels` is "auto", "none", "folder" or the name of a column."""
    schema = _schema(files[0])
    column = _image_column(schema, image_column, files[0].uri)
    label = _label_column(schema, labels, column, files[0].uri)
    scanned = in_parallel(lambda file: _scan(file, column, label), files)
    counts = [sum(one.groups) for one in scanned]
    if not sum(counts):
        raise UserError(f"{files[0].uri} and its {len(files) - 1} neighbours hold no rows; write the data set again")
    paths = pa.chunked_array([one.paths for one in scanned], pa.large_string())
    named = _path_field(schema, column) is not None
    values = [one.labels for one in scanned if one.labels is not None]
    return Found(
        entries=entries(
            paths.combine_chunks(),
            repeated([file.uri for file in files], counts),
            row=np.concatenate([np.arange(count, dtype=np.int64) for count in counts]),
        ),
        shards=shards_of_units((size for one in scanned for size in one.groups), shard_size),
        labels=pa.chunked_array(values).combine_chunks() if label else None,
        class_names=scanned[0].class_names,
        folders=[path.rpartition("/")[0] for path in paths.to_pylist()] if named else None,
        image_column=column,
    )


def bytes_field(schema: pa.Schema, column: str) -> str | None:
    """The field to read of a column of images: the column, or its child `bytes`; None if it holds no images."""
    index = schema.get_field_index(column)
    kind = schema.field(index).type if index >= 0 else pa.null()
    if _is_binary(kind):
        return column
    if types.is_struct(kind) and any(field.name == "bytes" and _is_binary(field.type) for field in kind):
        return f"{column}.bytes"
    return None


def _schema(file: File) -> pa.Schema:
    filesystem, path = storage.filesystem(file.uri)
    return storage.attempt("read the Parquet schema of", file.uri, lambda: pq.read_schema(path, filesystem=filesystem))


def _scan(file: File, column: str, label: str | None) -> _Scanned:
    return storage.attempt("read as Parquet", file.uri, lambda: _scan_once(file, column, label))


def _scan_once(file: File, column: str, label: str | None) -> _Scanned:
    filesystem, path = storage.filesystem(file.uri)
    with filesystem.open_input_file(path) as source, pq.ParquetFile(source) as opened:
        schema, metadata = opened.schema_arrow, opened.metadata
        missing = [name for name in (column, label) if name and schema.get_field_index(name) < 0]
        if missing or bytes_field(schema, column) is None:
            raise UserError(
                f"{file.uri} has no column {missing or column} like the files before it: {_described(schema)}"
            )
        groups = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        field = _path_field(schema, column)
        wanted = [name for name in (field, label) if name]
        table = opened.read(columns=wanted) if wanted and sum(groups) else None
    rows = pa.array([f"{file.path}:{row}" for row in range(sum(groups))], pa.large_string())
    paths = rows
    if field is not None and table is not None:
        stored = _flat(table[field.split(".")[0]])
        paths = pc.if_else(pc.equal(stored.fill_null(""), ""), rows, stored)
    labels = _flat(table[label]) if label and table is not None else None
    return _Scanned(groups, paths, labels, _class_names(schema, label))


def _flat(column: pa.ChunkedArray) -> pa.Array:
    """One array; text as large_string, whose offsets do not overflow at 2 GiB."""
    if types.is_struct(column.type):
        column = pc.struct_field(column, "path")
    if types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    return (column.cast(pa.large_string()) if _is_text(column.type) else column).combine_chunks()


def _image_column(schema: pa.Schema, wanted: str, uri: str) -> str:
    holders = [name for name in schema.names if bytes_field(schema, name)]
    if wanted != "auto":
        if wanted not in holders:
            raise UserError(
                f"data.image_column = {wanted} is no column of encoded images in {uri}: {_described(schema)}"
            )
        return wanted
    likely = [name for name in holders if name.lower() in _IMAGE_NAMES]
    if len(holders) != 1 and len(likely) != 1:
        found = f"several columns ({', '.join(holders)}) that may hold" if holders else "no column that holds"
        raise UserError(
            f"{uri} has {found} encoded images; set data.image_column to one of type binary: {_described(schema)}"
        )
    return holders[0] if len(holders) == 1 else likely[0]


def _label_column(schema: pa.Schema, labels: str, image_column: str, uri: str) -> str | None:
    if labels in ("none", "folder"):
        return None
    label = next((name for name in LABEL_NAMES if name in schema.names and name != image_column), None)
    if labels != "auto":
        label = labels
        if labels not in schema.names:
            raise UserError(f"data.labels = {labels} is no column of {uri}: {_described(schema)}")
    kind = schema.field(label).type if label else pa.string()
    kind = kind.value_type if types.is_dictionary(kind) else kind
    if types.is_integer(kind) or _is_text(kind):
        return label
    if labels == "auto":
        return None
    raise UserError(
        f"data.labels = {label} in {uri} is of type {kind}; wanted a column of whole numbers or text, or `none`"
    )


def _path_field(schema: pa.Schema, column: str) -> str | None:
    kind = schema.field(column).type
    if types.is_struct(kind) and any(field.name == "path" and _is_text(field.type) for field in kind):
        return f"{column}.path"
    named = "path" in schema.names and _is_text(schema.field("path").type)
    return "path" if named else None


def _class_names(schema: pa.Schema, label: str | None) -> list[str] | None:
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = features[label]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    return [str(name) for name in names] if isinstance(names, list) else None


def _is_binary(kind: pa.DataType) -> bool:
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _is_text(kind: pa.DataType) -> bool:
    return bool(types.is_string(kind) or types.is_large_string(kind))


def _described(schema: pa.Schema) -> str:
    return "columns are " + ", ".join(f"{field.name} ({field.type})" for field in schema)
