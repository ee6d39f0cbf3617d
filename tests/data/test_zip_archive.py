"""Zip archives of images, as YFCC100M has them, intact and damaged."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from raycluster.data.loader import load_chunk
from raycluster.data.manifest import DataSettings, Manifest, build_manifest, write_manifest
from raycluster.data.transforms import View
from raycluster.run.local_workers import LocalWorkers
from raycluster.run.loop import pretrain
from raycluster.types import Chunk, ImageBlock, UserError
from tests.damage import damages

View8 = View(size=8)


def zip_of(file: Path, members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    file.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file


def built(uri: object, **options: object) -> Manifest:
    return build_manifest(DataSettings(uri=str(uri), **options))


def loaded(uri: object, folder: Path) -> tuple[list[str], ImageBlock]:
    """(names, all images read in random order), both in the order of the names."""
    settings, manifest_uri = DataSettings(uri=str(uri)), str(folder / "manifest.parquet")
    manifest = build_manifest(settings)
    write_manifest(manifest, manifest_uri)
    names = manifest.paths.to_pylist()
    samples = np.random.default_rng(0).permutation(len(names))
    chunk = Chunk(0, 0, 0, samples, np.zeros(len(samples), np.int32))
    (block,) = load_chunk(chunk, manifest_uri, View8, seed=0, settings=settings)
    order = np.argsort([names[sample] for sample in samples])
    return sorted(names), block._replace(images=block.images[order], errors=block.errors[order])


@pytest.fixture
def photos(draw: Callable, encode: Callable) -> dict[str, bytes]:
    kinds = [("JPEG", "jpg"), ("PNG", "PNG"), ("WEBP", "webp")]
    return {f"{i:02d}.{kinds[i % 3][1]}": encode(draw(seed=i), kinds[i % 3][0]) for i in range(9)}


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_members_are_the_images_of_a_folder(photos: dict[str, bytes], tmp_path: Path, method: int) -> None:
    (tmp_path / "folder").mkdir()
    for name, content in photos.items():
        (tmp_path / "folder" / name).write_bytes(content)
    zip_of(tmp_path / "a.zip", photos, method)
    names, block = loaded(tmp_path / "a.zip", tmp_path)
    expected_names, expected = loaded(tmp_path / "folder", tmp_path)
    assert names == [f"a.zip/{name}" for name in expected_names] and (block.errors == "").all()
    assert np.array_equal(block.images, expected.images)


def test_a_shard_is_an_archive_and_the_order_that_of_files_and_members(
    photos: dict[str, bytes], tmp_path: Path
) -> None:
    for number in (1, 0):
        zip_of(tmp_path / "d" / f"{number}.zip", dict(list(photos.items())[number * 4 : number * 4 + 4]))
    (tmp_path / "d" / "README.md").write_text("not read")
    manifest = built(tmp_path / "d" / "*.zip", shard_size=4)
    assert manifest.shards == [(0, 4), (4, 8)]
    assert manifest.paths.to_pylist()[3:5] == ["0.zip/03.jpg", "1.zip/04.PNG"]
    assert built(tmp_path / "d").fingerprint == built(tmp_path / "d").fingerprint


def test_what_else_lies_in_an_archive_is_passed_over(photos: dict[str, bytes], tmp_path: Path) -> None:
    members = {f"dogs/{name}": content for name, content in photos.items()}
    extra = {"dogs/": b"", "dogs/.x.jpg": b"", "__MACOSX/dogs/._00.jpg": b"", "notes.txt": b"", "cats/a.tiff": b""}
    zip_of(tmp_path / "a.zip", members | extra | {"cats/b.jpg": photos["00.jpg"]})
    with zipfile.ZipFile(tmp_path / "a.zip", "a", zipfile.ZIP_LZMA) as archive:
        archive.writestr("cats/c.jpg", photos["00.jpg"])
    manifest = built(tmp_path / "a.zip")
    assert manifest.num_samples == 10 and manifest.classes == ["cats", "dogs"]
    assert manifest.unread_files == {
        ".tiff in zip files": (1, "a.zip/cats/a.tiff"),
        "zip member of compression method 14": (1, "a.zip/cats/c.jpg"),
    }


def test_a_streamed_archive_is_read(photos: dict[str, bytes], tmp_path: Path) -> None:
    """Its checksums follow the data, because the program that wrote it could not seek."""

    class Stream:
        def __init__(self, file: Path) -> None:
            self.file = file.open("wb")
            self.write, self.flush = self.file.write, self.file.flush

    stream = Stream(tmp_path / "a.zip")
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:  # type: ignore[call-overload]
        for name, content in photos.items():
            archive.writestr(name, content)
    stream.file.close()
    assert zipfile.ZipFile(tmp_path / "a.zip").infolist()[0].flag_bits & 8
    _, block = loaded(tmp_path / "a.zip", tmp_path)
    assert (block.errors == "").all()
    content = (tmp_path / "a.zip").read_bytes()
    place = content.index(b"PK\x07\x08") + 4
    (tmp_path / "a.zip").write_bytes(content[:place] + b"\0\0\0\0" + content[place + 4 :])
    _, block = loaded(tmp_path / "a.zip", tmp_path)
    assert [("checksum" in error) for error in block.errors] == [True] + [False] * 8


def test_broken_members_are_named_and_the_others_read(photos: dict[str, bytes], tmp_path: Path) -> None:
    file = zip_of(tmp_path / "a.zip", photos, zipfile.ZIP_DEFLATED)
    places = [(info.header_offset, info.compress_size) for info in zipfile.ZipFile(file).infolist()]
    content = bytearray(file.read_bytes())
    content[places[0][0]] ^= 255  # the signature of the header
    content[places[1][0] + 6] |= 1  # the flag of an encrypted member
    content[places[2][0] + 14] ^= 1  # the checksum
    content[places[3][0] + 50 : places[3][0] + 90] = b"\xff" * 40
    content[places[4][0] + 8] = 12  # the compression method
    file.write_bytes(content)
    _, block = loaded(file, tmp_path)
    said = ["no member begins there", "encrypted", "checksum", "damaged", "compression method is 12"]
    for error, words in zip(block.errors, [*said, "", "", "", ""], strict=True):
        assert (words in error) if words else error == ""
    assert "a.zip" in block.errors[0]


def test_a_member_of_gigabytes_is_broken(photos: dict[str, bytes], tmp_path: Path, monkeypatch) -> None:
    from raycluster.data import reader

    monkeypatch.setattr(reader, "_MAX_IMAGE_BYTES", 100_000)
    file = zip_of(tmp_path / "a.zip", {"bomb.png": bytes(10_000_000), **photos}, zipfile.ZIP_DEFLATED)
    names, block = loaded(file, tmp_path)
    assert [name for name, error in zip(names, block.errors, strict=True) if error] == ["a.zip/bomb.png"]
    assert "more than 100000 bytes" in block.errors[names.index("a.zip/bomb.png")]


def test_long_extra_fields_are_skipped(photos: dict[str, bytes], tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name, content in photos.items():
            info = zipfile.ZipInfo(name)
            info.extra = b"\xfe\xca" + (2000).to_bytes(2, "little") + bytes(2000)
            archive.writestr(info, content)
    _, block = loaded(tmp_path / "a.zip", tmp_path)
    assert (block.errors == "").all()


def test_an_incomplete_archive_is_refused(photos: dict[str, bytes], tmp_path: Path) -> None:
    content = zip_of(tmp_path / "a.zip", photos).read_bytes()
    for short in (content[:-30], content[: len(content) // 2], content[:10], b""):
        (tmp_path / "a.zip").write_bytes(short)
        with pytest.raises(UserError, match=r"a\.zip is no complete zip file: .*write or copy it again"):
            built(tmp_path / "a.zip")


def test_any_damage_is_refused_or_costs_images(photos: dict[str, bytes], tmp_path: Path) -> None:
    content = zip_of(tmp_path / "a.zip", photos, zipfile.ZIP_DEFLATED).read_bytes()
    for data in damages(content[-900:], 60):
        (tmp_path / "a.zip").write_bytes(content[:-900] + data)
        try:
            loaded(tmp_path / "a.zip", tmp_path)
        except UserError as error:
            assert "a.zip" in str(error)


def test_archives_without_images_or_beside_images_are_refused(photos: dict[str, bytes], tmp_path: Path) -> None:
    zip_of(tmp_path / "d" / "a.zip", {"notes.txt": b""})
    with pytest.raises(UserError, match=r"a\.zip .* hold no \.jpg"):
        built(tmp_path / "d")
    (tmp_path / "d" / "b.png").write_bytes(photos["01.PNG"])
    with pytest.raises(UserError, match="holds zip files and images; give a folder, or a pattern"):
        built(tmp_path / "d")


def test_a_run_skips_and_records_broken_members(tiny: Callable, digits_folder: Path, tmp_path: Path) -> None:
    members = {file.name: file.read_bytes() for file in sorted(digits_folder.iterdir())}
    members["007.png"] = b"no image"
    file = zip_of(tmp_path / "d" / "a.zip", members)
    content = bytearray(file.read_bytes())
    content[zipfile.ZipFile(file).infolist()[9].header_offset + 14] ^= 1
    file.write_bytes(content)
    list(pretrain(tiny(tmp_path / "run", f"data.uri={tmp_path / 'd'}", "training.epochs=1"), LocalWorkers()))
    lines = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert [line["path"] for line in lines] == ["a.zip/007.png", "a.zip/009.png"]
