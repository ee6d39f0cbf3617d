"""A .txt file with one path or URI of a picture per line; what is relative is relative to the folder of the list."""

from __future__ import annotations

import re

import pyarrow as pa

from raycluster.data.sources.base import Found, entries, even_shards
from raycluster.data.sources.image_folder import mixed
from raycluster.io import storage
from raycluster.types import UserError

_ABSOLUTE = re.compile(r"^(/|[a-zA-Z][a-zA-Z0-9+.-]+://)")


def find(uri: str, shard_size: int) -> Found:
    """Empty lines and lines that start with # are passed over."""
    uri = storage.absolute(uri)
    try:
        lines = [line.strip() for line in storage.read_bytes(uri).decode().splitlines()]
    except UnicodeDecodeError as error:
        raise UserError(f"data.uri = {uri} is not a text file in UTF-8 ({error}); give one path per line") from error
    paths = mixed([line for line in lines if line and not line.startswith("#")])
    if not paths:
        raise UserError(f"data.uri = {uri} lists no pictures; write one path or URI per line")
    folder = storage.parent(uri)
    containers = ["" if _ABSOLUTE.match(path) else folder for path in paths]
    return Found(
        entries=entries(paths, pa.array(containers, pa.string()).dictionary_encode()),
        shards=even_shards(len(paths), shard_size),
        folders=[path.rpartition("/")[0] for path in paths],
    )
