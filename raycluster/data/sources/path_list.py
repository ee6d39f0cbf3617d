"""A .txt file with one path or URI of an image per line; relative paths start at the folder of the list."""

from __future__ import annotations

import re

import numpy as np
import pyarrow as pa

from raycluster.data.sources.base import Found, entries, even_shards
from raycluster.data.sources.image_folder import mixed
from raycluster.io import storage
from raycluster.types import UserError

_NEWLINE = re.compile(r"\r\n|\n|\r")
_ABSOLUTE = re.compile(r"^(/|[a-zA-Z][a-zA-Z0-9+.-]+://)")


def find(uri: str, shard_size: int) -> Found:
    """Empty lines and lines that start with # are ignored. Raises UserError if nothing else is left."""
    uri = storage.absolute(uri)
    try:
        text = storage.read_bytes(uri).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"data.uri = {uri} is not a text file in UTF-8 ({error}); give one path per line") from error
    lines = [line.strip(" \t") for line in _NEWLINE.split(text)]  # splitlines() also cuts at U+2028, \f and the like
    paths = mixed([line for line in lines if line and not line.startswith("#")])
    if not paths:
        raise UserError(f"data.uri = {uri} lists no images; write one path or URI per line")
    folder = storage.parent(uri)
    is_relative = np.array([_ABSOLUTE.match(path) is None for path in paths], np.int32)
    return Found(
        entries=entries(paths, pa.DictionaryArray.from_arrays(is_relative, ["", folder])),
        shards=even_shards(len(paths), shard_size),
        folders=[path.rpartition("/")[0] for path in paths],
        is_shuffled=True,
    )
