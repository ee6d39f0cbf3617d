"""WebDataset: tar files whose members `key.jpg`, `key.cls`, `key.json` belong together; read by their offset."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from raycluster.data.sources.base import (
    IMAGE_EXTENSIONS,
    File,
    Found,
    count_unread,
    entries,
    in_parallel,
    printable,
    repeated,
    shards_of_units,
    unsupported,
)
from raycluster.data.sources.parquet import LABEL_NAMES
from raycluster.io import storage
from raycluster.types import UserError

_READ_AHEAD_BYTES = 4 << 20  # headers lie between images: one sequential read is cheaper than a request for each
_MAX_HEADER_BYTES = 1 << 20  # of names and attributes before a member
_MAX_LABEL_BYTES = 1 << 20
_MAX_LABEL_CHARACTERS = 1000
_EXTENDED_HEADERS = (
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
)

Label = int | str | None


class _Member(NamedTuple):
    name: str
    offset: int
    size: int
    label: Label


def find(files: Sequence[File], labels: str, shard_size: int) -> Found:
    """Members in the order of files and headers. Raises UserError if a file is damaged or holds no images.

    labels: "auto", "none", "folder", or the extension of a member or the key in its JSON that holds the class.
    """
    names = {"auto": LABEL_NAMES, "none": (), "folder": ()}.get(labels, (labels,))
    scanned = in_parallel(lambda file: storage.attempt("read as tar", file.uri, lambda: _scan(file, names)), files)
    members = [member for one, _ in scanned for member in one]
    values = [member.label for member in members]
    known = [value for value in values if value is not None]
    if labels not in ("auto", "none", "folder") and not known:
        raise UserError(
            f"data.labels = {labels}: no image in {files[0].uri} has a member .{labels} or this key in .json"
        )
    texts = any(isinstance(value, str) for value in known)
    return Found(
        entries=entries(
            [f"{file.path}/{member.name}" for file, (one, _) in zip(files, scanned, strict=True) for member in one],
            repeated([file.uri for file in files], [len(one) for one, _ in scanned]),
            offset=np.array([member.offset for member in members], np.int64),
            size=np.array([member.size for member in members], np.int64),
        ),
        shards=shards_of_units((1 for _ in members), shard_size),
        labels=pa.array([None if v is None else str(v) if texts else v for v in values]) if known else None,
        folders=[member.name.rpartition("/")[0] for member in members],
        unread=count_unread(other for _, others in scanned for other in others),
    )


class _Header(tarfile.TarInfo):
    """Refuses headers that `tarfile` would follow backwards, or read into memory without a limit."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.size < 0 or (self.type in _EXTENDED_HEADERS and self.size > _MAX_HEADER_BYTES):
            raise tarfile.ReadError(f"a header declares {self.size} bytes")
        return super()._proc_member(archive)  # type: ignore[misc]


def _scan(file: File, label_names: Sequence[str]) -> tuple[list[_Member], list[tuple[str, str]]]:
    """The images of a tar file, and (kind, path) of members that look like images but cannot be read."""
    filesystem, path = storage.filesystem(file.uri)
    images: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, Label] = {}
    others: list[tuple[str, str]] = []
    seen: set[str] = set()
    with filesystem.open_input_file(path) as source:
        try:
            for archive, member in _members(source):
                key, kind = _split(member.name)
                seen.add(printable(kind))
                if kind in IMAGE_EXTENSIONS and not member.issparse():
                    images.setdefault(key, member)
                elif kind in IMAGE_EXTENSIONS or unsupported(kind):
                    what = "sparse tar member" if member.issparse() else f".{kind} in tar files"
                    others.append((what, f"{file.path}/{printable(member.name)}"))
                elif label_names and kind in (*label_names, "json"):
                    label = _label(archive, member, kind, label_names)
                    labels[key] = labels.get(key) if label is None else label
        except (tarfile.TarError, ValueError, IndexError, OverflowError, EOFError) as error:
            raise UserError(
                f"{file.uri} is no complete, uncompressed tar file: {error}; write or copy it again"
            ) from error
    if not images:
        raise UserError(
            f"{file.uri} holds no images but members .{', .'.join(sorted(seen))}; wanted .jpg, .png or .webp"
        )
    return [
        _Member(printable(member.name), member.offset_data, member.size, labels.get(key))
        for key, member in images.items()
    ], others


def _members(source: pa.NativeFile) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """The regular files in a tar file that are not hidden. Raises what `tarfile` raises for damaged ones."""
    reader = io.BufferedReader(source, _READ_AHEAD_BYTES)
    with tarfile.open(fileobj=reader, mode="r:", tarinfo=_Header) as archive:
        for member in archive:
            if member.size < 0:  # by an extended header
                raise tarfile.ReadError(f"{printable(member.name)} has {member.size} bytes")
            if member.isfile() and not _split(member.name)[0].rpartition("/")[2].startswith("."):
                yield archive, member


def _split(name: str) -> tuple[str, str]:
    """WebDataset's rule: the key ends at the first dot of the file name."""
    folder, slash, base = name.removeprefix("./").rpartition("/")
    key, _, kind = base.partition(".")
    return folder + slash + key, kind.lower()


def _label(archive: tarfile.TarFile, member: tarfile.TarInfo, kind: str, names: Sequence[str]) -> Label:
    """The label in a member; None if it is none, or too long to be one."""
    source = archive.extractfile(member) if member.size <= _MAX_LABEL_BYTES else None
    text = source.read().decode(errors="replace").strip() if source else ""
    if kind != "json":
        return _number(text)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return None
    found = [content[name] for name in names if name in content] if isinstance(content, dict) else []
    if not found or not isinstance(found[0], (int, str)) or len(str(found[0])) > _MAX_LABEL_CHARACTERS:
        return None
    return _number(str(int(found[0]))) if isinstance(found[0], int) else found[0].encode(errors="replace").decode()


def _number(text: str) -> Label:
    """An int64 if the text is one, else the text."""
    if not text or len(text) > _MAX_LABEL_CHARACTERS:
        return None
    try:
        number = int(text)
    except ValueError:
        return text
    return number if -(2**63) <= number < 2**63 else text
