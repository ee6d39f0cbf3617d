"""DeeperCluster: the two levels of its clusters, its heads and samples; and that one super-cluster is DeepCluster."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydantic import ValidationError

from raycluster.clustering.kmeans import hierarchical
from raycluster.clustering.kmeans.lloyd import kmeans
from raycluster.clustering.whitening import whiten
from raycluster.events import Progress, Round
from raycluster.features.matrix import LocalFeatures
from raycluster.methods import deepcluster
from raycluster.methods.base import AssignmentContext
from raycluster.methods.deepercluster import Method
from raycluster.models.heads import Heads, HierarchicalHeads
from raycluster.run.checkpoint import load_newest
from raycluster.run.config import Config
from raycluster.run.local_workers import LocalWorkers
from raycluster.run.loop import pretrain
from raycluster.run.validation import validate_and_initialize
from raycluster.training.hierarchical import CartesianCrossEntropy, HierarchicalCrossEntropy
from raycluster.training.objective import CrossEntropy
from raycluster.types import Assignments, Block, UserError

rng = np.random.default_rng(0)
VALUES = (rng.standard_normal((400, 6)) + 4 * rng.standard_normal((5, 6))[rng.integers(5, size=400)]).astype(np.float16)
SMALL = {"num_super_clusters": 4, "num_clusters": 24, "iterations": 6}


def blocks(values: NDArray, number: int, order: NDArray | None = None) -> LocalFeatures:
    samples = np.arange(len(values)) if order is None else order
    return LocalFeatures([Block(part, values[part]) for part in np.array_split(samples, number)])


def assign(method: Method | deepcluster.Method, features: LocalFeatures, seed: int = 0) -> Assignments:
    heads = Heads(6, (), seed=0)
    return method.assign(features, AssignmentContext(400, round=0, seed=seed, heads=heads, previous=None))


def test_super_clusters_hold_their_sub_clusters_in_equal_numbers() -> None:
    found = assign(Method(**SMALL), blocks(VALUES, 3))
    assert found.num_classes == (24, 4) and found.metrics["missing_clusters"] == 0
    clusters, groups = found.labels
    parents = found.state["parents"]
    assert np.array_equal(parents[clusters], groups)
    assert np.bincount(parents).tolist() == [6] * 4
    assert set(clusters) == set(range(24))
    wanted = kmeans(whiten(blocks(VALUES, 1), 6), 4, iterations=6, plain=True)
    assert np.array_equal(groups, wanted.labels), "super-clusters are those of k-means on the whitened rows"


@pytest.mark.parametrize("gathered_bytes", [0, 1 << 30], ids=["rows stay", "rows are gathered"])
def test_labels_do_not_depend_on_blocks_or_on_where_groups_are_clustered(
    gathered_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = assign(Method(**SMALL), blocks(VALUES, 1))
    monkeypatch.setattr(hierarchical, "_GATHERED_BYTES", gathered_bytes)
    for number in (1, 2, 7, 64):
        found = assign(Method(**SMALL), blocks(VALUES, number, np.random.default_rng(number).permutation(400)))
        assert np.array_equal(found.labels, expected.labels)
        assert np.array_equal(found.state["parents"], expected.state["parents"])


def test_a_super_cluster_of_few_distinct_rows_gets_fewer_sub_clusters_and_a_smaller_head() -> None:
    noise = np.random.default_rng(0).standard_normal((160, 6)) / 3
    values = np.concatenate([noise[:155] + 9, np.repeat(noise[155:158] - 9, 53, axis=0)[:160]]).astype(np.float32)
    method = Method(num_super_clusters=2, num_clusters=20, pca_dim=2)
    found = assign(method, blocks(values, 3))
    assert sorted(np.bincount(found.state["parents"]).tolist()) == [3, 10]
    assert found.num_classes == (13, 2) and found.metrics["missing_clusters"] == 7
    assert (found.labels[:, len(values) :] == -1).all(), "samples without features have no label"
    sizes = method.head_sizes(found)
    assert sizes[0] == 8 and sorted(sizes[1:]) == [3] * 4 + [10] * 4
    heads = method.heads(16, found, auxiliary=(), seed=0)
    assert isinstance(heads, HierarchicalHeads) and [layer.out_features for layer in heads.linear] == list(sizes)
    counts = method.visit_counts(found, 128, np.random.default_rng(0))
    assert np.bincount(found.labels[1][: len(values)], counts[: len(values)]).tolist() == [64, 64]


@pytest.mark.parametrize(
    ("options", "sizes", "kind"),
    [
        ({}, (16, *[6] * 16), HierarchicalCrossEntropy),
        ({"rotations": False}, (4, *[6] * 4), HierarchicalCrossEntropy),
        ({"num_super_clusters": 1}, (4, *[24] * 4), HierarchicalCrossEntropy),
        ({"loss": "cartesian"}, (96,), CartesianCrossEntropy),
        ({"loss": "cartesian", "rotations": False}, (24,), CartesianCrossEntropy),
        ({"num_super_clusters": 1, "rotations": False}, (24,), CrossEntropy),
    ],
)
def test_heads_and_loss_follow_the_settings(options: dict, sizes: tuple[int, ...], kind: type) -> None:
    method = Method(**SMALL | options)
    found = assign(method, blocks(VALUES, 2))
    assert method.head_sizes(None) == method.head_sizes(found) == sizes
    assert type(method.objective(None)) is type(method.objective(found)) is kind
    heads = method.heads(6, found, auxiliary=(), seed=0)
    assert [weight.shape[0] for weight, _ in heads.arrays()] == list(sizes)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_super_clusters": 3, "num_clusters": 100}, "set num_clusters to 99 or 102"),
        ({"num_super_clusters": 5, "num_clusters": 3}, "set num_clusters to 5 or 10"),
        ({"num_super_clusters": 1, "rotations": False, "loss": "cartesian"}, "loss cartesian has no effect"),
    ],
)
def test_settings_that_do_not_fit_are_refused(options: dict, says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        Method(**options)


def test_one_super_cluster_without_rotations_assigns_as_deepcluster() -> None:
    ours = Method(num_super_clusters=1, num_clusters=24, rotations=False, pca_dim=5, iterations=6)
    theirs = deepcluster.Method(num_clusters=24, pca_dim=5, iterations=6)
    found, expected = assign(ours, blocks(VALUES, 3), seed=7), assign(theirs, blocks(VALUES, 3), seed=7)
    assert np.array_equal(found.labels, expected.labels) and found.num_classes == expected.num_classes
    counts = [one.visit_counts(expected, 512, np.random.default_rng(3)) for one in (ours, theirs)]
    assert np.array_equal(*counts)
    mine, other = (one.heads(6, found, auxiliary=(), seed=5).state_dict() for one in (ours, theirs))
    assert mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)


# ----------------------------------------------------------------------------------------------------------------- runs

Tiny = Callable[..., Config]
DEEPER = "method={name: deepercluster, num_super_clusters: 3, num_clusters: 12, layer: conv3, descriptor: pooled, "
DEEPER += "iterations: 4, reassign_every_epochs: 1}"
SHORT = (DEEPER, "data.labels=none", "training.head_lr=0.5")


def run(config: Config, workers: LocalWorkers | None = None) -> list[dict]:
    return [event.record for event in pretrain(config, workers or LocalWorkers()) if isinstance(event, Round)]


def weights(config: Config) -> dict[str, torch.Tensor]:
    state = load_newest(config.run.dir, torch.device("cpu"))
    assert state is not None
    return state["network"]


def assert_same(one: Config, other: Config) -> None:
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny: Tiny) -> Config:
    config = tiny(tmp_path_factory.mktemp("deeper"), *SHORT)
    run(config)
    return config


def test_a_run_learns(finished: Config) -> None:
    lines = (Path(finished.run.dir) / "metrics.jsonl").read_text().splitlines()
    first, last = map(json.loads, lines)
    assert first["loss_over_chance"] < 1 and last["loss_over_chance"] < 1, "chance is that of all heads"
    assert last["rotation_accuracy"] > 0.3 and last["super_accuracy"] > 1 / 12
    assert last["num_clusters"] == (12 + 3) / 2


@pytest.mark.parametrize("step", [5, 20], ids=["in the first round", "in the second"])
def test_killed_in_the_middle_of_a_round_and_resumed_is_bitwise_identical(
    finished: Config, tiny: Tiny, tmp_path: Path, step: int
) -> None:
    config, steps = tiny(tmp_path, *SHORT, "run.checkpoint_minutes=1e-9"), 0
    for event in pretrain(config, LocalWorkers()):
        steps += isinstance(event, Progress) and event.phase == "training"
        if steps == step:
            break  # as if the process had died here
    run(config)
    assert_same(config, finished)


def test_one_super_cluster_without_rotations_trains_as_deepcluster(tiny: Tiny, tmp_path: Path) -> None:
    """The seeds name the same purposes, so that labels, losses and weights are bitwise those of DeepCluster."""
    settings = "num_clusters: 10, layer: conv3, descriptor: pooled, pca_dim: 8, iterations: 5, reassign_every_epochs: 1"
    deep = tiny(tmp_path / "deep", f"method={{name: deepcluster, {settings}}}", "data.labels=none")
    single = f"method={{name: deepercluster, num_super_clusters: 1, rotations: false, {settings}}}"
    deeper = tiny(tmp_path / "deeper", single, "data.labels=none")
    for one, other in zip(run(deep), run(deeper), strict=True):
        assert one["assignments"] == other["assignments"] and one["loss"] == other["loss"]
        assert one["loss_over_chance"] == other["loss_over_chance"]
    assert_same(deep, deeper)


@pytest.mark.parametrize("override", ["method.loss=cartesian", "training.precision=bf16", "training.mode=fast"])
def test_variants_run(tiny: Tiny, tmp_path: Path, override: str) -> None:
    (record,) = run(tiny(tmp_path, DEEPER, override, "training.epochs=1", "data.labels=none"))
    assert record["loss_over_chance"] < 1.05


def test_heads_that_exceed_the_memory_are_refused_before_anything_starts(tiny: Tiny, tmp_path: Path) -> None:
    wide = ("model.widths=[4, 8, 4096]", "method.num_clusters=6000000", "training.head_momentum=0.9")
    config = tiny(tmp_path, DEEPER, "run.workers=0", *wide)
    copies = "4 bytes of weights + 4 bytes of gradients + 4 bytes of momentum + 8 bytes of exact sums"
    arithmetic = f"24,000,012 classes of 4,096 features: 24,000,012 x 4,097 x ({copies}) = 1966.6 GB"
    with pytest.raises(UserError, match=re.escape(arithmetic)):
        validate_and_initialize(config)
    assert not (tmp_path / "manifest.parquet").exists()


def test_rotation_prediction_besides_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"training\.rotation: seen true; wanted false"):
        validate_and_initialize(tiny(tmp_path, DEEPER, "training.rotation=true"))
