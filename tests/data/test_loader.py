from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raycluster.data import loader, reader
from raycluster.data.epoch_plan import plan_epoch, shard_chunks
from raycluster.data.loader import BLOCK_BYTES, load_chunk
from raycluster.data.manifest import DataSettings, build_manifest, write_manifest
from raycluster.data.transforms import View
from raycluster.types import Chunk, ImageBlock, UserError

CIFAR = Path(__file__).parents[3] / "shared/data/cifar10"
PLAIN = View(size=32)
VARIED = View(size=16, crop_scale=(0.3, 1), flip=0.5, brightness=0.4)


def prepared(uri: object, tmp_path: Path, **options: object) -> tuple[DataSettings, str]:
    settings = DataSettings(uri=str(uri), **options)
    write_manifest(build_manifest(settings), str(tmp_path / "manifest.parquet"))
    return settings, str(tmp_path / "manifest.parquet")


def loaded(chunk: Chunk, uri: str, view: View, settings: DataSettings, seed: int = 0) -> list[ImageBlock]:
    return list(load_chunk(chunk, uri, view, seed=seed, settings=settings))


def joined(blocks: list[ImageBlock]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return tuple(np.concatenate([block[column] for block in blocks]) for column in (2, 3, 4))


def chunk_of(samples: list[int], repeats: list[int] | None = None, epoch: int = 0) -> Chunk:
    return Chunk(3, 40, epoch, np.array(samples, np.int64), np.array(repeats or [0] * len(samples), np.int32))


@pytest.fixture
def everywhere(classes: Path, tmp_path: Path) -> dict[str, Path]:
    """The same 12 images as folder, list, Parquet (two kinds) and tar."""
    import tarfile

    files = sorted(classes.glob("*/*"))
    (tmp_path / "list.txt").write_text("\n".join(f"images/{file.relative_to(classes)}" for file in files))
    with tarfile.open(tmp_path / "images.tar", "w") as archive:
        for file in files:
            archive.add(file, str(file.relative_to(classes)))
    names = [str(file.relative_to(classes)) for file in files]
    images = [file.read_bytes() for file in files]
    pq.write_table(pa.table({"image": images, "path": names}), tmp_path / "flat.parquet", row_group_size=5)
    nested = [{"bytes": image, "path": name} for image, name in zip(images, names, strict=True)]
    pq.write_table(pa.table({"image": nested}), tmp_path / "nested.parquet", row_group_size=5)
    places = ("list.txt", "images.tar", "flat.parquet", "nested.parquet")
    return {"folder": classes} | {name: tmp_path / name for name in places}


def test_the_same_images_come_from_everywhere(everywhere: dict[str, Path], tmp_path: Path) -> None:
    seen = {}
    for place, uri in everywhere.items():
        settings, manifest_uri = prepared(uri, tmp_path)
        paths = [
            path.removeprefix("images/").removeprefix("images.tar/")
            for path in build_manifest(settings).paths.to_pylist()
        ]
        samples, images, errors = joined(loaded(chunk_of(list(range(12))), manifest_uri, PLAIN, settings))
        assert (errors == "").all()
        seen[place] = {paths[sample]: image.tobytes() for sample, image in zip(samples, images, strict=True)}
    assert len(seen["folder"]) == 12
    assert all(images == seen["folder"] for images in seen.values())


@pytest.mark.parametrize(
    ("microbatch", "sizes"), [(1, [5, 5, 2]), (4, [4, 4, 4]), (3, [2, 3, 3, 3, 1]), (8, [8, 4]), (7, [2, 7, 3])]
)
def test_blocks_end_where_microbatches_of_the_stream_do(
    everywhere: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, microbatch: int, sizes: list[int]
) -> None:
    """A block may have five images; the chunk begins at row 40 of its stream."""
    settings, uri = prepared(everywhere["folder"], tmp_path)
    chunk = chunk_of(list(range(12)))
    whole = joined(loaded(chunk, uri, PLAIN, settings))
    monkeypatch.setattr(loader, "BLOCK_BYTES", 3 * 32 * 32 * 5)
    blocks = list(load_chunk(chunk, uri, PLAIN, seed=0, settings=settings, microbatch=microbatch))
    assert [len(block.samples) for block in blocks] == sizes
    assert [block.start for block in blocks] == [40 + sum(sizes[:number]) for number in range(len(sizes))]
    assert all(np.array_equal(one, other) for one, other in zip(joined(blocks), whole, strict=True))


def test_pixels_of_a_visit_are_the_same_in_any_chunk(everywhere: dict[str, Path], tmp_path: Path) -> None:
    for uri in everywhere.values():
        settings, manifest_uri = prepared(uri, tmp_path, shard_size=5)
        alone = {
            (sample, repeat): joined(loaded(chunk_of([sample], [repeat], 2), manifest_uri, VARIED, settings))[1][0]
            for sample in range(12)
            for repeat in range(2)
        }
        visits = [*alone, (4, 1), (4, 0)]
        order = np.random.default_rng(0).permutation(len(visits))
        chunk = chunk_of(*(list(column) for column in zip(*(visits[index] for index in order), strict=True)), 2)
        samples, images, _ = joined(loaded(chunk, manifest_uri, VARIED, settings))
        for sample, repeat, image in zip(samples.tolist(), chunk.repeats.tolist(), images, strict=True):
            assert (image == alone[sample, repeat]).all()
        assert (alone[4, 0] != alone[4, 1]).any()
        other = joined(loaded(chunk, manifest_uri, VARIED, settings, seed=1))[1]
        assert (other != images).any()


def test_a_fixed_crop_depends_on_the_image_alone(everywhere: dict[str, Path], tmp_path: Path) -> None:
    settings, uri = prepared(everywhere["folder"], tmp_path)
    view = View(size=16, crop_scale=(0.1, 0.5), fixed_crop=True)
    first, again = (joined(loaded(chunk_of([3, 5], [0, epoch], epoch), uri, view, settings))[1] for epoch in (0, 4))
    assert (first == again).all()
    assert (joined(loaded(chunk_of([3, 5]), uri, view, settings, seed=1))[1] != first).any()


def test_blocks_follow_the_chunk_and_stay_small(tmp_path: Path) -> None:
    settings, uri = prepared("digits", tmp_path)
    view = View(size=224)
    samples = list(range(900, 860, -1))
    blocks = loaded(chunk_of(samples), uri, view, settings)
    assert len(blocks) > 1
    assert all(block.images.nbytes <= BLOCK_BYTES and block.images.shape[1:] == (224, 224, 3) for block in blocks)
    assert [block.start for block in blocks] == [40, 40 + len(blocks[0].samples)]
    assert {block.stream for block in blocks} == {3}
    assert np.concatenate([block.samples for block in blocks]).tolist() == samples


def test_digits_look_like_digits(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    settings, uri = prepared("digits", tmp_path)
    images = joined(loaded(chunk_of([5, 17]), uri, View(size=8), settings))[1]
    assert np.abs(images[..., 0] / 255 * 16 - load_digits().images[[5, 17]]).max() < 0.04


def test_broken_and_missing_images_are_black_and_named(classes: Path, tmp_path: Path) -> None:
    settings, uri = prepared(classes, tmp_path)
    paths = build_manifest(settings).paths.to_pylist()
    whole = (classes / paths[1]).read_bytes()
    (classes / paths[0]).write_bytes(b"")
    (classes / paths[1]).write_bytes(whole[: len(whole) // 2])
    (classes / paths[2]).unlink()
    (classes / paths[3]).write_bytes(b"<html>not found</html>")
    _, images, errors = joined(loaded(chunk_of(list(range(12))), uri, PLAIN, settings))
    for index, says in enumerate(("empty", "", f"{paths[2]} is gone", "only JPEG, PNG and WebP can be read")):
        assert errors[index]
        assert says in errors[index]
        assert not images[index].any()
    assert (errors[4:] == "").all()
    assert images[4:].any((1, 2, 3)).all()
    huge = DataSettings(uri=settings.uri, max_image_pixels=10)
    assert all("max_image_pixels = 10" in error for error in joined(loaded(chunk_of([5, 6]), uri, PLAIN, huge))[2])


@pytest.mark.parametrize("place", ["images.tar", "flat.parquet"])
def test_a_container_that_is_gone_costs_its_images(place: str, everywhere: dict[str, Path], tmp_path: Path) -> None:
    settings, uri = prepared(everywhere[place], tmp_path)
    os.unlink(everywhere[place])
    _, images, errors = joined(loaded(chunk_of([0, 5]), uri, PLAIN, settings))
    assert all(place in error and "is gone" in error for error in errors)
    assert not images.any()


def test_an_empty_row_is_a_broken_image(tmp_path: Path, draw, encode) -> None:
    pq.write_table(pa.table({"image": pa.array([None, encode(draw())], pa.binary())}), tmp_path / "x.parquet")
    settings, uri = prepared(tmp_path / "x.parquet", tmp_path)
    assert joined(loaded(chunk_of([0, 1]), uri, PLAIN, settings))[2].tolist() == ["the row is empty", ""]


def test_parquet_that_was_changed_is_noticed(everywhere: dict[str, Path], tmp_path: Path) -> None:
    settings, uri = prepared(everywhere["flat.parquet"], tmp_path)
    pq.write_table(pa.table({"image": [b"1"]}), everywhere["flat.parquet"])
    with pytest.raises(UserError, match="it was changed; delete the manifest"):
        loaded(chunk_of([0, 11]), uri, PLAIN, settings)


def test_an_outage_is_raised_after_some_attempts(
    classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, uri = prepared(classes, tmp_path)

    def refused(_: str) -> bytes:
        raise UserError("cannot read: connection lost")

    monkeypatch.setattr(reader.storage, "read_bytes", refused)
    with pytest.raises(UserError, match="connection lost"):
        loaded(chunk_of([0]), uri, PLAIN, settings)


def test_a_row_group_is_read_once_and_only_as_far_as_needed(tmp_path: Path, monkeypatch, draw, encode) -> None:
    images = [encode(draw(seed=seed)) for seed in range(4)] * 200
    pq.write_table(pa.table({"image": images}), tmp_path / "x.parquet", row_group_size=400)
    settings, uri = prepared(tmp_path / "x.parquet", tmp_path, shard_size=400)
    groups = []
    group_rows = reader._group_rows
    monkeypatch.setattr(reader, "_group_rows", lambda *args: groups.append(args[1]) or group_rows(*args))
    (chunk,) = plan_epoch(
        np.ones(800, int), [(0, 400), (400, 800)], streams=1, microbatch=8, seed=0, epoch=0, window_shards=2
    )
    assert (joined(loaded(chunk, uri, PLAIN, settings))[2] == "").all()
    assert sorted(groups) == [0, 1]


def test_all_shards_together_are_the_data_set(classes: Path, tmp_path: Path) -> None:
    settings, uri = prepared(classes, tmp_path, shard_size=5)
    manifest = build_manifest(settings)
    samples = [
        sample
        for chunk in shard_chunks(manifest.shards)
        for block in loaded(chunk, uri, PLAIN, settings)
        for sample in block.samples.tolist()
    ]
    assert samples == list(range(12))


def test_names_with_odd_characters_are_found(classes: Path, tmp_path: Path) -> None:
    odd = tmp_path / "odd ? #%20 folder"
    odd.mkdir()
    shutil.copy(classes / "cat" / "cat-0.jpg", odd / "a b%41?.jpg")
    for uri in (str(odd), odd.as_uri()):
        settings, manifest_uri = prepared(uri, tmp_path)
        assert joined(loaded(chunk_of([0]), manifest_uri, PLAIN, settings))[2].tolist() == [""]


@pytest.mark.skipif(not CIFAR.is_dir(), reason="CIFAR-10 is not here")
def test_cifar(tmp_path: Path) -> None:
    settings, uri = prepared(CIFAR / "test-*.parquet", tmp_path)
    samples, images, errors = joined(loaded(chunk_of(list(range(4000, 6000))), uri, PLAIN, settings))
    assert (errors == "").all()
    assert 110 < images.mean() < 130
    assert samples[-1] == 5999
