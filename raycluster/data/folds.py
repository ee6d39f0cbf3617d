"""Predefined folds of the labelled images to learn from, as STL-10 has ten of them."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raycluster.data.manifest import Manifest
from raycluster.io import storage
from raycluster.types import UserError


def read_folds(folds: str, manifest: Manifest) -> list[NDArray[np.int64]]:
    """The ids of the images of each fold, ascending.

    folds: a .txt file with a line per fold, the positions of its images in the source, from 0 (`fold_indices.txt` of
    STL-10); or a column of Parquet files with the number of the fold of an image, or a list of them, null for none.
    Raises UserError unless there are at least two folds.
    """
    is_text = storage.without_options(folds)[0].endswith(".txt")
    found = _from_text(folds, manifest) if is_text else _from_column(folds, manifest)
    if len(found) < 2:
        raise UserError(f"evaluation.folds: {folds} has {len(found)} folds; wanted at least two")
    return found


def _from_text(uri: str, manifest: Manifest) -> list[NDArray[np.int64]]:
    if "max_samples" in manifest.source:
        raise UserError(
            f"evaluation.folds: {uri} counts the images of the source, of which data.max_samples = "
            f"{manifest.source['max_samples']} draws some; set data.max_samples to null"
        )
    lines = storage.read_bytes(uri).decode(errors="replace").splitlines()
    try:
        folds = [np.unique(np.array(line.split(), np.int64)) for line in lines if line.strip()]
    except (ValueError, OverflowError) as error:
        raise UserError(f"evaluation.folds: {uri} should hold whole numbers, a line per fold: {error}") from None
    for number, fold in enumerate(folds):
        if fold[0] < 0 or fold[-1] >= manifest.num_samples:
            raise UserError(
                f"evaluation.folds: line {number + 1} of {uri} names the images {fold[0]} to {fold[-1]}, but "
                f"{manifest.source['uri']} holds {manifest.num_samples}; give the folds of this data set"
            )
    return folds


def _from_column(column: str, manifest: Manifest) -> list[NDArray[np.int64]]:
    rows = manifest.entries["row"].to_numpy()
    containers = manifest.entries["container"].to_pylist()
    if (rows < 0).any() or not manifest.image_column:
        raise UserError(
            f"evaluation.folds: seen {column}, but {manifest.source['uri']} has no columns; wanted a .txt file with a "
            "line of positions per fold, or images in Parquet files"
        )
    values = {uri: _column(uri, column) for uri in dict.fromkeys(containers)}
    members = defaultdict(list)
    for sample, (uri, row) in enumerate(zip(containers, rows.tolist(), strict=True)):
        value = values[uri][row]
        for fold in value if isinstance(value, list) else [] if value is None else [value]:
            members[fold].append(sample)
    return [np.unique(np.array(members[fold], np.int64)) for fold in sorted(members)]


def _column(uri: str, column: str) -> list[Any]:
    filesystem, path = storage.filesystem(uri)
    schema = storage.attempt("read the Parquet schema of", uri, lambda: pq.read_schema(path, filesystem=filesystem))
    kind = schema.field(column).type if column in schema.names else pa.null()
    if not pa.types.is_integer(kind.value_type if pa.types.is_list(kind) else kind):
        raise UserError(
            f"evaluation.folds: seen {column}; wanted a column of {uri} with whole numbers or lists of them, but "
            f"it has {', '.join(f'{field.name} ({field.type})' for field in schema)}"
        )
    read = storage.attempt("read", uri, lambda: pq.read_table(path, filesystem=filesystem, columns=[column]))
    values: list[Any] = read[column].to_pylist()
    return values
