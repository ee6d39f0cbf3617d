"""A folder of image files, flat or nested, in a random order that depends only on the paths."""

from __future__ import annotations

from collections.abc import Sequence

from raycluster.data.sources.base import File, Found, entries, even_shards, repeated
from raycluster.io import storage
from raycluster.seeding import generator


def find(root: str, files: Sequence[File], shard_size: int) -> Found:
    """root: URI that the paths of `files` are relative to (the file itself if it is one image)."""
    folder = root if len(files) != 1 or files[0].uri != root else storage.parent(root)
    paths = mixed([file.path for file in files])
    return Found(
        entries=entries(paths, repeated([folder], [len(paths)])),
        shards=even_shards(len(paths), shard_size),
        folders=[path.rpartition("/")[0] for path in paths],
        is_shuffled=True,
    )


def mixed(paths: Sequence[str]) -> list[str]:
    """The paths in a random order that depends only on the paths."""
    ordered = sorted(paths)
    return [ordered[index] for index in generator(0, "manifest").permutation(len(ordered))]
