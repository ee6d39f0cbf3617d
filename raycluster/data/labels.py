"""True labels, for evaluation: from columns, members of tar files, or the names of folders."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from raycluster.types import UserError

_MAX_DIGITS = 18  # of labels that are sorted as numbers


def folder_labels(folders: Sequence[str], *, strict: bool) -> pa.Array:
    """(N,) names of the classes that the folders stand for, null where there is none.

    The class is the name at one level of the path: of the levels where some folder has a sibling, the one with the most
    distinct names, and of several the innermost. This finds `cat` in `cat/1.jpg`, `cat/images/1.jpg` and
    `train/cat/1.jpg`. strict: nothing but null unless there is such a level, and every image has a folder there; else
    the innermost folder stands in.
    """
    parts = {folder: folder.split("/") if folder else [] for folder in dict.fromkeys(folders)}
    level = _class_level(list(parts.values()))
    if level is None or (strict and any(len(path) <= level for path in parts.values())):
        names = {folder: None if strict or not path else path[-1] for folder, path in parts.items()}
    else:
        names = {folder: path[level] if len(path) > level else None for folder, path in parts.items()}
    return pa.array([names[folder] for folder in folders], pa.large_string())


def _class_level(paths: Sequence[Sequence[str]]) -> int | None:
    best: tuple[int | None, int] = None, 1
    for level in range(max(map(len, paths), default=0)):
        below = {tuple(path[: level + 1]) for path in paths if len(path) > level}
        names = {path[-1] for path in below}
        has_siblings = len({path[:-1] for path in below}) < len(below)
        if has_siblings and len(names) >= best[1]:
            best = level, len(names)
    return best[0]


def encode_labels(values: pa.Array, names: list[str] | None = None) -> tuple[NDArray[np.int32], list[str]]:
    """(N,) int32 labels from 0 for the distinct values in order, and the names of the classes.

    Numbers are ordered by size, even as text. Null and negative values become -1. names: of classes that are numbers
    already. Raises UserError if a label has no name.
    """
    if values.null_count == len(values):
        return np.full(len(values), -1, np.int32), []
    if pa.types.is_signed_integer(values.type):
        values = pc.if_else(pc.less(values, 0), pa.scalar(None, values.type), values)
    if names and pa.types.is_integer(values.type):
        return _named_labels(values, names)
    coded = values.dictionary_encode()
    distinct = coded.dictionary.to_pylist()
    order = sorted(range(len(distinct)), key=lambda index: _sort_key(distinct[index]))
    rank = np.empty(len(distinct) + 1, np.int32)
    rank[order], rank[-1] = np.arange(len(distinct)), -1
    codes = coded.indices.fill_null(len(distinct)).to_numpy(zero_copy_only=False)
    return rank[codes], [str(distinct[index]) for index in order]


def _named_labels(values: pa.Array, names: list[str]) -> tuple[NDArray[np.int32], list[str]]:
    largest = pc.max(values).as_py()
    if largest is not None and largest >= len(names):
        raise UserError(
            f"label {largest} exceeds the {len(names)} class names that the data set declares; write it again"
        )
    labels: NDArray[np.int32] = values.cast(pa.int32()).fill_null(-1).to_numpy(zero_copy_only=False)
    return labels, names


def _sort_key(value: int | str) -> tuple[int, str]:
    number = isinstance(value, int) or (value.isdecimal() and len(value) <= _MAX_DIGITS)
    return (int(value), "") if number else (1 << 64, str(value))
