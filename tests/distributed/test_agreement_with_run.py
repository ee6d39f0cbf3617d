"""Agreement with true labels is computed for the images of the run only, whatever their paths."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raycluster.data.manifest import DataSettings, Manifest, build_manifest, write_manifest
from raycluster.distributed.evaluate import agreement_with_run
from raycluster.io.assignments import write_assignments
from raycluster.io.run_paths import RunPaths
from raycluster.types import Assignments, LabelSet

NUM_IMAGES = 100  # more than are compared


def write_images(root: Path, seed: int) -> Path:
    """Two classes of noise, under the same paths for every seed."""
    rng = np.random.default_rng(seed)
    for index in range(NUM_IMAGES):
        folder = root / f"class {index % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(256, size=(8, 8, 3), dtype=np.uint8)).save(folder / f"{index:03d}.png")
    return root


def manifest_of(root: Path, **options: object) -> Manifest:
    return build_manifest(DataSettings(uri=str(root), **options))  # type: ignore[arg-type]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images", 0)


@pytest.fixture
def run_dir(tmp_path: Path, images: Path) -> str:
    """A run whose clusters are the classes."""
    run_dir, manifest = str(tmp_path / "run"), manifest_of(images)
    write_manifest(manifest, RunPaths(run_dir).manifest)
    assert manifest.labels is not None
    found = Assignments(manifest.num_samples, (LabelSet(manifest.labels, len(manifest.classes)),))
    write_assignments(RunPaths(run_dir).assignments, found, manifest.paths)
    return run_dir


def nmi(run_dir: str, manifest: Manifest) -> float:
    found = agreement_with_run(run_dir, manifest)
    assert found is not None and set(found) == {"label_0"}
    return found["label_0"]["nmi_arithmetic"]


def test_other_images_under_the_same_paths(run_dir: str, tmp_path: Path) -> None:
    assert agreement_with_run(run_dir, manifest_of(write_images(tmp_path / "other", 1))) is None


def test_other_images_under_other_paths(run_dir: str, digits_folder: Path) -> None:
    assert agreement_with_run(run_dir, manifest_of(digits_folder)) is None


def test_the_images_of_the_run(run_dir: str, images: Path) -> None:
    assert nmi(run_dir, manifest_of(images)) == pytest.approx(1)
    assert nmi(run_dir, manifest_of(images, shard_size=7, labels="folder")) == pytest.approx(1)


def test_a_copy_of_the_images(run_dir: str, images: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(images, tmp_path / "copy")
    assert nmi(run_dir, manifest_of(copy)) == pytest.approx(1)
    for path in sorted(copy.rglob("*.png"))[::3]:
        path.unlink()
    assert nmi(run_dir, manifest_of(copy)) == pytest.approx(1), "a part of them"
    write_images(copy, 2)
    assert agreement_with_run(run_dir, manifest_of(copy)) is None


def test_a_few_other_images_suffice(run_dir: str, images: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(images, tmp_path / "copy")
    write_images(tmp_path / "other", 1)
    shutil.copytree(tmp_path / "other" / "class 1", copy / "class 1", dirs_exist_ok=True)
    assert agreement_with_run(run_dir, manifest_of(copy)) is None


def test_a_copy_after_the_images_of_the_run_are_gone(run_dir: str, images: Path, tmp_path: Path) -> None:
    shutil.move(images, tmp_path / "moved")
    assert agreement_with_run(run_dir, manifest_of(tmp_path / "moved")) is None, "it cannot be known"
