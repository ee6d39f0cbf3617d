"""The manifest: every image of a data set, numbered, and where its bytes are; cut into shards. Nothing is decoded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from hashlib import blake2b
from typing import Annotated, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import Field

from raycluster.config import NonEmpty, settings
from raycluster.data import sources
from raycluster.io import storage
from raycluster.types import UserError

Shard = tuple[int, int]
_METADATA = b"raycluster"


@settings
class DataSettings:
    """Which images there are.

    uri: a picture folder (any depth), Parquet or WebDataset tar files (a file, a folder, or a pattern with *), a .txt
    list of paths, or `digits`; local or remote. image_column: of Parquet files, `auto` finds it. labels: for evaluation
    only: `auto` takes a column, member or key called label, labels or cls, else the names of sibling folders; `none`;
    `folder`; or the name of a column. shard_size: images read together. max_broken_fraction: share of images that may
    be unreadable before a run stops. max_image_pixels: larger images count as broken, but JPEGs of up to four times as
    many are decoded at half size; decoding takes 16 bytes per pixel at most. shuffle_window_shards: how many
    neighbouring shards of an epoch are shuffled together.
    """

    uri: NonEmpty
    image_column: str = "auto"
    labels: str = "auto"
    shard_size: Annotated[int, Field(ge=1)] = 1000
    max_broken_fraction: Annotated[float, Field(ge=0, le=1)] = 0.01
    max_image_pixels: Annotated[int, Field(ge=1)] = 64_000_000
    shuffle_window_shards: Annotated[int, Field(ge=1)] = 1


@dataclass(frozen=True)
class Manifest:
    """Images have the ids 0 to N - 1; a shard is a range of them.

    entries: columns path, container, offset, size, row (see `sources.found.Found`) and label (int32, -1 where unknown).
    shards: (start, stop) sample ids. classes: names of the labels, empty if there are none. source: what it was built
    of. image_column: of Parquet files.
    """

    entries: pa.Table
    shards: list[Shard]
    classes: list[str]
    source: dict[str, Any]
    image_column: str = ""

    @property
    def num_samples(self) -> int:
        """N."""
        return int(self.entries.num_rows)

    @cached_property
    def paths(self) -> pa.StringArray:
        """What to call each image, (N,)."""
        return self.entries["path"].combine_chunks()

    @cached_property
    def labels(self) -> NDArray[np.int32] | None:
        """True classes (N,), -1 where unknown; None if none is known. For evaluation only."""
        return self.entries["label"].to_numpy() if self.classes else None

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that name the images, their order and their shards."""
        digest = blake2b(json.dumps(self.shards).encode(), digest_size=8)
        for column in ("path", "offset", "size", "row"):
            digest.update(json.dumps(self.entries[column].to_pylist()).encode())
        return digest.hexdigest()


class Header(NamedTuple):
    """What a manifest file says of itself."""

    starts: list[int]
    classes: list[str]
    source: dict[str, Any]
    image_column: str


def build_manifest(settings: DataSettings) -> Manifest:
    """List the images of `settings.uri`. Raises UserError saying what is there instead of images."""
    found = sources.find(settings)
    labels, classes = _labels(found, settings)
    entries = found.entries.append_column("label", pa.array(labels, pa.int32()))
    return Manifest(entries, found.shards, classes, _source(settings), found.image_column)


def write_manifest(manifest: Manifest, uri: str) -> None:
    """One Parquet file whose row groups are the shards, so that a task reads the rows of its shard only."""
    header = {
        "starts": [start for start, _ in manifest.shards],
        "classes": manifest.classes,
        "source": manifest.source,
        "image_column": manifest.image_column,
    }
    samples = np.arange(manifest.num_samples, dtype=np.int64)
    table = manifest.entries.add_column(0, "sample", [samples]).replace_schema_metadata({_METADATA: json.dumps(header)})
    sink = pa.BufferOutputStream()
    options: dict[str, Any] = {"compression": "zstd", "write_statistics": False, "write_page_checksum": True}
    with pq.ParquetWriter(sink, table.schema, **options) as writer:
        for start, stop in manifest.shards:
            writer.write_table(table.slice(start, stop - start), row_group_size=stop - start)
    storage.write_bytes(uri, sink.getvalue())


def read_manifest(uri: str, settings: DataSettings | None = None) -> Manifest:
    """A manifest that was written. With `settings`, UserError if it was built of other data or in another way."""
    header, table = read_entries(uri)
    if settings is not None and header.source != _source(settings):
        raise UserError(
            f"{uri} was built of {header.source}, but the configuration asks for {_source(settings)}; "
            "delete it, choose another run directory, or restore the configuration"
        )
    stops = [*header.starts[1:], table.num_rows]
    shards = list(zip(header.starts, stops, strict=True))
    return Manifest(table.drop_columns(["sample"]), shards, header.classes, header.source, header.image_column)


