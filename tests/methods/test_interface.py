"""The interface of methods: one that finds the number of its clusters, with two label sets, two views, and crops."""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from raycluster.methods.base import AssignmentContext, BaseMethod
from raycluster.monitoring.status import read_status
from raycluster.run.checkpoint import load_newest
from raycluster.run.config import Config
from raycluster.run.local_workers import LocalWorkers
from raycluster.run.loop import pretrain
from raycluster.training.objective import Batch, Objective, cross_entropy
from raycluster.types import Assignments, Crops, FeatureRequest, Features, LabelSet, RunStopped, UserError

NUM_BITS = (2, 4)  # of the signs that number a cluster, per label set


class BothViews(Objective):
    """The mean of the cross-entropies of an image and of its small view."""

    views = ("train", "small")
    metrics = ("views_agree",)

    def loss(self, outputs: Sequence[Sequence[Tensor]], batch: Batch) -> Tensor:
        return torch.stack([cross_entropy(logits, batch.labels, batch.weights) for logits in outputs]).mean(0)

    def measure(self, outputs: Sequence[Sequence[Tensor]], batch: Batch) -> Tensor:
        one, other = (logits[0].argmax(1) for logits in outputs)
        return ((one == other) * batch.weights)[None]


@dataclass(frozen=True)
class Method(BaseMethod):
    """Both halves of every image are samples; a cluster is a pattern of signs of the features that occurs."""

    name: str = "signs"

    def crops(self, num_images: int, seed: int) -> Crops:
        halves = np.array([[0, 0, 0.6, 1], [0.4, 0, 1, 1]], np.float32)
        return Crops(np.repeat(np.arange(num_images), 2), np.tile(halves, (num_images, 1)))

    def feature_request(self, round: int) -> FeatureRequest:
        return FeatureRequest(kind="pooled")

    def assign(self, features: Features | None, context: AssignmentContext) -> Assignments:
        assert features is not None
        rows = features.rows(np.arange(context.num_samples))
        above = rows[:, : max(NUM_BITS)] > np.median(rows[:, : max(NUM_BITS)], axis=0)
        label_sets = []
        for bits in NUM_BITS:
            patterns, labels = np.unique(above[:, :bits] @ (1 << np.arange(bits)), return_inverse=True)
            frequent = np.flatnonzero(np.bincount(labels) > 20 * context.round)  # fewer from round to round
            renumbered = np.full(len(patterns), -1, np.int32)
            renumbered[frequent] = np.arange(len(frequent))
            label_sets.append(LabelSet(renumbered[labels], len(frequent), weight=float(bits)))
        return Assignments(context.num_samples, tuple(label_sets), {"patterns": float(len(patterns))})

    def objective(self, assignments: Assignments | None) -> Objective:
        return BothViews()


Signs = Callable[..., Config]


@pytest.fixture(scope="module")
def signs(tiny: Callable[..., Config]) -> Signs:
    def make(run_dir: Path, *overrides: str) -> Config:
        small = "views.extra={small: {size: 8, crop_scale: [0.3, 1.0]}}"
        return replace(tiny(run_dir, small, *overrides), method=Method())

    return make


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, signs: Signs) -> Config:
    config = signs(tmp_path_factory.mktemp("signs"))
    list(pretrain(config, LocalWorkers()))
    return config


def state(config: Config) -> dict:
    found = load_newest(config.run.dir, torch.device("cpu"))
    assert found is not None
    return found


def assert_same(one: Config, other: Config) -> None:
    found, expected = state(one), state(other)
    assert [r["assignments"] for r in found["records"]] == [r["assignments"] for r in expected["records"]]
    assert all(torch.equal(tensor, expected["network"][name]) for name, tensor in found["network"].items())


def test_heads_follow_the_clusters_that_were_found(finished: Config) -> None:
    lines = (Path(finished.run.dir) / "metrics.jsonl").read_text().splitlines()
    sizes = [json.loads(line)["num_clusters"] for line in lines]
    assert len(set(sizes)) > 1, "the number of clusters changes from round to round"
    record = json.loads(lines[-1])
    assert 0 < record["views_agree"] <= 1 and record["loss_over_chance"] < 1
    saved = state(finished)
    classes = [size for _, size, _ in saved["assignments"]["label_sets"]]
    assert [shape[0] for name, shape in saved["head_shapes"].items() if name.endswith("weight")] == classes


def test_samples_are_crops(finished: Config) -> None:
    table = pq.read_table(Path(finished.run.dir) / "assignments")
    assert len(table) == 2 * 1797 and {"label_0", "label_1", "left", "right"} < set(table.column_names)
    assert table["path"].to_pylist()[6:8] == [table["path"][6].as_py()] * 2
    assert table["left"].to_pylist()[:2] == pytest.approx([0, 0.4])


@pytest.mark.parametrize("asked", [pytest.param(12, marks=pytest.mark.slow), 25])
def test_resumed_with_other_numbers_of_clusters(finished: Config, signs: Signs, tmp_path: Path, asked: int) -> None:
    config, questions = signs(tmp_path), count()
    with pytest.raises(RunStopped):
        list(pretrain(config, LocalWorkers(stopping=lambda: next(questions) >= asked)))
    list(pretrain(config, LocalWorkers()))
    assert_same(config, finished)


def test_a_view_that_is_missing_is_named(tiny: Callable[..., Config], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"needs views\.extra\.small"):
        list(pretrain(replace(tiny(tmp_path), method=Method()), LocalWorkers()))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_worker_changes_nothing(
    ray_cluster: None, finished: Config, signs: Signs, tmp_path: Path, workers: int
) -> None:
    import os

    from ray import cloudpickle

    from raycluster.distributed.train.trainer import fit

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    config = signs(tmp_path, f"run.workers={workers}", "run.actors=2", "run.checkpoint_minutes=0.01")

    def kill_a_worker() -> None:
        while not ((status := read_status(str(tmp_path))) and status.phase == "training" and status.round == 1):
            time.sleep(0.05)
        os.kill(int(status.processes["train"][-1].rpartition(":")[2]), signal.SIGKILL)

    thread = threading.Thread(target=kill_a_worker, daemon=True)
    thread.start()
    fit(config)
    assert not thread.is_alive(), "the worker was killed"
    assert_same(config, finished)
