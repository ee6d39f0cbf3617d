"""The linear SVM, folds to learn from, and the files of STL-10."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.datasets import load_digits

from raycluster.data.dataset import open_dataset
from raycluster.data.folds import read_folds
from raycluster.data.manifest import DataSettings, Manifest, build_manifest
from raycluster.data.transforms import View
from raycluster.evaluation.base import declared_metrics
from raycluster.evaluation.probes import svm
from raycluster.evaluation.runner import Evaluation, EvaluationSettings, Labelled, run_folds
from raycluster.models.smallnet import Model
from raycluster.run.local_workers import LocalWorkers
from raycluster.types import UserError


def test_a_line_separates_two_classes() -> None:
    """Negative values count as zero, as after a ReLU: rows that differ in these only cannot be told apart."""
    x = np.array([[0, 3], [0, 4], [0, 5], [3, 0], [4, 0], [5, 0]], np.float32)
    y = np.array([0, 0, 0, 1, 1, 1])
    found = svm.evaluate(x, y, np.array([[0.5, 5], [6, 1]], np.float32), np.array([0, 1]))
    assert found["svm_accuracy"] == 1 and found["svm_c"] in (0.1, 1, 10, 100)
    assert svm.evaluate(np.minimum(x - 10, 0), y, x - 10, y)["svm_accuracy"] == 0.5


def test_c_depends_on_the_training_rows_alone() -> None:
    digits = load_digits()
    train, test = slice(0, 150), slice(300, 900)
    found = svm.evaluate(digits.data[train], digits.target[train], digits.data[test], digits.target[test])
    other = svm.evaluate(digits.data[train], digits.target[train], digits.data[test], digits.target[test] * 0)
    assert found["svm_accuracy"] > 0.6 and found["svm_c"] == other["svm_c"]


def test_rare_classes_and_single_classes() -> None:
    x = np.eye(4, dtype=np.float32)
    assert svm.evaluate(x, np.array([0, 0, 0, 1]), x, np.array([0, 0, 0, 1]))["svm_c"] == 1.0
    with pytest.raises(UserError, match="all 4 rows to learn from are of class 2"):
        svm.evaluate(x, np.full(4, 2), x, np.full(4, 2))


def test_means_and_deviations_over_folds_by_hand() -> None:
    """Neighbours learned from images 10 and 11, then from 12 and 13: right for both test rows, then for one."""
    train = Labelled(
        np.array([[1, 0], [0, 1], [1, 0], [1, 0.1]], np.float32), np.array([0, 1, 0, 0]), np.arange(10, 14)
    )
    test = Labelled(np.array([[1, 0.2], [0.2, 1]], np.float32), np.array([0, 1]), np.arange(2))
    found = run_folds(train, test, ["knn"], [np.array([10, 11]), np.array([12, 13])])
    assert found == pytest.approx({"knn_accuracy": 0.75, "knn_accuracy_deviation": 0.5 / 2**0.5})
    assert set(found) < set(declared_metrics()) and declared_metrics()["knn_accuracy_deviation"].percent


def parquet(path: Path, folds: pa.Array, name: str = "folds") -> Manifest:
    images = [b"x"] * len(folds)
    pq.write_table(pa.table({"image": images, "label": [0, 1] * (len(folds) // 2), name: folds}), path)
    return build_manifest(DataSettings(uri=str(path)))


def test_folds_of_a_column(tmp_path: Path) -> None:
    lists = parquet(tmp_path / "lists.parquet", pa.array([[0, 1], [1], None, [0], [1], []]))
    assert [fold.tolist() for fold in read_folds("folds", lists)] == [[0, 3], [0, 1, 4]]
    numbers = parquet(tmp_path / "numbers.parquet", pa.array([2, 5, 2, None, 5, 2]), "fold")
    assert [fold.tolist() for fold in read_folds("fold", numbers)] == [[0, 2, 5], [1, 4]]
    with pytest.raises(UserError, match=r"seen folds; wanted a column of .* fold \(int64\)"):
        read_folds("folds", numbers)
    with pytest.raises(UserError, match="has 1 folds; wanted at least two"):
        read_folds("fold", parquet(tmp_path / "one.parquet", pa.array([0, 0]), "fold"))


def stl10(folder: Path, name: str, count: int, seed: int) -> np.ndarray:
    """Files as they are distributed; the images (n, 96, 96, 3)."""
    images = np.random.default_rng(seed).integers(0, 256, (count, 96, 96, 3), np.uint8)
    images[:, 20:70, 20:70] //= np.where(np.arange(count) % 2, 8, 1).astype(np.uint8)[:, None, None, None]
    (folder / f"{name}_X.bin").write_bytes(images.transpose(0, 3, 2, 1).tobytes())
    (folder / f"{name}_y.bin").write_bytes(bytes((1 + np.arange(count) % 2).tolist()))
    (folder / "class_names.txt").write_text("airplane\nbird\n")
    return images


def test_stl10_is_evaluated_on_its_folds(tmp_path: Path) -> None:
    images = stl10(tmp_path, "train", 24, 0)
    stl10(tmp_path, "test", 10, 1)
    (tmp_path / "fold_indices.txt").write_text(" ".join(map(str, range(12))) + " \n" + " ".join(map(str, range(8, 24))))
    settings = EvaluationSettings(
        test_uri=str(tmp_path / "test_X.bin"), folds=str(tmp_path / "fold_indices.txt"), probes=("svm", "knn")
    )
    data = DataSettings(uri=str(tmp_path / "train_X.bin"))
    dataset = open_dataset(data, str(tmp_path / "manifest.parquet"), LocalWorkers(), 0)
    assert dataset.manifest.classes == ["airplane", "bird"] and dataset.path(3) == "train_X.bin:3"
    (chunk,) = dataset.locate([_whole(24)])
    assert np.array_equal(np.concatenate([b.images for b in dataset.loader(View(size=96))(chunk)]), images)
    evaluation = Evaluation(settings, View(size=32), str(tmp_path), LocalWorkers())
    evaluation.check(dataset)
    found = evaluation.compare({"untrained": Model(widths=(4, 8)).build(0)}, dataset)["untrained"]
    assert found["svm_accuracy"] == 1 and found["svm_accuracy_deviation"] == 0
    assert {"knn_accuracy", "knn_accuracy_deviation", "svm_c", "svm_c_deviation"} < found.keys()


def _whole(count: int):
    from raycluster.data.epoch_plan import shard_chunks

    return shard_chunks([(0, count)])[0]


def test_stl10_without_labels(tmp_path: Path) -> None:
    stl10(tmp_path, "unlabeled", 4, 0)
    (tmp_path / "unlabeled_y.bin").unlink()
    manifest = build_manifest(DataSettings(uri=str(tmp_path / "unlabeled_X.bin"), shard_size=3))
    assert manifest.labels is None and manifest.shards == [(0, 2), (2, 4)]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("0 1\n2 24", r"line 2 of .* names the images 2 to 24, but .* holds 24"),
        ("0 1\nfour", "should hold whole numbers"),
        ("0 1 2", "has 1 folds"),
    ],
)
def test_folds_that_do_not_fit_are_refused(tmp_path: Path, text: str, says: str) -> None:
    stl10(tmp_path, "train", 24, 0)
    (tmp_path / "folds.txt").write_text(text)
    with pytest.raises(UserError, match=says):
        read_folds(str(tmp_path / "folds.txt"), build_manifest(DataSettings(uri=str(tmp_path / "train_X.bin"))))


def test_files_that_are_not_stl10_are_refused(tmp_path: Path) -> None:
    stl10(tmp_path, "train", 2, 0)
    stl10(tmp_path, "test", 2, 0)
    with pytest.raises(UserError, match=r"holds 2 files of STL-10 with images .*; give one of train_X\.bin"):
        build_manifest(DataSettings(uri=str(tmp_path)))
    (tmp_path / "train_X.bin").write_bytes(b"x" * 27649)
    with pytest.raises(UserError, match="has 27649 bytes; wanted a multiple of 27648"):
        build_manifest(DataSettings(uri=str(tmp_path / "train_X.bin")))
    (tmp_path / "test_y.bin").write_bytes(b"1")
    with pytest.raises(UserError, match=r"test_y\.bin holds 1 labels for 2 images"):
        build_manifest(DataSettings(uri=str(tmp_path / "test_X.bin")))


def test_folds_want_other_images_to_test_on() -> None:
    with pytest.raises(ValueError, match="folds: seen fold without test_uri"):
        EvaluationSettings(folds="fold")
