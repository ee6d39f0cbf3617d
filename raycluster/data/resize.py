"""Make a data set quick to read: pictures scaled down once, in Parquet files of one shard each."""

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
_LARGEST_LOSSLESS = 64  # short side in pixels up to which what was not a JPEG stays lossless


class Prepared(NamedTuple):
    """What became of one shard: pictures written, their bytes, pictures left out and why (by path)."""

    images: int
    bytes: int
    broken: dict[str, str]


def prepare_shard(manifest_uri: str, shard: int, out_uri: str, image_size: int, *, settings: DataSettings) -> Prepared:
    """Write `shard-NNNNN.parquet` (columns image, label, path) into the folder `out_uri`; the same bytes every time.

    image_size: pixels to which a longer short side is scaled down. JPEGs that need no change are copied.
    label: the name of the class, null where unknown. Raises UserError if something cannot be read or written.
    """
    header, entries = read_entries(manifest_uri, shard_samples(manifest_uri, shard))
    paths = entries["path"].to_pylist()
    pictures: dict[int, bytes] = {}
    broken: dict[str, str] = {}
    for row, content in enumerate(contents(entries, header.image_column)):
        try:
            if isinstance(content, BrokenImage):
                raise content
            pictures[row] = _encoded(content, image_size, settings.max_image_pixels)
        except BrokenImage as error:
            broken[paths[row]] = str(error)
    if pictures:
        labels = entries["label"].to_pylist()
        columns = {
            "image": pa.array(pictures.values(), pa.binary()),
            "label": pa.array(
                [header.classes[labels[row]] if labels[row] >= 0 else None for row in pictures], pa.string()
            ),
            "path": pa.array([paths[row] for row in pictures], pa.string()),
        }
        _write(pa.table(columns), storage.join(out_uri, f"shard-{shard:05d}.parquet"))
    return Prepared(len(pictures), sum(map(len, pictures.values())), broken)


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
    pixels = rgb(image)  # of what is copied, too: it may be truncated
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
