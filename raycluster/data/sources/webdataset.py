"""WebDataset: tar files whose members `key.jpg`, `key.cls`, `key.json` belong together; read by their offset."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from typing import IO, NamedTuple

import numpy as np
import pyarrow as pa

from raycluster.data.sources.base import IMAGE_EXTENSIONS, File, Found, entries, in_parallel, repeated, shards_of_units
from raycluster.data.sources.parquet import LABEL_NAMES
from raycluster.io import storage
from raycluster.types import UserError

_READ_AHEAD_BYTES = 4 << 20  # headers lie between pictures: far apart for a request each, near enough to read on

Label = int | str | None


class _Member(NamedTuple):
    name: str
    offset: int
    size: int
    label: Label


def find(files: Sequence[File], labels: str, shard_size: int) -> Found:
    """`labels`: "auto", "none", "folder", or the extension of a member or the key in its JSON that holds the class."""
    names = {"auto": LABEL_NAMES, "none": (), "folder": ()}.get(labels, (labels,))
    scanned = in_parallel(lambda file: storage.attempt("read as tar", file.uri, lambda: _scan(file, names)), files)
    members = [member for one in scanned for member in one]
    values = [member.label for member in members]
    known = [value for value in values if value is not None]
    if labels not in ("auto", "none", "folder") and not known:
        raise UserError(
            f"data.labels = {labels}: no picture in {files[0].uri} has a member .{labels} or this key in .json"
        )
    texts = any(isinstance(value, str) for value in known)
    return Found(
        entries=entries(
            [f"{file.path}/{member.name}" for file, one in zip(files, scanned, strict=True) for member in one],
            repeated([file.uri for file in files], [len(one) for one in scanned]),
            offset=np.array([member.offset for member in members], np.int64),
            size=np.array([member.size for member in members], np.int64),
        ),
        shards=shards_of_units((1 for _ in members), shard_size),
        labels=pa.array([None if v is None else str(v) if texts else v for v in values]) if known else None,
        folders=[member.name.rpartition("/")[0] for member in members],
    )


def _scan(file: File, label_names: Sequence[str]) -> list[_Member]:
    filesystem, path = storage.filesystem(file.uri)
    pictures: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, Label] = {}
    seen: set[str] = set()
    with filesystem.open_input_file(path) as source:
        try:
            with tarfile.open(fileobj=io.BufferedReader(source, _READ_AHEAD_BYTES), mode="r:") as archive:
                for member in archive:
                    key, kind = _split(member.name)
                    if not member.isfile() or key.rpartition("/")[2].startswith("."):
                        continue
                    seen.add(kind)
                    if kind in IMAGE_EXTENSIONS:
                        pictures.setdefault(key, member)
                    elif label_names and kind in (*label_names, "json"):
                        label = _label(archive.extractfile(member), kind, label_names)
                        labels[key] = labels.get(key) if label is None else label
        except tarfile.TarError as error:
            raise UserError(
                f"{file.uri} is no complete, uncompressed tar file: {error}; write or copy it again"
            ) from error
    if not pictures:
        raise UserError(
            f"{file.uri} holds no pictures but members .{', .'.join(sorted(seen))}; wanted .jpg, .png or .webp"
        )
    return [_Member(member.name, member.offset_data, member.size, labels.get(key)) for key, member in pictures.items()]


def _split(name: str) -> tuple[str, str]:
    """WebDataset's rule: the key ends at the first dot of the file name."""
    folder, slash, base = name.removeprefix("./").rpartition("/")
    key, _, kind = base.partition(".")
    return folder + slash + key, kind.lower()


def _label(source: IO[bytes] | None, kind: str, names: Sequence[str]) -> Label:
    text = source.read().decode(errors="replace").strip() if source else ""
    if kind != "json":
        return _number(text)
    try:
        content = json.loads(text)
    except ValueError:
        return None
    found = [content[name] for name in names if name in content] if isinstance(content, dict) else []
    return found[0] if found and isinstance(found[0], (int, str)) else None


def _number(text: str) -> Label:
    try:
        return int(text)
    except ValueError:
        return text or None
