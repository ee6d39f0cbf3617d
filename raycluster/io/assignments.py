"""assignments/*.parquet of a run: columns sample, path, label_0, label_1, ... (-1: excluded).

Crops add their box; `drawn` says which images the round drew, where it did not take all.
"""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raycluster.io import storage
from raycluster.types import Assignments, Crops, LabelSet, UserError

ROWS_PER_FILE = 1_000_000
_NUM_CLASSES = b"num_classes"
_EDGES = ("left", "top", "right", "bottom")


def write_assignments(folder: str, assignments: Assignments, paths: pa.Array, crops: Crops | None = None) -> None:
    """Write which sample has which labels. paths: (images,) what to call each image."""
    columns = {"sample": np.arange(assignments.num_samples), "path": paths}
    if crops is not None:
        columns["path"] = paths.take(pa.array(crops.images))
        edges = zip(_EDGES, crops.boxes.T, strict=True)
        columns |= {name: np.ascontiguousarray(edge) for name, edge in edges}
    if assignments.drawn is not None:
        columns["drawn"] = assignments.drawn
    columns |= {f"label_{number}": one.labels for number, one in enumerate(assignments.label_sets)}
    table = pa.table(columns).replace_schema_metadata({_NUM_CLASSES: ",".join(map(str, assignments.num_classes))})
    for part, start in enumerate(range(0, len(table), ROWS_PER_FILE)):
        buffer = io.BytesIO()
        pq.write_table(table.slice(start, ROWS_PER_FILE), buffer, write_page_checksum=True)
        storage.write_bytes(storage.join(folder, f"part-{part:05d}.parquet"), buffer.getvalue())


def read_assignments(folder: str) -> pa.Table:
    """The table that was written, in the order of the samples. Raises UserError if a file is damaged."""
    options = {"page_checksum_verification": True}
    try:
        files = storage.list_files(folder)
        parts = [pq.read_table(pa.BufferReader(storage.read_bytes(uri)), **options) for uri in files]
        return pa.concat_tables(parts).sort_by("sample")
    except (pa.ArrowException, OSError, KeyError) as error:
        raise UserError(
            f"{folder} is damaged: {' '.join(str(error).split())}; delete it and report.json, and run the same command "
            "to write both again"
        ) from None


def read_label_sets(folder: str) -> tuple[LabelSet, ...]:
    """The label sets that were written, with their numbers of classes."""
    table = read_assignments(folder)
    sizes = (table.schema.metadata or {}).get(_NUM_CLASSES, b"").decode()
    names = [name for name in table.column_names if name.startswith("label_")]
    labels = [np.array(table[name].to_numpy()) for name in names]  # copies, since those of Arrow are read-only
    classes = map(int, sizes.split(",")) if sizes else (int(one.max(initial=-1)) + 1 for one in labels)
    return tuple(LabelSet(one, size) for one, size in zip(labels, classes, strict=True))


def read_boxes(folder: str) -> NDArray[np.float32] | None:
    """(N, 4) the boxes of the samples, None if the samples are whole images."""
    table = read_assignments(folder)
    if not set(_EDGES) <= set(table.column_names):
        return None
    return np.stack([table[edge].to_numpy() for edge in _EDGES], 1).astype(np.float32)
