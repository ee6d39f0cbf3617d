"""Everything again on an object store: moto's, which speaks S3 over HTTP."""

from __future__ import annotations

import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raycluster.data.epoch_plan import shard_chunks
from raycluster.data.loader import load_chunk
from raycluster.data.manifest import DataSettings, build_manifest, read_manifest, write_manifest
from raycluster.data.resize import prepare_shard
from raycluster.data.transforms import View
from raycluster.io import storage
from raycluster.types import UserError


def loaded(settings: DataSettings, manifest_uri: str) -> dict[str, bytes]:
    manifest = build_manifest(settings)
    write_manifest(manifest, manifest_uri)
    assert read_manifest(manifest_uri, settings).fingerprint == manifest.fingerprint
    (chunk,) = shard_chunks(manifest.shards)
    (block,) = load_chunk(chunk, manifest_uri, View(size=32), seed=0, settings=settings)
    assert (block.errors == "").all()
    names = ["/".join(path.split("/")[-2:]) for path in manifest.paths.to_pylist()]
    return {name: image.tobytes() for name, image in zip(names, block.images, strict=True)}


def test_objects_are_written_listed_read_and_deleted(bucket: str) -> None:
    names = ["a.bin", "b c.bin", "deep/er/d.bin", "perc%20ent?"]
    for name in names:
        storage.write_bytes(storage.join(bucket, *name.split("/")), name.encode())
    assert storage.list_files(bucket) == [storage.join(bucket, name) for name in ("a.bin", "b c.bin", "perc%20ent?")]
    everything = storage.list_files(bucket, recursive=True)
    assert [storage.read_bytes(uri).decode() for uri in everything] == names
    storage.delete(storage.join(bucket, "deep"))
    assert not storage.exists(storage.join(bucket, "deep", "er", "d.bin"))
    storage.delete(everything[0])
    storage.delete(everything[0])
    assert len(storage.list_files(bucket, recursive=True)) == 2
    large = np.random.default_rng(0).bytes(12 << 20)
    storage.write_bytes(storage.join(bucket, "large"), large)
    assert storage.read_bytes(storage.join(bucket, "large")) == large


def test_what_is_missing_is_named(bucket: str) -> None:
    with pytest.raises(UserError, match=r"cannot read s3://images/gone\?.*check the spelling of bucket and key"):
        storage.read_bytes(storage.join(bucket, "gone"))
    with pytest.raises(UserError, match=r"s3://nowhere.*check the spelling"):
        storage.list_files(bucket.replace("images", "nowhere"))
    with pytest.raises(UserError, match=r"cannot write s3://nowhere/x.*check the spelling of bucket"):
        storage.write_bytes(storage.join(bucket.replace("images", "nowhere"), "x"), b"x")
    with pytest.raises(UserError, match=r"data\.uri = s3://images/gone.*nothing at"):
        build_manifest(DataSettings(uri=storage.join(bucket, "gone")))


def test_images_come_from_the_store_as_from_disk(bucket: str, classes: Path, tmp_path: Path) -> None:
    files = sorted(classes.glob("*/*"))
    names = [str(file.relative_to(classes)) for file in files]
    for file, name in zip(files, names, strict=True):
        storage.write_bytes(storage.join(bucket, "folder", *name.split("/")), file.read_bytes())
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for file, name in zip(files, names, strict=True):
            archive.add(file, name)
    storage.write_bytes(storage.join(bucket, "x.tar"), (tmp_path / "x.tar").read_bytes())
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for file, name in zip(files, names, strict=True):
            archive.write(file, name)
    storage.write_bytes(storage.join(bucket, "x.zip"), (tmp_path / "x.zip").read_bytes())
    pq.write_table(pa.table({"image": [file.read_bytes() for file in files], "path": names}), tmp_path / "x.parquet")
    storage.write_bytes(storage.join(bucket, "tables", "x.parquet"), (tmp_path / "x.parquet").read_bytes())
    storage.write_bytes(storage.join(bucket, "list.txt"), "\n".join(f"folder/{name}" for name in names).encode())

    expected = loaded(DataSettings(uri=str(classes)), str(tmp_path / "manifest.parquet"))
    manifest_uri = storage.join(bucket, "run", "manifest.parquet")
    for place in ("folder", "x.tar", "x.zip", "tables", "tables/*.parquet", "list.txt"):
        assert loaded(DataSettings(uri=storage.join(bucket, place)), manifest_uri) == expected

    uris = "\n".join(storage.join(bucket, "folder", *name.split("/")) for name in names)
    (tmp_path / "far.txt").write_text(uris)
    far = loaded(DataSettings(uri=str(tmp_path / "far.txt")), manifest_uri)
    assert sorted(far.values()) == sorted(expected.values())

    settings = DataSettings(uri=storage.join(bucket, "folder"))
    write_manifest(build_manifest(settings), manifest_uri)
    result = prepare_shard(manifest_uri, 0, storage.join(bucket, "out"), 24, settings=settings)
    assert result.images == 12
    assert build_manifest(DataSettings(uri=storage.join(bucket, "out"))).classes == ["cat", "dog", "eel"]


def test_an_object_that_is_gone_is_a_broken_image(bucket: str, classes: Path) -> None:
    uri = storage.join(bucket, "folder")
    for file in (classes / "cat").iterdir():
        storage.write_bytes(storage.join(uri, file.name), file.read_bytes())
    settings, manifest_uri = DataSettings(uri=uri), storage.join(bucket, "manifest.parquet")
    manifest = build_manifest(settings)
    write_manifest(manifest, manifest_uri)
    storage.delete(storage.join(uri, manifest.paths[1].as_py()))
    (block,) = load_chunk(shard_chunks(manifest.shards)[0], manifest_uri, View(size=32), seed=0, settings=settings)
    assert "is gone" in block.errors[1]
    assert (block.errors != "").tolist() == [False, True, False, False]
