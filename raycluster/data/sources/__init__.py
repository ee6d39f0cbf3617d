"""Where images come from: one file per kind of source, each with its `find`; `find` here chooses by what is there."""

from __future__ import annotations

import re
from collections import Counter
from typing import Protocol

from pyarrow.fs import FileType

from raycluster.data.sources import digits, image_folder, parquet, path_list, webdataset
from raycluster.data.sources.base import IMAGE_EXTENSIONS, File, Found, extension
from raycluster.io import storage
from raycluster.types import UserError

__all__ = ["Found", "digits", "find"]

_PACKED = ("tar.gz", "tgz", "zip", "gz", "bz2", "zst")


class SourceSettings(Protocol):
    """What a source must know of the settings."""

    @property
    def uri(self) -> str: ...
    @property
    def image_column(self) -> str: ...
    @property
    def labels(self) -> str: ...
    @property
    def shard_size(self) -> int: ...


def find(wanted: SourceSettings) -> Found:
    """All images of `wanted.uri`, none of them decoded. Raises UserError saying what is there instead of images."""
    if wanted.image_column != "auto" and wanted.uri == digits.NAME:
        raise UserError(f"data.image_column = {wanted.image_column} has no effect on {digits.NAME}; drop it")
    if wanted.uri == digits.NAME:
        return digits.find(wanted.shard_size)
    if storage.without_options(wanted.uri)[0].endswith(".txt"):
        return path_list.find(wanted.uri, wanted.shard_size)
    root, files = _files(wanted.uri)
    kinds = Counter(extension(file.path) for file in files)
    found = {
        "Parquet files": [file for file in files if extension(file.path) in parquet.EXTENSIONS],
        "tar files": [file for file in files if extension(file.path) == "tar"],
        "pictures": [file for file in files if extension(file.path) in IMAGE_EXTENSIONS],
    }
    held = [kind for kind, some in found.items() if some]
    if len(held) != 1:
        raise UserError(_nothing_clear(wanted.uri, kinds, held))
    if found["Parquet files"]:
        return parquet.find(found["Parquet files"], wanted.image_column, wanted.labels, wanted.shard_size)
    if wanted.image_column != "auto":
        raise UserError(f"data.image_column = {wanted.image_column} has no effect on {held[0]} ({wanted.uri}); drop it")
    if found["tar files"]:
        return webdataset.find(found["tar files"], wanted.labels, wanted.shard_size)
    return image_folder.find(root, found["pictures"], wanted.shard_size)


def _files(uri: str) -> tuple[str, list[File]]:
    """(folder, its files at any depth); `*` in the URI stands for any characters but /."""
    uri = storage.absolute(uri)
    base, options = storage.without_options(uri)
    root, pattern = uri, re.compile(".*")
    if "*" in base:
        root, _, wild = base.partition("*")[0].rpartition("/")
        pattern = re.compile(re.escape(wild + base[len(root) + 1 + len(wild) :]).replace(r"\*", "[^/]*"))
        root += f"?{options}" if options else ""
    info = storage.file_info(root)
    if info.type == FileType.NotFound:
        raise UserError(
            f"data.uri = {uri}: there is nothing at {root}; check the spelling, and that every machine sees it"
        )
    if info.type == FileType.File:
        return root, [File(info.base_name, root)]
    paths = [info.path for info in storage.list_infos(root, recursive=True)]
    wanted = [path for path in paths if pattern.fullmatch(path) and not _hidden(path)]
    return root, [File(path, storage.join(root, path)) for path in wanted]


def _hidden(path: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in path.split("/"))


def _nothing_clear(uri: str, kinds: Counter[str], held: list[str]) -> str:
    if held:
        return f"data.uri = {uri} holds {' and '.join(held)}; give a folder, or a pattern with *, of one kind"
    if not kinds:
        return (
            f"data.uri = {uri} holds no files; give a folder of pictures, Parquet or tar files, or a .txt list of paths"
        )
    seen = ", ".join(
        f"{count} x .{kind}" if kind else f"{count} without extension" for kind, count in kinds.most_common(8)
    )
    packed = (
        " Unpack archives first, tar files must not be compressed." if any(kind in _PACKED for kind in kinds) else ""
    )
    wanted = ", ".join(f".{kind}" for kind in (*IMAGE_EXTENSIONS, *parquet.EXTENSIONS, "tar"))
    return f"data.uri = {uri} holds no pictures but {seen}; wanted {wanted}.{packed}"
