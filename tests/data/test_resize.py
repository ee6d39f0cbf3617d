from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from raycluster.data.decode import decode
from raycluster.data.manifest import DataSettings, build_manifest, write_manifest
from raycluster.data.resize import prepare_shard


def prepared(folder: Path, tmp_path: Path, image_size: int, **options: object) -> tuple[list, Path]:
    settings = DataSettings(uri=str(folder), **options)
    manifest = build_manifest(settings)
    write_manifest(manifest, str(tmp_path / "manifest.parquet"))
    shards = range(len(manifest.shards))
    out = tmp_path / f"out-{image_size}"
    return [
        prepare_shard(str(tmp_path / "manifest.parquet"), shard, str(out), image_size, settings=settings)
        for shard in shards
    ], out


def test_shards_hold_scaled_images_with_their_classes(classes: Path, tmp_path: Path) -> None:
    results, out = prepared(classes, tmp_path, 24, shard_size=5)
    assert [result.images for result in results] == [4, 4, 4]
    assert sorted(file.name for file in out.iterdir()) == [f"shard-0000{shard}.parquet" for shard in range(3)]
    table = pq.read_table(out)
    assert table.column_names == ["image", "label", "path"]
    assert sum(result.bytes for result in results) == sum(map(len, table["image"].to_pylist()))
    for row in table.to_pylist():
        assert decode(row["image"], max_pixels=10**6).shape == (24, 32, 3)
        assert row["path"].startswith(row["label"])
        was_jpeg = row["path"].lower().endswith(("jpg", "jpeg"))
        assert row["image"].startswith(b"\xff\xd8" if was_jpeg else b"\x89PNG")
    before, after = build_manifest(DataSettings(uri=str(classes))), build_manifest(DataSettings(uri=str(out)))
    assert after.classes == before.classes
    assert after.paths.equals(before.paths)
    assert before.labels is not None
    assert after.labels is not None
    assert (after.labels == before.labels).all()


def test_the_same_bytes_every_time(classes: Path, tmp_path: Path) -> None:
    _, out = prepared(classes, tmp_path, 24)
    first = (out / "shard-00000.parquet").read_bytes()
    prepared(classes, tmp_path, 24)
    assert (out / "shard-00000.parquet").read_bytes() == first


def test_a_jpeg_that_fits_is_copied(classes: Path, tmp_path: Path) -> None:
    _, out = prepared(classes, tmp_path, 48)
    for row in pq.read_table(out).to_pylist():
        original = (classes / row["path"]).read_bytes()
        if original.startswith(b"\xff\xd8"):
            assert row["image"] == original
        elif original.startswith(b"\x89PNG"):
            assert (decode(row["image"], max_pixels=10**6) == decode(original, max_pixels=10**6)).all()


def test_large_lossless_images_become_jpeg(tmp_path: Path, draw, encode) -> None:
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "x.png").write_bytes(encode(draw(300, 400), "PNG"))
    _, out = prepared(tmp_path / "p", tmp_path, 100)
    (image,) = pq.read_table(out)["image"].to_pylist()
    assert image.startswith(b"\xff\xd8")
    assert np.abs(decode(image, max_pixels=10**6).astype(int) - draw(100, 133)).mean() < 4


def test_rotated_images_are_stored_upright(tmp_path: Path, draw, encode) -> None:
    from PIL import Image

    (tmp_path / "p").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "p" / "x.jpg").write_bytes(encode(draw(30, 40), exif=exif))
    _, out = prepared(tmp_path / "p", tmp_path, 100)
    (image,) = pq.read_table(out)["image"].to_pylist()
    assert decode(image, max_pixels=10**6).shape == (40, 30, 3)


def test_broken_images_are_left_out_and_named(classes: Path, tmp_path: Path) -> None:
    paths = build_manifest(DataSettings(uri=str(classes))).paths.to_pylist()
    whole = (classes / paths[3]).read_bytes()
    (classes / paths[3]).write_bytes(whole[: len(whole) // 2])
    (classes / paths[4]).write_bytes(b"")
    (result,), out = prepared(classes, tmp_path, 48)
    assert result.images == 10
    assert set(result.broken) == {paths[3], paths[4]}
    assert pq.read_table(out)["path"].to_pylist() == [path for path in paths if path not in result.broken]


def test_a_shard_of_broken_images_writes_nothing(classes: Path, tmp_path: Path) -> None:
    for path in classes.glob("*/*"):
        path.write_bytes(b"x")
    (result,), out = prepared(classes, tmp_path, 48)
    assert (result.images, result.bytes, len(result.broken)) == (0, 0, 12)
    assert not out.exists()