def read_entries(uri: str, samples: NDArray[np.int64] | None = None) -> tuple[Header, pa.Table]:
    """The rows of `samples`, in this order (default: all), of the manifest at `uri`; only their shards are read."""
    metadata, header = _about(uri)
    shards = np.arange(metadata.num_row_groups)
    if samples is not None:
        shards = np.unique(np.searchsorted(header.starts, samples, side="right") - 1)

    def read() -> pa.Table:
        filesystem, path = storage.filesystem(uri)
        options = {"metadata": metadata, "page_checksum_verification": True}
        with filesystem.open_input_file(path) as source, pq.ParquetFile(source, **options) as file:
            return file.read_row_groups(shards.tolist(), use_threads=False)

    table = storage.attempt("read the manifest", uri, read)
    if samples is None:
        return header, table
    ids = table["sample"].to_numpy()
    return header, table.take(np.searchsorted(ids, samples))


def shard_samples(uri: str, shard: int) -> NDArray[np.int64]:
    """The sample ids of one shard of the manifest at `uri`."""
    metadata, header = _about(uri)
    return np.arange(header.starts[shard], header.starts[shard] + metadata.row_group(shard).num_rows)


def _about(uri: str) -> tuple[pq.FileMetaData, Header]:
    info = storage.file_info(uri)
    if not info.is_file:
        raise UserError(f"there is no manifest at {uri}; check the path, and that every machine sees it")
    return _header(uri, info.size, info.mtime_ns or 0)


@lru_cache(maxsize=4)
def _header(uri: str, size: int, changed: int) -> tuple[pq.FileMetaData, Header]:
    """`size` and `changed` make sure that a file written anew is read anew."""

    def read() -> pq.FileMetaData:
        filesystem, path = storage.filesystem(uri)
        with filesystem.open_input_file(path) as source:
            return pq.read_metadata(source)

    metadata = storage.attempt("read the manifest", uri, read)
    stored = (metadata.metadata or {}).get(_METADATA)
    if stored is None:
        raise UserError(f"{uri} is a Parquet file but no manifest; point to the manifest that a run wrote")
    return metadata, Header(**json.loads(stored))


def _source(settings: DataSettings) -> dict[str, Any]:
    """The settings that decide what a manifest holds."""
    uri = settings.uri if settings.uri == sources.digits.NAME else storage.absolute(settings.uri)
    return {
        "uri": uri,
        "image_column": settings.image_column,
        "labels": settings.labels,
        "shard_size": settings.shard_size,
    }


def _labels(found: sources.Found, settings: DataSettings) -> tuple[NDArray[np.int32], list[str]]:
    """(N,) labels and the names of the classes; all -1 and no names if there are none."""
    if settings.labels == "none":
        return _encoded(None, len(found.entries))
    if settings.labels == "folder":
        if not found.folders or not any(found.folders):
            raise UserError(
                f"data.labels = folder, but the images of {settings.uri} lie in no folders; use none, or a column"
            )
        return _encoded(_names(found.folders), len(found.entries))
    if found.labels is not None:
        return _encoded(found.labels, len(found.entries), found.class_names)
    if settings.labels != "auto":
        raise UserError(f"data.labels = {settings.labels}, but {settings.uri} has no columns; use auto, folder or none")
    told = found.folders is not None and _are_classes(found.folders)
    return _encoded(_names(found.folders or []) if told else None, len(found.entries))


def _are_classes(folders: Sequence[str]) -> bool:
    """Whether every image lies in a folder, and some folder has a sibling."""
    different = set(folders)
    parents = [folder.rpartition("/")[0] for folder in different]
    return "" not in different and len(set(parents)) < len(parents)


def _names(folders: Sequence[str]) -> pa.Array:
    return pa.array([folder.rpartition("/")[2] or None for folder in folders], pa.string())


def _encoded(
    values: pa.Array | None, num_samples: int, names: list[str] | None = None
) -> tuple[NDArray[np.int32], list[str]]:
    """Numbers from 0 for the distinct values in their order (numbers by size, even as text); negative is unknown."""
    if values is None or values.null_count == len(values):
        return np.full(num_samples, -1, np.int32), []
    if pa.types.is_integer(values.type):
        values = pc.if_else(pc.less(values, 0), pa.scalar(None, values.type), values)
    if names and pa.types.is_integer(values.type):
        labels = values.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int32)
        if labels.max() >= len(names):
            raise UserError(
                f"label {labels.max()} exceeds the {len(names)} class names that the data set declares; write it again"
            )
        return labels, names
    coded = values.dictionary_encode()
    distinct = coded.dictionary.to_pylist()
    order = sorted(range(len(distinct)), key=lambda index: _sort_key(distinct[index]))
    rank = np.empty(len(distinct) + 1, np.int32)
    rank[order], rank[-1] = np.arange(len(distinct)), -1
    codes = coded.indices.fill_null(len(distinct)).to_numpy(zero_copy_only=False)
    return rank[codes], [str(distinct[index]) for index in order]


def _sort_key(value: int | str) -> tuple[int, str]:
    number = isinstance(value, int) or value.isdecimal()
    return (int(value), "") if number else (1 << 62, str(value))
