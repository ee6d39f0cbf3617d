"""The manifest: the numbered images of a data set, where their bytes are, and their shards. Nothing is decoded."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from hashlib import blake2b
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import Field

from raycluster.config import NonEmpty, settings
from raycluster.data import class_order, sources
from raycluster.data.labels import encode_labels, folder_labels
from raycluster.data.subset import draw_subset
from raycluster.io import storage
from raycluster.types import Shard, UserError

log = logging.getLogger(__name__)
_COLUMNS = ("sample", "path", "container", "offset", "size", "row", "label")
_METADATA = b"raycluster"


@settings
class DataSettings:
    """Which images to train on.

    uri: an image folder (any depth), Parquet, WebDataset tar or zip files (a file, a folder, or a pattern with *), a
    .txt list of paths, or `digits`; local or remote. max_samples: so many images of it, drawn at random, null for all;
    a smaller number draws some of those of a larger one. image_column: of Parquet files, `auto` finds it. labels: to
    evaluate with; `auto` takes a column, member or key called label, labels or cls, else the names of sibling folders;
    `none`; `folder`; or the name of a column. shard_size: images read together. max_broken_fraction: share of images
    that may be unreadable before a run stops. max_image_pixels: larger images count as broken, but JPEGs of up to four
    times as many are decoded at half size; decoding takes 16 bytes per pixel at most. shuffle_window_shards: how many
    neighbouring shards of an epoch are shuffled together; `auto` is 1, or up to 64 where files list the images class by
    class.
    """

    uri: NonEmpty
    max_samples: Annotated[int, Field(ge=1)] | None = None
    image_column: str = "auto"
    labels: str = "auto"
    shard_size: Annotated[int, Field(ge=1)] = 1000
    max_broken_fraction: Annotated[float, Field(ge=0, le=1)] = 0.01
    max_image_pixels: Annotated[int, Field(ge=1)] = 64_000_000
    shuffle_window_shards: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"


@dataclass(frozen=True)
class Manifest:
    """Images have the ids 0 to N - 1; a shard is a range of them.

    entries: columns path, container, offset, size, row (see `sources.base.Found`) and label (int32, -1 where unknown).
    shards: (start, stop) sample ids. classes: names of the labels, empty if there are none. source: the settings it was
    built from. image_column: of Parquet files. unread_files: files that are not used. window_shards: how many shards to
    shuffle together; more than 1 if the images are ordered by class.
    """

    entries: pa.Table
    shards: list[Shard]
    classes: list[str]
    source: dict[str, Any]
    image_column: str = ""
    unread_files: sources.UnreadFiles = field(default_factory=dict)
    window_shards: int = 1

    @property
    def num_samples(self) -> int:
        """N."""
        return int(self.entries.num_rows)

    @cached_property
    def paths(self) -> pa.LargeStringArray:
        """The display name of each image, (N,)."""
        return self.entries["path"].combine_chunks()

    @cached_property
    def labels(self) -> NDArray[np.int32] | None:
        """True classes (N,), -1 where unknown; None if none is known. For evaluation only."""
        return self.entries["label"].to_numpy() if self.classes else None

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that identify the images, their order and their shards."""
        digest = blake2b(json.dumps(self.shards).encode(), digest_size=8)
        for column in ("path", "offset", "size", "row"):
            digest.update(json.dumps(self.entries[column].to_pylist()).encode())
        return digest.hexdigest()

    @property
    def unread(self) -> str:
        """A line for the user on files that are not used, "" if there are none."""
        if not self.unread_files:
            return ""
        total = sum(count for count, _ in self.unread_files.values())
        kinds = sorted(self.unread_files.items(), key=lambda item: (-item[1][0], item[0]))
        listed = ", ".join(f"{count} {kind} (such as {example})" for kind, (count, example) in kinds)
        supported = ", ".join(f".{kind}" for kind in sources.IMAGE_EXTENSIONS)
        return f"{total} file{'s are' if total > 1 else ' is'} not read: {listed}; supported images: {supported}"

    def evaluation_samples(self, count: int) -> NDArray[np.int64]:
        """Ascending ids of up to `count` images to evaluate on.

        The first ones; those of evenly spaced shards if the images are ordered by class.
        """
        if self.window_shards == 1 or count >= self.num_samples:
            return np.arange(min(count, self.num_samples))
        num_shards = -(-count * len(self.shards) // self.num_samples)
        chosen = [self.shards[shard] for shard in class_order.spread(len(self.shards), num_shards)]
        samples = np.concatenate([np.arange(start, stop) for start, stop in chosen])
        return samples[class_order.spread(len(samples), count)]

    def shards_of(self, samples: NDArray[np.int64]) -> list[int]:
        """The shards that hold these images, ascending."""
        starts = [start for start, _ in self.shards]
        shards: list[int] = np.unique(np.searchsorted(starts, samples, side="right") - 1).tolist()
        return shards


class Header(NamedTuple):
    """The metadata of a manifest file, see Manifest. starts: first sample id of each shard."""

    starts: list[int]
    classes: list[str]
    source: dict[str, Any]
    image_column: str
    unread: sources.UnreadFiles = {}  # noqa: RUF012
    window_shards: int = 1


def build_manifest(settings: DataSettings) -> Manifest:
    """List the images of `settings.uri`. Raises UserError naming what was found instead of images."""
    found = draw_subset(sources.find(settings), settings.max_samples, settings.shard_size)
    labels, classes = _labels(found, settings)
    return Manifest(
        entries=found.entries.append_column("label", pa.array(labels, pa.int32())),
        shards=found.shards,
        classes=classes,
        source=_source(settings),
        image_column=found.image_column,
        unread_files=found.unread,
        window_shards=_window_shards(found, labels, classes),
    )


def _window_shards(found: sources.Found, labels: NDArray[np.int32], classes: list[str]) -> int:
    """See class_order.window_shards. Where no labels are known, folders stand for classes unless they are numbered."""
    if found.is_shuffled:
        return 1
    if not classes and found.folders is not None:
        labels, names = encode_labels(folder_labels(found.folders, strict=True))
        if all(name.isdecimal() for name in names):
            return 1
    return class_order.window_shards(labels, found.shards)


def write_manifest(manifest: Manifest, uri: str) -> None:
    """Write one Parquet file whose row groups are the shards, so that a task reads the rows of its shard only."""
    header = {
        "starts": [start for start, _ in manifest.shards],
        "classes": manifest.classes,
        "source": manifest.source,
        "image_column": manifest.image_column,
        "unread": manifest.unread_files,
        "window_shards": manifest.window_shards,
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
    """Read a manifest. Raises UserError if it is damaged or, with `settings`, built from other settings."""
    header, table = read_entries(uri)
    if settings is not None and header.source != _source(settings):
        raise UserError(
            f"{uri} was built from {header.source}, but the configuration asks for {_source(settings)}; "
            "delete it, choose another run directory, or restore the configuration"
        )
    stops = [*header.starts[1:], table.num_rows]
    shards = list(zip(header.starts, stops, strict=True))
    path = table["path"].cast(pa.large_string())  # string in manifests of earlier versions
    entries = table.set_column(table.schema.get_field_index("path"), "path", path).drop_columns(["sample"])
    unread = {kind: (count, example) for kind, (count, example) in header.unread.items()}
    return Manifest(entries, shards, header.classes, header.source, header.image_column, unread, header.window_shards)


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
    """`size` and `changed` make a rewritten file miss the cache."""

    def read() -> pq.FileMetaData:
        filesystem, path = storage.filesystem(uri)
        with filesystem.open_input_file(path) as source:
            return pq.read_metadata(source)

    metadata = storage.attempt("read the manifest", uri, read)
    stored = (metadata.metadata or {}).get(_METADATA)
    if stored is None:
        raise UserError(f"{uri} is a Parquet file but no manifest; point to the manifest that a run wrote")
    return metadata, _parsed(stored, metadata, uri)


def _parsed(stored: bytes, metadata: pq.FileMetaData, uri: str) -> Header:
    """The header, which must agree with the row groups."""
    sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    try:
        header = Header(**json.loads(stored))
        header.unread.update({kind: (int(count), str(name)) for kind, (count, name) in header.unread.items()})
        valid = (
            header.starts == [0, *np.cumsum(sizes)[:-1].tolist()]
            and tuple(metadata.schema.to_arrow_schema().names) == _COLUMNS
            and all(isinstance(name, str) for name in [*header.classes, header.image_column])
            and isinstance(header.source, dict)
            and isinstance(header.window_shards, int)
            and header.window_shards >= 1
        )
    except (ValueError, TypeError, AttributeError, RecursionError):
        valid = False
    if not valid:
        raise UserError(f"the manifest {uri} is damaged, or of another version; delete it to list the images again")
    return header


def _source(settings: DataSettings) -> dict[str, Any]:
    """The settings that determine the content of a manifest."""
    uri = settings.uri if settings.uri == sources.digits.NAME else storage.absolute(settings.uri)
    source = {
        "uri": uri,
        "image_column": settings.image_column,
        "labels": settings.labels,
        "shard_size": settings.shard_size,
    }
    return source | ({} if settings.max_samples is None else {"max_samples": settings.max_samples})


def _labels(found: sources.Found, settings: DataSettings) -> tuple[NDArray[np.int32], list[str]]:
    """(N,) labels and the names of the classes; all -1 and no names if there are none."""
    wanted, uri, count = settings.labels, settings.uri, len(found.entries)
    if wanted == "none":
        return np.full(count, -1, np.int32), []
    if wanted == "folder" and not any(found.folders or []):
        raise UserError(f"data.labels = folder, but the images of {uri} lie in no folders; use none, or a column")
    if wanted not in ("auto", "folder") and found.labels is None:
        raise UserError(f"data.labels = {wanted}, but {uri} has no columns; use auto, folder or none")
    values = found.labels if wanted != "folder" else None
    if values is None:
        values = folder_labels(found.folders or [""] * count, strict=wanted == "auto")
    labels, classes = encode_labels(values, found.class_names)
    if len(classes) == 1:
        single = f"data.labels = {wanted} finds a single class {classes[0]!r} in {uri}"
        if wanted == "folder":
            raise UserError(f"{single}; set data.labels=none, or arrange the images as CLASS/NAME.jpg")
        log.warning("%s: no accuracy or agreement with it means anything", single)
    return labels, classes
