"""Zip archives of images, as YFCC100M is distributed: listed from their central directories, read member by member."""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from itertools import chain
from sys import intern
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raycluster.data.sources.base import (
    IMAGE_EXTENSIONS,
    File,
    Found,
    count_unread,
    entries,
    extension,
    in_parallel,
    printable,
    repeated,
    shards_of_units,
    unsupported,
)
from raycluster.data.sources.listing import hidden
from raycluster.io import storage
from raycluster.types import UserError

EXTENSION = "zip"
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")  # of a member; its name and extra field follow, then its data
_DESCRIPTOR = struct.Struct("<L")  # checksum after the data, where the header was written before it was known
_SIGNATURE, _DESCRIPTOR_SIGNATURE = b"PK\x03\x04", b"PK\x07\x08"
_ENCRYPTED, _CHECKSUM_FOLLOWS = 1, 8  # bits of the flags
_SLACK_BYTES = 512  # read beyond the data, for header, name and extra field
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)

Read = Callable[[int, int], bytes]
"""(number of bytes, offset) -> so many bytes of a file, fewer at its end."""


class DamagedMember(Exception):
    """A member that cannot be read; the message says why."""


class _Scanned(NamedTuple):
    """The images of an archive, as columns, since a data set may have a hundred million.

    others: (kind, path) of members that look like images but cannot be read.
    """

    paths: pa.Array
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    folders: list[str]
    others: list[tuple[str, str]]


def find(files: Sequence[File], shard_size: int) -> Found:
    """Images in the order of files and central directories; the offsets are those of the local headers.

    A shard holds whole archives, unless one has more than one and a half times `shard_size` images. Raises UserError if
    an archive is damaged or incomplete, or none holds an image.
    """
    scanned = in_parallel(lambda file: storage.attempt("read as zip", file.uri, lambda: _scan(file)), files)
    counts = [len(one.sizes) for one in scanned]
    if not sum(counts):
        raise UserError(f"{files[0].uri} and its {len(files) - 1} neighbours hold no .jpg, .png or .webp images")
    return Found(
        entries=entries(
            pa.concat_arrays([one.paths for one in scanned]),
            repeated([file.uri for file in files], counts),
            offset=np.concatenate([one.offsets for one in scanned]),
            size=np.concatenate([one.sizes for one in scanned]),
        ),
        shards=shards_of_units(counts, shard_size),
        folders=list(chain.from_iterable(one.folders for one in scanned)),
        unread=count_unread(other for one in scanned for other in one.others),
    )


def _scan(file: File) -> _Scanned:
    images: list[zipfile.ZipInfo] = []
    others: list[tuple[str, str]] = []
    for info in _members(file.uri):
        name, kind = printable(info.filename), extension(info.filename)
        if info.is_dir() or any(map(hidden, name.split("/"))):
            continue
        if kind in IMAGE_EXTENSIONS and info.compress_type in _METHODS:
            images.append(info)
        elif kind in IMAGE_EXTENSIONS:
            others.append((f"zip member of compression method {info.compress_type}", f"{file.path}/{name}"))
        elif unsupported(kind):
            others.append((f".{kind} in zip files", f"{file.path}/{name}"))
    names = [printable(info.filename) for info in images]
    return _Scanned(
        pa.array([f"{file.path}/{name}" for name in names], pa.large_string()),
        np.array([info.header_offset for info in images], np.int64),
        np.array([info.compress_size for info in images], np.int64),
        [intern(name.rpartition("/")[0]) for name in names],
        others,
    )


def _members(uri: str) -> list[zipfile.ZipInfo]:
    """The central directory of an archive."""
    filesystem, path = storage.filesystem(uri)
    with filesystem.open_input_file(path) as source:
        try:
            with zipfile.ZipFile(source) as archive:
                return archive.infolist()
        except (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError, OverflowError, EOFError) as error:
            if isinstance(error.__context__, OSError):  # zipfile takes unreachable storage for a damaged file
                raise error.__context__ from None
            raise UserError(f"{uri} is no complete zip file: {error}; write or copy it again") from error


def read_member(read: Read, offset: int, size: int, max_bytes: int) -> bytes:
    """The content of a member. offset: of its local header. size: compressed.

    Raises DamagedMember if it is damaged, encrypted or larger than max_bytes; what `read` raises passes through.
    """
    data = read(_LOCAL_HEADER.size + size + _SLACK_BYTES, offset)
    if len(data) < _LOCAL_HEADER.size or not data.startswith(_SIGNATURE):
        raise DamagedMember("no member begins there: the archive was changed or is damaged")
    _, _, flags, method, _, _, checksum, _, _, name_length, extra_length = _LOCAL_HEADER.unpack_from(data)
    start = _LOCAL_HEADER.size + name_length + extra_length
    if name_length + extra_length > _SLACK_BYTES:
        data = read(start + size + _SLACK_BYTES, offset)
    if flags & _ENCRYPTED or method not in _METHODS:
        raise DamagedMember("it is encrypted" if flags & _ENCRYPTED else f"its compression method is {method}")
    packed, rest = data[start : start + size], data[start + size :]
    if len(packed) < size:
        raise DamagedMember("the archive ends before the member does")
    content = packed if method == zipfile.ZIP_STORED else _inflated(packed, max_bytes)
    if flags & _CHECKSUM_FOLLOWS:
        rest = rest.removeprefix(_DESCRIPTOR_SIGNATURE)
        checksum = _DESCRIPTOR.unpack_from(rest)[0] if len(rest) >= _DESCRIPTOR.size else -1
    if zlib.crc32(content) != checksum:
        raise DamagedMember("its checksum does not match")
    return content


def _inflated(packed: bytes, max_bytes: int) -> bytes:
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        content = inflater.decompress(packed, max_bytes)
    except zlib.error as error:
        raise DamagedMember(f"its compressed data are damaged: {error}") from error
    if not inflater.eof:
        larger = len(content) == max_bytes
        raise DamagedMember(f"it has more than {max_bytes} bytes" if larger else "its compressed data are cut off")
    return content
