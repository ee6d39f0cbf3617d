"""What every source hands over: one row per image, and how rows make shards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

T = TypeVar("T")
R = TypeVar("R")
Shard = tuple[int, int]

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
_THREADS = 16  # footers and headers are waited for, not computed


class File(NamedTuple):
    """path: relative to where the search began. uri: where it is."""

    path: str
    uri: str


@dataclass(frozen=True)
class Found:
    """The images of a source, in the order of their sample ids.

    entries: columns path (for people), container, offset, size and row, which say where the bytes are: `row` >= 0 is
    a row of a Parquet file, `offset` >= 0 a piece of a file, else the file `path` in the folder `container`.
    shards: (start, stop) sample ids. labels: one value (number or text, null where unknown) per image, if the source
    has any. class_names: of labels that are numbers. folders: the folder of each image, where it may tell a class.
    """

    entries: pa.Table
    shards: list[Shard]
    labels: pa.Array | None = None
    class_names: list[str] | None = None
    folders: list[str] | None = None
    image_column: str = ""


def entries(
    paths: Sequence[str] | pa.Array,
    containers: pa.Array,
    *,
    offset: NDArray[np.int64] | None = None,
    size: NDArray[np.int64] | None = None,
    row: NDArray[np.int64] | None = None,
) -> pa.Table:
    """The table of `Found.entries`; what is not given is -1."""
    nothing = np.full(len(paths), -1, np.int64)
    columns = {
        "path": pa.array(paths, pa.string()),
        "container": containers,
        "offset": nothing if offset is None else offset,
        "size": nothing if size is None else size,
        "row": nothing if row is None else row,
    }
    return pa.table(columns)


def repeated(values: Sequence[str], counts: Sequence[int]) -> pa.Array:
    """Each value as often as its count says, stored once."""
    indices = np.repeat(np.arange(len(values), dtype=np.int32), counts)
    return pa.DictionaryArray.from_arrays(pa.array(indices), pa.array(values, pa.string()))


def even_shards(num_samples: int, shard_size: int, first: int = 0) -> list[Shard]:
    """The fewest shards of at most `shard_size` samples, of equal size up to one."""
    split_chunks = -(-num_samples // shard_size)
    edges = [first + num_samples * piece // split_chunks for piece in range(split_chunks + 1)]
    return list(pairwise(edges))


def shards_of_units(sizes: Iterable[int], shard_size: int) -> list[Shard]:
    """Shards of about `shard_size` that respect units which are read as a whole (row groups).

    Small neighbours are put together up to `shard_size`; a unit is cut only if it exceeds one and a half times that.
    """
    shards: list[Shard] = []
    start = stop = 0
    for size in sizes:
        if stop > start and stop - start + size > shard_size:
            shards.append((start, stop))
            start = stop
        stop += size
        if size > 1.5 * shard_size:  # nothing is pending here: it did not fit
            shards += even_shards(size, shard_size, start)
            start = stop
    return shards + [(start, stop)] * (stop > start)


def in_parallel(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """[function(item) for item in items], several at a time."""
    with ThreadPoolExecutor(_THREADS) as threads:
        return list(threads.map(function, items))


def extension(path: str) -> str:
    """The last extension, lower case, without the dot; two parts for compressed tars."""
    name = path.rpartition("/")[2].lower()
    if name.endswith(".tar.gz"):
        return "tar.gz"
    return name.rpartition(".")[2] if "." in name else ""
