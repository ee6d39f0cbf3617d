"""Resize a data set once, so that it reads faster: one Parquet file per shard."""

from __future__ import annotations

import io
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from PIL.Image import Resampling

from raycluster.data.decode import BrokenImage, DecodableImage, Jpeg, opened, rgb, set_jpeg_scale
from raycluster.data.manifest import DataSettings, read_entries, shard_samples
from raycluster.data.reader import contents
from raycluster.io import storage

_ROWS_PER_GROUP = 128
_JPEG_QUALITY = 95
_LARGEST_LOSSLESS = 64  # short side in pixels up to which PNG and WebP stay lossless


class Prepared(NamedTuple):
    """Result of one shard: images written, their bytes, and the reasons for skipped ones (by path)."""

    images: int
    bytes: int
    broken: dict[str, str]


def prepare_shard(manifest_uri: str, shard: int, out_uri: str, image_size: int, *, settings: DataSettings) -> Prepared:
    """Write `shard-NNNNN.parquet` (columns image, label, path) into the folder `out_uri`; files are reproducible.

    image_size: length of the short side in pixels; smaller images keep their size. JPEGs of the right size are copied.
    label: name of the class, null where unknown. Raises UserError if storage cannot be read or written.
    """
    header, entries = read_entries(manifest_uri, shard_samples(manifest_uri, shard))
    paths = entries["path"].to_pylist()
    encoded: dict[int, bytes] = {}
    broken: dict[str, str] = {}
    for row, content in enumerate(contents(entries, header.image_column)):
        try:
            if isinstance(content, BrokenImage):
                raise content
            encoded[row] = _encoded(content, image_size, settings.max_image_pixels)
        except BrokenImage as error:
            broken[paths[row]] = str(error)
    if encoded:
        labels = entries["label"].to_pylist()
        columns = {
            "image": pa.array(encoded.values(), pa.binary()),
            "label": pa.array(
                [header.classes[labels[row]] if labels[row] >= 0 else None for row in encoded], pa.string()
            ),
            "path": pa.array([paths[row] for row in encoded], pa.string()),
        }
        _write(pa.table(columns), storage.join(out_uri, f"shard-{shard:05d}.parquet"))
    return Prepared(len(encoded), sum(map(len, encoded.values())), broken)


def _write(table: pa.Table, uri: str) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=_ROWS_PER_GROUP, use_dictionary=["label"])
    storage.write_bytes(uri, sink.getvalue())


def _encoded(data: bytes, image_size: int, max_pixels: int) -> bytes:
    image = opened(data, max_pixels=max_pixels)
    size = _size(image, image_size)
    was_jpeg = data.startswith(b"\xff\xd8")
    fits = isinstance(image, Jpeg) and image.size == size
    box = set_jpeg_scale(image, (0, 0, *image.size), size)
    pixels = rgb(image)  # also of a JPEG that is copied: it may be truncated
    if fits:
        return data
    pixels = pixels.resize(size, Resampling.BICUBIC, box)
    buffer = io.BytesIO()
    if was_jpeg or min(size) > _LARGEST_LOSSLESS:
        pixels.save(buffer, "JPEG", quality=_JPEG_QUALITY)
    else:
        pixels.save(buffer, "PNG")
    return buffer.getvalue()


def _size(image: DecodableImage, image_size: int) -> tuple[int, int]:
    width, height = image.size
    short = min(width, height)
    if short <= image_size:
        return image.size
    return max(1, round(width * image_size / short)), max(1, round(height * image_size / short))
