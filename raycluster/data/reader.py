"""The encoded bytes of rows of a manifest, wherever they are: files, pieces of tar files, rows of Parquet files."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow.fs import LocalFileSystem

from raycluster.data.decode import BrokenImage
from raycluster.data.sources import digits, parquet
from raycluster.io import storage
from raycluster.types import UserError

Content = bytes | BrokenImage

_BATCHES_IN_FLIGHT = 32  # pictures of an object store on their way at a time
_BATCH_ROWS = 256  # of Parquet held decoded at a time, beyond those that are wanted


def contents(entries: pa.Table, image_column: str) -> Iterator[Content]:
    """The bytes of each row in turn, or why it has none (a file is gone).

    entries: columns container, path, offset, size, row of the manifest. Each Parquet row group is read once, each tar
    file opened once; a broken connection is tried again and then raised as UserError.
    """
    containers = entries["container"].to_pylist()
    rows = entries["row"].to_numpy()
    if (rows < 0).all():
        yield from _pieces(containers, entries)
        return
    held: dict[str, dict[int, Content]] = {}
    for container in dict.fromkeys(containers):
        wanted = np.unique(rows[[container == other for other in containers]])
        held[container] = _rows(container, image_column, wanted)
    for container, row in zip(containers, rows.tolist(), strict=True):
        yield held[container][row]


def _rows(container: str, image_column: str, wanted: NDArray[np.int64]) -> dict[int, Content]:
    """The pictures of rows of a Parquet file (or of the digits), by row. wanted: ascending."""
    if container == digits.NAME:
        pictures = digits.pictures()
        return {row: pictures[row] for row in wanted.tolist()}
    if not storage.exists(container):
        return dict.fromkeys(wanted.tolist(), BrokenImage(f"{container} is gone"))
    return storage.attempt("read pictures from", container, lambda: _parquet_rows(container, image_column, wanted))


def _parquet_rows(container: str, image_column: str, wanted: NDArray[np.int64]) -> dict[int, Content]:
    filesystem, path = storage.filesystem(container)
    found: dict[int, Content] = {}
    with filesystem.open_input_file(path) as source, pq.ParquetFile(source) as file:
        field = parquet.bytes_field(file.schema_arrow, image_column)
        if field is None or wanted[-1] >= file.metadata.num_rows:
            raise UserError(
                f"{container} has {file.metadata.num_rows} rows and the columns {file.schema_arrow.names}, but its "
                f"manifest says {image_column}, row {wanted[-1]}: it was changed; delete the manifest to list it anew"
            )
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
        starts = np.cumsum([0, *sizes])
        for group in np.unique(np.searchsorted(starts, wanted, side="right") - 1).tolist():
            inside = wanted[(wanted >= starts[group]) & (wanted < starts[group + 1])]
            found |= _group_rows(file, group, field, inside - starts[group], int(starts[group]))
    return found


def _group_rows(
    file: pq.ParquetFile, group: int, field: str, wanted: NDArray[np.int64], first: int
) -> dict[int, Content]:
    """Rows of one row group, read in pieces so that a large one need not fit into memory."""
    found: dict[int, Content] = {}
    start = 0
    for batch in file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=[field], use_threads=False):
        column = batch.column(0)
        column = column.field("bytes") if pa.types.is_struct(column.type) else column
        for row in wanted[(wanted >= start) & (wanted < start + len(batch))].tolist():
            data = column[row - start].as_py()
            found[first + row] = BrokenImage("the row is empty") if data is None else data
        start += len(batch)
        if start > wanted[-1]:
            break
    return found


def _pieces(containers: list[str], entries: pa.Table) -> Iterator[Content]:
    """Whole files, or pieces of files, in order: one by one from disk, several ahead from afar."""
    paths = entries["path"].to_pylist()
    jobs = zip(containers, paths, entries["offset"].to_pylist(), entries["size"].to_pylist(), strict=True)
    places = {container or path for container, path in zip(containers, paths, strict=True)}
    with ExitStack() as stack:
        files = _Files(stack)
        if all(isinstance(storage.filesystem(place)[0], LocalFileSystem) for place in places):
            for job in jobs:
                yield files.read(*job)
            return
        threads = stack.enter_context(ThreadPoolExecutor(_BATCHES_IN_FLIGHT))
        pending: deque[Future[Content]] = deque()
        for job in jobs:
            pending.append(threads.submit(files.read, *job))
            if len(pending) > _BATCHES_IN_FLIGHT:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


class _Files:
    """Files that are opened once, however many pieces are read; safe to use from threads."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._open: dict[str, Any] = {}
        self._lock = Lock()

    def read(self, container: str, path: str, offset: int, size: int) -> Content:
        uri = container if offset >= 0 else storage.join(container, path) if container else path
        try:
            if offset < 0:
                return storage.read_bytes(uri)
            return storage.attempt("read a picture from", uri, lambda: self._file(uri).read_at(size, offset))
        except UserError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return BrokenImage(f"{uri} is gone")
            raise

    def _file(self, uri: str) -> Any:
        with self._lock:
            if uri not in self._open:
                filesystem, path = storage.filesystem(uri)
                self._open[uri] = self._stack.enter_context(filesystem.open_input_file(path))
            return self._open[uri]
