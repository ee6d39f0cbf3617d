"""The interface of image sources: a table with one row per image, and its shards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raycluster.types import Shard

T = TypeVar("T")
R = TypeVar("R")
UnreadFiles = dict[str, tuple[int, str]]
"""Files that are passed over: by kind, how many and the path of the first."""

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
_UNSUPPORTED_IMAGES = (
    "3fr arw avif bmp cr2 cr3 dcm dib dicom dng exr fits gif hdr heic heif icns ico j2k jfif jp2 jpe jpf jpx jxl jxr "
    "kdc mrw nef nrw orf pbm pcx pef pgm pnm ppm psd raf raw rw2 sgi srw svg svgz tga tif tiff wdp xbm xpm"
)
_THREADS = 16  # reading footers and headers is latency-bound


class File(NamedTuple):
    """path: relative to where the search began. uri: where it is."""

    path: str
    uri: str


@dataclass(frozen=True)
class Found:
    """The images of a source, in the order of their sample ids.

    entries: columns path (the display name), container, offset, size and row, which locate the bytes: `row` >= 0 is a
    row of a Parquet file, `offset` >= 0 a byte range of a file, else the file `path` in the folder `container`.
    shards: (start, stop) sample ids. labels: one value (number or text, null where unknown) per image, if the source
    has any. class_names: of labels that are numbers. folders: the folder of each image, where the source has folders.
    is_shuffled: whether the order is random. unread: files that are not used.
    """

    entries: pa.Table
    shards: list[Shard]
    labels: pa.Array | None = None
    class_names: list[str] | None = None
    folders: list[str] | None = None
    image_column: str = ""
    is_shuffled: bool = False
    unread: UnreadFiles = field(default_factory=dict)


def entries(
    paths: Sequence[str] | pa.Array,
    containers: pa.Array,
    *,
    offset: NDArray[np.int64] | None = None,
    size: NDArray[np.int64] | None = None,
    row: NDArray[np.int64] | None = None,
) -> pa.Table:
    """The table of `Found.entries`; columns that are not given are -1."""
    nothing = np.full(len(paths), -1, np.int64)
    columns = {
        "path": pa.array(paths, pa.large_string()),  # int32 offsets end at 2 GiB of text
        "container": containers,
        "offset": nothing if offset is None else offset,
        "size": nothing if size is None else size,
        "row": nothing if row is None else row,
    }
    return pa.table(columns)


def repeated(values: Sequence[str], counts: Sequence[int]) -> pa.Array:
    """Each value `count` times, dictionary-encoded."""
    indices = np.repeat(np.arange(len(values), dtype=np.int32), counts)
    return pa.DictionaryArray.from_arrays(pa.array(indices), pa.array(values, pa.string()))


def even_shards(num_samples: int, shard_size: int, first: int = 0) -> list[Shard]:
    """The fewest shards of at most `shard_size` samples, of equal size up to one."""
    count = -(-num_samples // shard_size)
    edges = [first + num_samples * index // count for index in range(count + 1)]
    return list(pairwise(edges))


def shards_of_units(sizes: Iterable[int], shard_size: int) -> list[Shard]:
    """Shards of about `shard_size` samples that keep units which are read as a whole (row groups) together.

    Small neighbours are merged up to `shard_size`; a unit is split only if it exceeds one and a half times that.
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


def count_unread(files: Iterable[tuple[str, str]]) -> UnreadFiles:
    """Counts and examples of (kind, path)."""
    found: UnreadFiles = {}
    for kind, path in files:
        count, example = found.get(kind, (0, path))
        found[kind] = count + 1, min(path, example)
    return found


def unsupported(kind: str) -> bool:
    """Whether an extension names an image format that cannot be decoded."""
    return kind in _UNSUPPORTED_IMAGES.split()


def printable(name: str) -> str:
    """A file name with bytes that are not UTF-8 (surrogates in Python) written as \\xNN."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def extension(path: str) -> str:
    """The last extension, lower case, without the dot; two parts for compressed tars."""
    name = path.rpartition("/")[2].lower()
    if name.endswith(".tar.gz"):
        return "tar.gz"
    return name.rpartition(".")[2] if "." in name else ""
