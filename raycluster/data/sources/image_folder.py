"""A folder of picture files, flat or nested, in an order that mixes folders of classes."""

from __future__ import annotations

from collections.abc import Sequence

from raycluster.data.sources.base import File, Found, entries, even_shards, repeated
from raycluster.io import storage
from raycluster.seeding import generator


def find(root: str, files: Sequence[File], shard_size: int) -> Found:
    """root: URI that the paths of `files` are relative to (the file itself if it is one picture)."""
    folder = root if len(files) != 1 or files[0].uri != root else storage.parent(root)
    paths = mixed([file.path for file in files])
    return Found(
        entries=entries(paths, repeated([folder], [len(paths)])),
        shards=even_shards(len(paths), shard_size),
        folders=[path.rpartition("/")[0] for path in paths],
    )


def mixed(paths: Sequence[str]) -> list[str]:
    """The paths in an order that depends on nothing but the paths."""
    ordered = sorted(paths)
    return [ordered[index] for index in generator(0, "manifest").permutation(len(ordered))]
