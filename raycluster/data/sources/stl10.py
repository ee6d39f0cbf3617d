"""The binary files of STL-10 (Coates, Lee, Ng, AISTATS 2011): `train_X.bin`, `test_X.bin` and `unlabeled_X.bin`, with
labels in `train_y.bin` and names in `class_names.txt` beside them.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import pyarrow as pa

from raycluster.data.sources.base import File, Found, entries, even_shards, repeated
from raycluster.io import storage
from raycluster.types import UserError

EXTENSION = "bin"
_SIDE = 96
IMAGE_BYTES = 3 * _SIDE * _SIDE
_IMAGES, _LABELS, _NAMES = "_X.bin", "_y.bin", "class_names.txt"


def find(files: Sequence[File], shard_size: int) -> Found:
    """The images of one file, in its order. Raises UserError if there are several, or it is no file of STL-10."""
    uris = [file.uri for file in files if storage.without_options(file.uri)[0].endswith(_IMAGES)]
    if len(uris) != 1:
        raise UserError(
            f"data.uri holds {len(uris)} files of STL-10 with images ({', '.join(uris) or files[0].uri}); give one of "
            "train_X.bin, test_X.bin and unlabeled_X.bin"
        )
    size = storage.file_info(uris[0]).size
    count, rest = divmod(size, IMAGE_BYTES)
    if rest or not count:
        raise UserError(f"{uris[0]} has {size} bytes; wanted a multiple of {IMAGE_BYTES}, 96 x 96 x 3: copy it again")
    name = uris[0].partition("?")[0].rpartition("/")[2]
    labels, class_names = _labels(uris[0], count)
    return Found(
        entries=entries(
            [f"{name}:{index}" for index in range(count)],
            repeated(uris, [count]),
            offset=np.arange(count) * IMAGE_BYTES,
            size=np.full(count, IMAGE_BYTES),
        ),
        shards=even_shards(count, shard_size),
        labels=labels,
        class_names=class_names,
        is_shuffled=labels is None,
    )


def as_png(pixels: bytes) -> bytes:
    """One image, stored by channel and column, as an uncompressed PNG file; "" if it is cut off."""
    if len(pixels) != IMAGE_BYTES:
        return b""
    image = np.frombuffer(pixels, np.uint8).reshape(3, _SIDE, _SIDE).transpose(2, 1, 0)
    done, encoded = cv2.imencode(".png", image[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 0])
    assert done, "an uncompressed image can be encoded"
    return encoded.tobytes()


def _labels(uri: str, count: int) -> tuple[pa.Array | None, list[str] | None]:
    """Labels from 0, and the names of the classes, as far as the files beside are there."""
    base, options = storage.without_options(uri)
    beside = base[: -len(_IMAGES)] + _LABELS, base.rpartition("/")[0] + f"/{_NAMES}"
    of_labels, of_names = (f"{path}?{options}" if options else path for path in beside)
    if not storage.exists(of_labels):
        return None, None
    labels = np.frombuffer(storage.read_bytes(of_labels), np.uint8)
    if len(labels) != count:
        raise UserError(f"{of_labels} holds {len(labels)} labels for {count} images; copy it again")
    names = storage.read_bytes(of_names).decode().split() if storage.exists(of_names) else None
    return pa.array(labels.astype(np.int64) - 1), names
