"""Exemplar learning: seeds, classes and visits by hand; runs that are stopped; classes merged by a finished run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torch import nn

from raycluster.config import load
from raycluster.events import Finished, Progress
from raycluster.features.matrix import LocalFeatures
from raycluster.methods.base import AssignmentContext
from raycluster.methods.exemplar import Merge, Method
from raycluster.run.checkpoint import load_newest
from raycluster.run.config import Config
from raycluster.run.local_workers import LocalWorkers
from raycluster.run.loop import pretrain
from raycluster.run.validation import validate_and_initialize
from raycluster.seeding import generator
from raycluster.types import Assignments, Block, RunStopped, UserError

ROOT = Path(__file__).parents[2]
Exemplar = Callable[..., Config]

SMALL = (
    "views={train: {size: 16, resize: 24, flip: 0.5, patch: {scale: [0.7, 1.4], translation: 0.2, rotation: 20}, "
    "colour_components: [0.5, 2], hsv: {power: [0.25, 4], factor: [0.7, 1.4], offset: 0.1, hue: 0.1}}, "
    "eval: {size: 24}}",
    "model={name: exemplarcnn, image_size: 16, widths: [4, 8, 8], features: 16}",
    "method={name: exemplar, num_classes: 100, visits_per_class: 5}",
    "training.layers={fc1: {weight_decay: 0.004}, heads: {weight_decay: 0.016}, biases: {lr_factor: 2}}",
)


@pytest.fixture(scope="module")
def exemplar(tiny: Callable[..., Config]) -> Exemplar:
    return lambda run_dir, *overrides: tiny(run_dir, *SMALL, *overrides)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, exemplar: Exemplar) -> Config:
    config = exemplar(tmp_path_factory.mktemp("seeds"))
    list(pretrain(config, LocalWorkers()))
    return config


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory, exemplar: Exemplar, finished: Config) -> Config:
    config = exemplar(tmp_path_factory.mktemp("merged"), *merging(finished))
    list(pretrain(config, LocalWorkers()))
    return config


def merging(first: Config) -> tuple[str, ...]:
    return (f"method.merge={{run: {first.run.dir}, threshold: 0.2}}", "method.num_classes=60")


def state(config: Config) -> dict:
    found = load_newest(config.run.dir, torch.device("cpu"))
    assert found is not None
    return found


def table(config: Config):
    return pq.read_table(Path(config.run.dir) / "assignments")


def records(config: Config) -> list[dict]:
    return [json.loads(line) for line in (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()]


def assert_same(one: Config, other: Config) -> None:
    found, expected = state(one), state(other)
    assert [r["assignments"] for r in found["records"]] == [r["assignments"] for r in expected["records"]]
    assert all(torch.equal(tensor, expected["network"][name]) for name, tensor in found["network"].items())
    assert table(one).equals(table(other))


def assigned(method: Method, rows: np.ndarray, num_blocks: int = 1, num_samples: int | None = None) -> Assignments:
    order = np.random.default_rng(num_blocks).permutation(len(rows))
    features = LocalFeatures([Block(part, rows[part]) for part in np.array_split(order, num_blocks)])
    return method.assign(features, AssignmentContext(num_samples or len(rows), 0, 1, nn.Identity(), None))


def test_classes_by_hand() -> None:
    """Six boxes, of which image 6 has none because it is broken: four of them are the classes 0 to 3, in order."""
    boxes = np.random.default_rng(0).random((6, 4)).astype(np.float32)
    found = assigned(Method(num_classes=4), boxes, num_samples=7)
    (labels,) = found.labels
    assert sorted(labels) == [-1, -1, -1, 0, 1, 2, 3] and labels[6] == -1
    assert (np.diff(labels[labels >= 0]) == 1).all() and found.num_classes == (4,)
    assert found.crops is not None and (found.crops.boxes[:6] == boxes).all()
    assert found.crops.boxes[6].tolist() == [0, 0, 1, 1] and found.crops.images.tolist() == list(range(7))
    again = Method(num_classes=4).assign(None, AssignmentContext(7, 1, 2, nn.Identity(), found))
    assert again is found, "labels never change"


def test_several_seeds_in_each_image() -> None:
    method = Method(num_classes=5, patches_per_image=3)
    crops = method.crops(2, 0)
    assert crops is not None and crops.images.tolist() == [0, 0, 0, 1, 1, 1]
    found = assigned(method, np.random.default_rng(0).random((6, 4)).astype(np.float32))
    assert found.crops is not None and found.crops.images.tolist() == [0, 0, 0, 1, 1, 1]


def test_every_class_has_the_same_number_of_visits() -> None:
    labels = assigned(Method(num_classes=50, visits_per_class=7), np.zeros((80, 4), np.float32)).labels[0]
    method = Method(num_classes=50, visits_per_class=7)
    assert method.rows_per_epoch(80) == 350
    counts = method.visit_counts(assigned(method, np.zeros((80, 4), np.float32)), 350, generator(0, "sampling", 0))
    assert (counts[labels >= 0] == 7).all() and (counts[labels < 0] == 0).all()


def test_any_blocks_give_bitwise_identical_classes(finished: Config) -> None:
    boxes = np.random.default_rng(0).random((700, 4)).astype(np.float32)
    maps = np.random.default_rng(0).standard_normal((1797, 12)).astype(np.float32)
    merge = Method(num_classes=300, merge=Merge(run=finished.run.dir, threshold=0.5))
    for method, rows in ((Method(num_classes=300), boxes), (merge, maps)):
        found = [assigned(method, rows, num_blocks) for num_blocks in (1, 2, 7, 64)]
        assert len({one.labels.tobytes() for one in found}) == 1
        assert len({one.crops.boxes.tobytes() for one in found if one.crops}) == 1


def test_directory_holds_the_seeds(finished: Config) -> None:
    found = table(finished)
    assert found.column_names == ["sample", "path", "left", "top", "right", "bottom", "label_0"]
    labels = found["label_0"].to_numpy()
    assert sorted(labels[labels >= 0]) == list(range(100)) and len(labels) == 1797
    for low, high in (("left", "right"), ("top", "bottom")):
        edges = found[low].to_numpy(), found[high].to_numpy()
        assert edges[1] - edges[0] == pytest.approx(16 / 24, abs=1e-6) and len(np.unique(edges[0])) == 9
    first, last = records(finished)
    assert first["num_clusters"] == 100 and first["num_skipped"] == last["num_skipped"] == 0
    assert first["steps"] == 4, "100 classes x 5 visits fill 4 batches of 128"
    assert first["assignments"] == last["assignments"]


def test_merged_classes_have_several_images_and_the_seeds_of_the_first_run(merged: Config, finished: Config) -> None:
    labels, first = table(merged)["label_0"].to_numpy(), records(merged)[0]
    sizes = np.bincount(labels[labels >= 0], minlength=60)
    assert (sizes >= 2).all() and sizes.max() <= 7
    assert first["merged_clusters"] > 0 and first["merged_clusters"] + first["added_seeds"] == 60
    for edge in ("left", "top", "right", "bottom"):
        assert table(merged)[edge].equals(table(finished)[edge])
    assert first["loss_over_chance"] == pytest.approx(1, abs=0.1), "a new network"


@pytest.mark.parametrize("asked", [pytest.param(1, marks=pytest.mark.slow), 7])
def test_stopped_anywhere_and_resumed_equals_undisturbed(
    finished: Config, exemplar: Exemplar, tmp_path: Path, asked: int
) -> None:
    config, questions = exemplar(tmp_path), count()
    with pytest.raises(RunStopped):
        list(pretrain(config, LocalWorkers(stopping=lambda: next(questions) >= asked)))
    list(pretrain(config, LocalWorkers()))
    assert_same(config, finished)


def test_killed_after_merging_and_resumed_equals_undisturbed(
    merged: Config, finished: Config, exemplar: Exemplar, tmp_path: Path
) -> None:
    config = exemplar(tmp_path / "run", *merging(finished), "run.checkpoint_minutes=1e-9")
    for event in pretrain(config, LocalWorkers()):
        if isinstance(event, Progress) and event.phase == "training" and event.done == 3:
            break  # as if the process had died here
    list(pretrain(config, LocalWorkers()))
    assert_same(config, merged)


def test_fewer_images_than_classes(exemplar: Exemplar, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"method wants 2000 clusters, but digits holds 1797 images"):
        validate_and_initialize(exemplar(tmp_path, "method.num_classes=2000"))
    validate_and_initialize(exemplar(tmp_path, "method.num_classes=2000", "method.patches_per_image=2"))


def test_patches_larger_than_the_images(exemplar: Exemplar, tmp_path: Path) -> None:
    config = exemplar(tmp_path, "views.train={size: 16}")
    with pytest.raises(UserError, match=r"1797 of 1797 images could not be read.*8 x 8 pixels hold no patch of 16"):
        list(pretrain(config, LocalWorkers()))


def test_uniform_images_are_seeds_as_well(exemplar: Exemplar, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(12):
        Image.new("RGB", (30, 40), (20 * number, 0, 0)).save(folder / f"{number}.png")
    options = (f"data={{uri: {folder}, labels: none}}", "method.num_classes=6", "views.train={size: 16, patch: {}}")
    config = exemplar(tmp_path / "run", *options, "training.epochs=1")
    list(pretrain(config, LocalWorkers()))
    assert len(np.unique(table(config)["top"].to_numpy())) > 6


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            ["training.images_per_round=300"],
            r"images_per_round: seen 300; wanted null, since exemplar finds the labels",
        ),
        (["method.merge={run: nowhere}"], r"method: nowhere holds no backbone\.safetensors; wanted the directory of a"),
        (["method.merge={run: FIRST, layer: conv9}"], r"method\.layer: seen conv9; wanted a layer of .*conv1"),
        (["method.merge={run: FIRST}", "data.shard_size=200"], r"digits holds 1797 images, but .* belongs to 1797"),
        (
            ["training.layers={fc9: {lr_factor: 2}}"],
            r"layers: seen fc9; wanted some of conv1, .*heads, biases",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_extracted(
    finished: Config, exemplar: Exemplar, tmp_path: Path, overrides: list[str], says: str
) -> None:
    config = exemplar(tmp_path, *(one.replace("FIRST", finished.run.dir) for one in overrides))
    with pytest.raises(UserError, match=says):
        validate_and_initialize(config)


def test_a_run_without_seeds_is_refused(finished: Config, tmp_path: Path) -> None:
    shutil.copytree(Path(finished.run.dir) / "assignments", tmp_path / "assignments")
    path = tmp_path / "assignments" / "part-00000.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["left"]), path)
    method = Method(num_classes=300, merge=Merge(run=str(tmp_path)))
    with pytest.raises(UserError, match=r"method\.merge\.run: .* holds no seeds; wanted a run of this method"):
        assigned(method, np.ones((1797, 3), np.float32))


def test_merging_describes_whole_images() -> None:
    with pytest.raises(ValidationError, match=r"patches_per_image = 2 does not go with merge"):
        Method(patches_per_image=2, merge=Merge(run="first"))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_ray_workers_equal_one_process(
    ray_cluster: None, merged: Config, finished: Config, exemplar: Exemplar, tmp_path: Path, workers: int
) -> None:
    from raycluster.distributed.train.trainer import fit

    first = exemplar(tmp_path / "first", f"run.workers={workers}", "run.actors=2")
    fit(first)
    assert_same(first, finished)
    second = exemplar(tmp_path / "second", *merging(finished), f"run.workers={workers}", "run.actors=2")
    fit(second)
    assert_same(second, merged)


@pytest.mark.slow
def test_smoke_configuration_improves_on_the_untrained_network(tmp_path: Path) -> None:
    config = load(Config, ROOT / "configs/smoke/exemplar.yaml", [f"run.dir={tmp_path}"])
    *_, last = pretrain(config, LocalWorkers())
    assert isinstance(last, Finished)
    before, after = (last.report["accuracies"][name] for name in ("untrained", "pre-trained"))
    assert after["knn_accuracy"] > before["knn_accuracy"] + 0.05
