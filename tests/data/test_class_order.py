"""Sources that list their images class by class are found out and mixed; all others stay as they are."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raycluster.data.class_order import MAX_WINDOW_SHARDS, is_ordered, spread, window_shards
from raycluster.data.dataset import ImageDataset, ensure_manifest
from raycluster.data.epoch_plan import plan_epoch
from raycluster.data.manifest import DataSettings, Manifest, build_manifest, read_manifest, write_manifest
from raycluster.data.sources.base import even_shards

CIFAR = Path(__file__).parents[3] / "shared/data/cifar10"


def labels_of(num_classes: int, per_class: int) -> np.ndarray:
    return np.repeat(np.arange(num_classes), per_class)


def parquet_of(file: Path, labels: np.ndarray, **columns: object) -> str:
    pq.write_table(pa.table({"image": [b"x"] * len(labels), "label": labels, **columns}), file, row_group_size=100)
    return str(file)


def manifest_of(uri: object, **options: object) -> Manifest:
    return build_manifest(DataSettings(uri=str(uri), **{"shard_size": 100, **options}))


@pytest.mark.parametrize("num_classes", [2, 10, 1000])
@pytest.mark.parametrize("shard_size", [3, 100, 1000])
def test_sorted_labels_are_ordered_and_shuffled_ones_are_not(num_classes: int, shard_size: int) -> None:
    labels = labels_of(num_classes, 20_000 // num_classes)
    shards = even_shards(len(labels), shard_size)
    assert is_ordered(labels, shards)
    for seed in range(5):
        assert not is_ordered(np.random.default_rng(seed).permutation(labels), shards)


@pytest.mark.parametrize(
    "labels", [np.full(1000, -1), np.zeros(1000, int), np.arange(1000), np.repeat([0, 1], [999, 1])]
)
def test_what_cannot_be_known_is_not_ordered(labels: np.ndarray) -> None:
    assert window_shards(labels, even_shards(1000, 100)) == 1


def test_two_classes_one_after_the_other_are_ordered_by_hand() -> None:
    """Shards of 4 hold 1 class each, where a random order would show 2 * (1 - 1/16) = 1.9: less than 70%."""
    assert is_ordered(np.repeat([0, 1], 40), even_shards(80, 4))
    assert not is_ordered(np.tile([0, 1], 40), even_shards(80, 4))


@pytest.mark.parametrize(("num_classes", "per_class"), [(2, 1000), (10, 5000), (100, 200), (1000, 50)])
def test_a_batch_norm_group_of_a_window_sees_a_fair_share_of_the_classes(num_classes: int, per_class: int) -> None:
    labels = labels_of(num_classes, per_class)
    shards = even_shards(len(labels), 500)
    width = window_shards(labels, shards)
    assert 1 < width <= min(MAX_WINDOW_SHARDS, len(shards))

    def classes_per_group(labels: np.ndarray, width: int) -> float:
        chunks = plan_epoch(
            np.ones(len(labels), np.int64), shards, streams=1, microbatch=250, seed=0, epoch=0, window_shards=width
        )
        rows = np.concatenate([chunk.samples for chunk in chunks])
        groups = rows[: len(rows) // 250 * 250].reshape(-1, 250)
        return float(np.mean([len(np.unique(labels[group])) for group in groups]))

    fair = classes_per_group(np.random.default_rng(0).permutation(labels), 1)
    assert classes_per_group(labels, 1) < 0.6 * fair
    assert classes_per_group(labels, width) > 0.75 * fair


def test_the_window_is_bounded() -> None:
    labels = labels_of(1000, 1000)
    assert window_shards(labels, even_shards(len(labels), 1000)) == MAX_WINDOW_SHARDS


def test_an_ordered_parquet_file_is_mixed_and_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = DataSettings(uri=parquet_of(tmp_path / "x.parquet", labels_of(10, 200)), shard_size=100)
    uri = str(tmp_path / "manifest.parquet")
    ensure_manifest(uri, settings)
    dataset = ImageDataset(read_manifest(uri, settings), uri, settings, 0)
    assert dataset.window_shards > 1
    (line,) = [record.getMessage() for record in caplog.records]
    assert f"class by class: epochs shuffle windows of {dataset.window_shards} of 20 shards" in line
    for chosen in (1, 3):
        other = DataSettings(uri=settings.uri, shard_size=100, shuffle_window_shards=chosen)
        assert ImageDataset(dataset.manifest, uri, other, 0).window_shards == chosen


def test_without_labels_folders_tell_the_classes(tmp_path: Path) -> None:
    labels = labels_of(10, 200)
    paths = [f"n{label:03d}/{index}.jpg" for index, label in enumerate(labels)]
    uri = parquet_of(tmp_path / "x.parquet", labels, path=paths)
    assert manifest_of(uri, labels="none").window_shards == manifest_of(uri).window_shards > 1
    assert manifest_of(parquet_of(tmp_path / "y.parquet", labels), labels="none").window_shards == 1
    numbered = [f"{index // 100:05d}/{index}.jpg" for index in range(len(labels))]
    uri = parquet_of(tmp_path / "z.parquet", np.tile(np.arange(10), 200), path=numbered)
    assert manifest_of(uri, labels="none").window_shards == 1, "such folders number the parts of a download"


def test_an_ordered_tar_file_is_mixed(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for index, label in enumerate(labels_of(5, 100)):
            for name, content in ((f"{index}.jpg", b"x"), (f"{index}.cls", b"%d" % label)):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    assert manifest_of(tmp_path / "x.tar", shard_size=20).window_shards > 1
    assert manifest_of(tmp_path / "x.tar", shard_size=1000).window_shards == 1


def test_mixed_sources_keep_their_window(classes: Path) -> None:
    assert manifest_of(classes, shard_size=2).window_shards == 1
    assert manifest_of("digits", shard_size=10).window_shards == 1


@pytest.mark.skipif(not CIFAR.is_dir(), reason="CIFAR-10 is not here")
def test_cifar_is_mixed() -> None:
    manifest = manifest_of(CIFAR / "test-*.parquet", shard_size=1000)
    assert manifest.window_shards == 1
    assert manifest.fingerprint == "bfbb6d2b043c877f"


def test_evaluation_takes_the_first_samples_of_mixed_sources(tmp_path: Path) -> None:
    uri = parquet_of(tmp_path / "x.parquet", np.tile(np.arange(10), 200))
    manifest = manifest_of(uri)
    assert manifest.evaluation_samples(250).tolist() == list(range(250))
    assert manifest.evaluation_samples(9999).tolist() == list(range(2000))
    assert manifest.shards_of(manifest.evaluation_samples(250)) == [0, 1, 2]


def test_evaluation_takes_spread_shards_of_ordered_sources(tmp_path: Path) -> None:
    manifest = manifest_of(parquet_of(tmp_path / "x.parquet", labels_of(10, 200)))
    samples = manifest.evaluation_samples(950)
    assert len(set(samples.tolist())) == 950
    assert (np.diff(samples) > 0).all()
    assert manifest.labels is not None
    assert len(np.unique(manifest.labels[samples])) == 10
    assert len(manifest.shards_of(samples)) == 10
    assert manifest.evaluation_samples(2000).tolist() == list(range(2000))


def test_the_window_survives_writing(tmp_path: Path) -> None:
    manifest = manifest_of(parquet_of(tmp_path / "x.parquet", labels_of(10, 200)))
    write_manifest(manifest, str(tmp_path / "manifest.parquet"))
    assert read_manifest(str(tmp_path / "manifest.parquet")).window_shards == manifest.window_shards > 1


@pytest.mark.parametrize(("total", "count", "chosen"), [(10, 2, [2, 7]), (3, 5, [0, 1, 2]), (5, 1, [2])])
def test_spread(total: int, count: int, chosen: list[int]) -> None:
    assert spread(total, count) == chosen
