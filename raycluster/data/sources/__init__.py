"""Image sources: one module per kind, each with a `find`; `find` here selects the module by the files at the URI."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from typing import Protocol

from pyarrow.fs import FileType, LocalFileSystem

from raycluster.data.sources import digits, image_folder, parquet, path_list, stl10, webdataset, zip_archive
from raycluster.data.sources.base import (
    IMAGE_EXTENSIONS,
    File,
    Found,
    UnreadFiles,
    count_unread,
    extension,
    unsupported,
)
from raycluster.data.sources.listing import FOLDER_WITHOUT_ACCESS, NAME_NOT_TEXT, hidden, walk
from raycluster.io import storage
from raycluster.types import UserError

__all__ = ["IMAGE_EXTENSIONS", "Found", "UnreadFiles", "digits", "find"]

_PACKED = ("tar.gz", "tgz", "gz", "bz2", "zst")
_READ = (*IMAGE_EXTENSIONS, *parquet.EXTENSIONS, "tar", zip_archive.EXTENSION, stl10.EXTENSION)


class SourceSettings(Protocol):
    """The settings that a source reads, see DataSettings."""

    @property
    def uri(self) -> str: ...
    @property
    def image_column(self) -> str: ...
    @property
    def labels(self) -> str: ...
    @property
    def shard_size(self) -> int: ...


def find(wanted: SourceSettings) -> Found:
    """All images of `wanted.uri`, none of them decoded. Raises UserError naming what was found instead of images."""
    if wanted.uri == digits.NAME:
        _check_digits(wanted)
        return digits.find(wanted.shard_size)
    if storage.without_options(wanted.uri)[0].endswith(".txt"):
        return path_list.find(wanted.uri, wanted.shard_size)
    root, files, others = _files(wanted.uri)
    others += [(f".{extension(file.path)}", file.path) for file in files if unsupported(extension(file.path))]
    unread = count_unread(others)
    found = _find(wanted, root, files, unread)
    return replace(found, unread=unread | found.unread)


def _find(wanted: SourceSettings, root: str, files: list[File], unread: UnreadFiles) -> Found:
    kinds = {
        "Parquet files": [file for file in files if extension(file.path) in parquet.EXTENSIONS],
        "tar files": [file for file in files if extension(file.path) == "tar"],
        "zip files": [file for file in files if extension(file.path) == zip_archive.EXTENSION],
        "files of STL-10": [file for file in files if extension(file.path) == stl10.EXTENSION],
        "images": [file for file in files if extension(file.path) in IMAGE_EXTENSIONS],
    }
    present = [kind for kind, some in kinds.items() if some]
    if len(present) != 1:
        raise UserError(_nothing_clear(wanted.uri, files, present, unread))
    if kinds["Parquet files"]:
        return parquet.find(kinds["Parquet files"], wanted.image_column, wanted.labels, wanted.shard_size)
    if wanted.image_column != "auto":
        raise UserError(
            f"data.image_column = {wanted.image_column} has no effect on {present[0]} ({wanted.uri}); drop it"
        )
    if kinds["tar files"]:
        return webdataset.find(kinds["tar files"], wanted.labels, wanted.shard_size)
    if kinds["zip files"]:
        return zip_archive.find(kinds["zip files"], wanted.shard_size)
    if kinds["files of STL-10"]:
        return stl10.find(kinds["files of STL-10"], wanted.shard_size)
    return image_folder.find(root, kinds["images"], wanted.shard_size)


def _check_digits(wanted: SourceSettings) -> None:
    if wanted.image_column != "auto":
        raise UserError(f"data.image_column = {wanted.image_column} has no effect on {digits.NAME}; drop it")
    if wanted.labels not in ("auto", "none"):
        raise UserError(
            f"data.labels = {wanted.labels}, but {digits.NAME} has neither columns nor folders; use auto or none"
        )


def _files(uri: str) -> tuple[str, list[File], list[tuple[str, str]]]:
    """(folder, its files at any depth, (kind, path) of what cannot be read); `*` matches any characters but /."""
    uri = storage.absolute(uri)
    base, options = storage.without_options(uri)
    root, pattern = uri, re.compile(".*", re.DOTALL)
    if "*" in base:
        root, _, wild = base.partition("*")[0].rpartition("/")
        pattern = re.compile(re.escape(wild + base[len(root) + 1 + len(wild) :]).replace(r"\*", "[^/]*"))
        root += f"?{options}" if options else ""
    info = storage.file_info(root)
    if info.type == FileType.NotFound:
        raise UserError(
            f"data.uri = {uri}: there is nothing at {root}; check the spelling, and that every machine sees it"
        )
    if info.type == FileType.Unknown:
        raise UserError(f"data.uri = {uri} is a FIFO, socket or device; give a folder, or a regular file")
    if info.type == FileType.File:
        return root, [File(info.base_name, root)], []
    paths, others = _list(root)
    files = [File(path, storage.join(root, path)) for path in paths if pattern.fullmatch(path)]
    return root, files, [(kind, path) for kind, path in others if _matters(kind, path, pattern)]


def _list(root: str) -> tuple[list[str], list[tuple[str, str]]]:
    filesystem, folder = storage.filesystem(root)
    if isinstance(filesystem, LocalFileSystem):
        return storage.attempt("list", root, lambda: walk(folder))
    paths = [info.path for info in storage.list_infos(root, recursive=True)]
    return [path for path in paths if not any(map(hidden, path.split("/")))], []


def _matters(kind: str, path: str, pattern: re.Pattern[str]) -> bool:
    """Whether the user would expect this to be read."""
    if kind == FOLDER_WITHOUT_ACCESS:
        return True
    return bool(pattern.fullmatch(path)) and (kind == NAME_NOT_TEXT or extension(path) in _READ)


def _nothing_clear(uri: str, files: list[File], present: list[str], unread: UnreadFiles) -> str:
    if present:
        return f"data.uri = {uri} holds {' and '.join(present)}; give a folder, or a pattern with *, of one kind"
    kinds = Counter(extension(file.path) for file in files)
    odd = [f"{count} x {kind} ({example})" for kind, (count, example) in unread.items() if not kind.startswith(".")]
    if not kinds and not odd:
        return (
            f"data.uri = {uri} holds no files; give a folder of images, Parquet, tar or zip files, or a .txt list of "
            "paths"
        )
    seen = [f"{count} x .{kind}" if kind else f"{count} without extension" for kind, count in kinds.most_common(8)]
    advice = " Unpack compressed files first; tar files must not be compressed."
    packed = advice if any(kind in _PACKED for kind in kinds) else ""
    wanted = ", ".join(f".{kind}" for kind in _READ)
    return f"data.uri = {uri} holds no images but {', '.join([*seen, *odd])}; wanted {wanted}.{packed}"
