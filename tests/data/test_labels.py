from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raycluster.data.labels import encode_labels, folder_labels
from raycluster.data.manifest import DataSettings, Manifest, build_manifest
from raycluster.types import UserError


def built(uri: object, **options: object) -> Manifest:
    return build_manifest(DataSettings(uri=str(uri), **options))


@pytest.mark.parametrize(
    ("folders", "classes"),
    [
        (["cat", "dog"], ["cat", "dog"]),
        (["cat/images", "dog/images"], ["cat", "dog"]),
        (["data/cat/images", "data/dog/images"], ["cat", "dog"]),
        (["cat/images", "cat/masks", "dog/images", "dog/masks", "eel/images"], ["cat", "cat", "dog", "dog", "eel"]),
        (["train/cat", "train/dog", "test/cat", "test/dog"], ["cat", "dog", "cat", "dog"]),
        (["a/abbey", "a/alley", "b/bank"], ["abbey", "alley", "bank"]),
        (["plants/rose", "plants/oak", "birds/owl"], ["rose", "oak", "owl"]),
        (["/data/cat", "/data/dog"], ["cat", "dog"]),
        (["cat", "dog", ""], [None, None, None]),
        (["images", "images"], [None, None]),
        (["", ""], [None, None]),
    ],
)
def test_the_level_of_the_path_that_names_classes(folders: list[str], classes: list[str | None]) -> None:
    assert folder_labels(folders, strict=True).to_pylist() == classes


def test_some_images_may_lie_outside_of_class_folders_if_folders_are_demanded() -> None:
    assert folder_labels(["cat", "dog", ""], strict=False).to_pylist() == ["cat", "dog", None]


@pytest.mark.parametrize("labels", ["auto", "folder"])
def test_classes_above_a_folder_of_images(labels: str, classes: Path, tmp_path: Path) -> None:
    for name in ("cat", "dog", "eel"):
        shutil.copytree(classes / name, tmp_path / "nested" / name / "images")
    manifest = built(tmp_path / "nested", labels=labels)
    assert manifest.classes == ["cat", "dog", "eel"]
    assert manifest.labels is not None
    assert np.bincount(manifest.labels).tolist() == [4, 4, 4]


def test_a_single_class_is_not_silent(classes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(classes / "cat", tmp_path / "flat" / "images")
    with pytest.raises(UserError, match=r"data\.labels = folder finds a single class 'images' in .*data\.labels=none"):
        built(tmp_path / "flat", labels="folder")
    assert built(tmp_path / "flat").labels is None
    assert not caplog.records
    pq.write_table(pa.table({"image": [b"1", b"2"], "label": ["cat", "cat"]}), tmp_path / "x.parquet")
    assert built(tmp_path / "x.parquet").classes == ["cat"]
    assert "data.labels = auto finds a single class 'cat'" in caplog.text


@pytest.mark.parametrize("labels", ["foo", "label", "folder"])
def test_digits_have_no_columns(labels: str) -> None:
    with pytest.raises(UserError, match=f"data.labels = {labels}, but digits has neither columns nor folders"):
        built("digits", labels=labels)
    assert built("digits", labels="none").labels is None


def test_a_list_has_no_columns(classes: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text(str(classes / "cat" / "cat-0.jpg"))
    with pytest.raises(UserError, match=r"data\.labels = foo, but .* has no columns"):
        built(tmp_path / "list.txt", labels="foo")


def test_long_numbers_are_sorted_as_text() -> None:
    labels, classes = encode_labels(pa.array(["10", "9" * 5000, "9", "x"]))
    assert classes == ["9", "10", "9" * 5000, "x"]
    assert labels.tolist() == [1, 2, 0, 3]
