"""The encoded bytes of rows of a manifest: files, byte ranges of tar files, members of zip files, Parquet rows."""

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
from raycluster.data.sources import digits, parquet, stl10, zip_archive
from raycluster.data.sources.base import extension
from raycluster.io import storage
from raycluster.types import UserError

Content = bytes | BrokenImage

_READS_IN_FLIGHT = 32  # concurrent requests to an object store
_BATCH_ROWS = 256  # of Parquet held decoded at a time, beyond those that are requested
_MAX_IMAGE_BYTES = 1 << 30  # of one encoded image; more is a damaged header or a sparse file


def contents(entries: pa.Table, image_column: str) -> Iterator[Content]:
    """The bytes of each row in turn, or why it cannot be read.

    entries: columns container, path, offset, size, row of the manifest. Each Parquet row group is read once, each tar
    or zip file opened once. Raises UserError if storage stays unreachable, or if a Parquet file lacks rows or columns
    that its manifest names.
    """
    containers = entries["container"].to_pylist()
    rows = entries["row"].to_numpy()
    if (rows < 0).all():
        yield from _read_files(containers, entries)
        return
    found: dict[str, dict[int, Content]] = {}
    for container in dict.fromkeys(containers):
        wanted = np.unique(rows[[container == other for other in containers]])
        found[container] = _rows(container, image_column, wanted)
    for container, row in zip(containers, rows.tolist(), strict=True):
        yield found[container][row]


def _rows(container: str, image_column: str, wanted: NDArray[np.int64]) -> dict[int, Content]:
    """The images of rows of a Parquet file (or of the digits), by row. wanted: ascending."""
    if container == digits.NAME:
        images = digits.images()
        return {row: images[row] for row in wanted.tolist()}
    if not storage.file_info(container).is_file:
        return dict.fromkeys(wanted.tolist(), BrokenImage(f"{container} is gone"))
    try:
        return storage.attempt("read images from", container, lambda: _parquet_rows(container, image_column, wanted))
    except UserError as error:
        return dict.fromkeys(wanted.tolist(), _broken(container, error))


def _broken(uri: str, error: UserError) -> BrokenImage:
    """What to report for an image that cannot be read; raises `error` again if storage is unreachable."""
    if isinstance(error.__cause__, FileNotFoundError):
        return BrokenImage(f"{uri} is gone")
    if not storage.concerns_one_file(error.__cause__):
        raise error
    return BrokenImage(str(error))


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
            images = _group_rows(file, group, field, inside - starts[group])
            found |= {int(starts[group]) + row: content for row, content in images.items()}
    return found


def _group_rows(file: pq.ParquetFile, group: int, field: str, wanted: NDArray[np.int64]) -> dict[int, Content]:
    """Images by row of one row group, read in batches so that a large group need not fit into memory.

    Rows from a damaged page on are broken, those before are not, whichever rows are requested.
    """
    found: dict[int, Content] = {}
    start = 0
    try:
        for batch in file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=[field], use_threads=False):
            column = batch.column(0)
            column = column.field("bytes") if pa.types.is_struct(column.type) else column
            for row in wanted[(wanted >= start) & (wanted < start + len(batch))].tolist():
                data = column[row - start].as_py()
                found[row] = BrokenImage("the row is empty") if data is None else data
            start += len(batch)
            if start > wanted[-1]:
                break
    except (OSError, pa.ArrowException) as error:
        if not storage.concerns_one_file(error):
            raise
        rest = dict.fromkeys(wanted.tolist(), BrokenImage(f"row group {group} is damaged: {error}"))
        return rest | found
    return found


def _read_files(containers: list[str], entries: pa.Table) -> Iterator[Content]:
    """Whole files, or byte ranges of files, in order: one at a time from disk, several ahead from object stores."""
    paths = entries["path"].to_pylist()
    jobs = zip(containers, paths, entries["offset"].to_pylist(), entries["size"].to_pylist(), strict=True)
    places = {container or path for container, path in zip(containers, paths, strict=True)}
    with ExitStack() as stack:
        files = _Files(stack)
        if all(map(_is_local, places)):
            for job in jobs:
                yield files.read(*job)
            return
        threads = stack.enter_context(ThreadPoolExecutor(_READS_IN_FLIGHT))
        pending: deque[Future[Content]] = deque()
        for job in jobs:
            pending.append(threads.submit(files.read, *job))
            if len(pending) > _READS_IN_FLIGHT:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _is_local(uri: str) -> bool:
    try:
        return isinstance(storage.filesystem(uri)[0], LocalFileSystem)
    except UserError:  # raised again where the file is read
        return False


class _Files:
    """Files that are opened once, however many byte ranges are read; thread-safe."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._open: dict[str, Any] = {}
        self._lock = Lock()

    def read(self, container: str, path: str, offset: int, size: int) -> Content:
        uri = container if offset >= 0 else storage.join(container, path) if container else path
        if size > _MAX_IMAGE_BYTES:
            return BrokenImage(f"{size} bytes at {offset} of {uri} exceed the {_MAX_IMAGE_BYTES} of an encoded image")
        try:
            if offset < 0:
                return storage.read_bytes(uri)
            return storage.attempt("read an image from", uri, lambda: self._bytes(uri, offset, size))
        except zip_archive.DamagedMember as error:
            return BrokenImage(f"the member at {offset} of {uri}: {error}")
        except UserError as error:
            return _broken(uri, error)

    def _bytes(self, uri: str, offset: int, size: int) -> bytes:
        file = self._file(uri)
        kind = extension(storage.without_options(uri)[0])
        if kind == zip_archive.EXTENSION:
            return zip_archive.read_member(file.read_at, offset, size, _MAX_IMAGE_BYTES)
        content: bytes = file.read_at(size, offset)
        return stl10.as_png(content) if kind == stl10.EXTENSION else content

    def _file(self, uri: str) -> Any:
        with self._lock:
            if uri not in self._open:
                filesystem, path = storage.filesystem(uri)
                self._open[uri] = self._stack.enter_context(filesystem.open_input_file(path))
            return self._open[uri]
