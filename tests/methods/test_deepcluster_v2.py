from __future__ import annotations

from itertools import count
from math import exp, log
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydantic import ValidationError

import raycluster
from raycluster.clustering.kmeans.lloyd import kmeans
from raycluster.config import load, parse
from raycluster.events import Finished, Progress, Round
from raycluster.features.matrix import LocalFeatures
from raycluster.features.online import OnlineFeatureBank
from raycluster.io.npz import read_npz
from raycluster.methods.base import AssignmentContext
from raycluster.methods.deepcluster_v2 import Method
from raycluster.models.heads import Prototypes
from raycluster.run.checkpoint import load_newest
from raycluster.run.config import Config
from raycluster.run.local_workers import LocalWorkers
from raycluster.run.loop import pretrain
from raycluster.run.validation import validate_and_initialize
from raycluster.seeding import seed_for
from raycluster.training.multi_crop import MultiCropCrossEntropy
from raycluster.training.objective import Batch
from raycluster.types import Assignments, Block, RunStopped, UserError

ROOT = Path(__file__).parents[2]
TINY = """
data: {uri: digits, shard_size: 300}
views:
  train: {size: 16, crop_scale: [0.5, 1.0]}
  eval: {size: 16}
  extra: {small: {size: 8, crop_scale: [0.2, 0.5]}}
model: {name: smallnet, widths: [4, 8, 16]}
method:
  {name: deepcluster_v2, num_heads: 3, num_clusters: 12, views: [train, train, small], projection_dim: 6, hidden_dim: 8}
training: {epochs: 2, global_batch: 128, microbatch: 32, mode: exact, threads: 1}
evaluation: {max_samples: 600}
run: {dir: unset}
"""
METHOD = Method(num_heads=3, num_clusters=5, projection_dim=4, hidden_dim=8)
ROWS = np.random.default_rng(0).standard_normal((90, 8)).astype(np.float16)  # two views of four columns


def tiny(run_dir: Path, *overrides: str) -> Config:
    return parse(Config, TINY, [f"run.dir={run_dir}", *overrides])


def blocks(values: NDArray, number: int) -> LocalFeatures:
    order = np.random.default_rng(number).permutation(len(values))
    return LocalFeatures([Block(part, values[part]) for part in np.array_split(order, number)])


def assign(features: LocalFeatures, num_samples: int = 90) -> Assignments:
    context = AssignmentContext(num_samples, round=0, seed=7, heads=torch.nn.Identity(), previous=None)
    return METHOD.assign(features, context)


def saved(config: Config) -> dict[str, Any]:
    found = load_newest(config.run.dir, torch.device("cpu"))
    assert found is not None
    return found


def assert_same(one: Config, other: Config) -> None:
    found, expected = saved(one), saved(other)
    assert [r["assignments"] for r in found["records"]] == [r["assignments"] for r in expected["records"]]
    assert found["network"].keys() == expected["network"].keys()
    assert all(torch.equal(tensor, expected["network"][name]) for name, tensor in found["network"].items())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Config:
    config = tiny(tmp_path_factory.mktemp("whole"))
    list(pretrain(config, LocalWorkers()))
    return config


def test_the_loss_by_hand() -> None:
    """One image in two crops, one head of two prototypes: cosines (0.8, 0.6) and (0, 1), temperature 0.1."""
    heads = Prototypes([np.eye(2, dtype=np.float32)], temperature=0.1)
    outputs = [heads(torch.tensor([[0.8, 0.6]])), heads(torch.tensor([[0.0, 1.0]]))]
    torch.testing.assert_close(outputs[0][0], torch.tensor([[8.0, 6.0]]))
    batch = Batch((), torch.tensor([[0]]), torch.ones(1))
    (loss,) = MultiCropCrossEntropy(("train", "train")).loss(outputs, batch).tolist()
    assert loss == pytest.approx((log(1 + exp(6 - 8)) + log(1 + exp(10))) / 2, rel=1e-6)


def test_the_loss_is_the_mean_over_heads_and_crops_and_leaves_out_rows_without_label() -> None:
    generator = torch.Generator().manual_seed(0)
    outputs = [[torch.randn(4, size, generator=generator) for size in (3, 5)] for _ in range(3)]
    labels, weights = torch.tensor([[0, 1, 2, -1], [4, -1, 0, -1]]), torch.ones(4)
    expected = torch.zeros(4)
    for crop in outputs:
        for scores, row in zip(crop, labels, strict=True):
            for image in (row >= 0).nonzero()[:, 0]:
                expected[image] += scores[image].logsumexp(0) - scores[image, row[image]]
    loss = MultiCropCrossEntropy(("a", "b", "c")).loss(outputs, Batch((), labels, weights))
    torch.testing.assert_close(loss, expected / 6)


def test_each_head_clusters_one_of_the_views_on_the_sphere() -> None:
    found = assign(blocks(ROWS, 3), num_samples=95)
    for head, columns in enumerate((slice(0, 4), slice(4, 8), slice(0, 4))):
        options: dict[str, Any] = {"seed": seed_for(7, "kmeans", head), "iterations": 10}
        alone = kmeans(blocks(ROWS[:, columns], 1), 5, spherical=True, plain=True, **options)
        assert np.array_equal(found.labels[head, :90], alone.labels)
        assert np.array_equal(found.state[f"centroids_{head}"], alone.centroids)
    assert (found.labels[:, 90:] == -1).all(), "images without features are excluded"
    assert not np.array_equal(found.labels[0], found.labels[2]), "two heads of one view start from other rows"


def test_labels_do_not_depend_on_blocks() -> None:
    expected = assign(blocks(ROWS, 1))
    for number in (2, 7, 64):
        found = assign(blocks(ROWS, number))
        assert np.array_equal(found.labels, expected.labels) and found.metrics == expected.metrics
        assert all(np.array_equal(array, expected.state[name]) for name, array in found.state.items())


def test_prototypes_are_the_centroids() -> None:
    found = assign(blocks(ROWS, 2))
    heads = METHOD.heads(4, found, auxiliary=(), seed=0)
    assert heads is not None and not list(heads.parameters()), "nothing to train"
    rows = ROWS[:, :4].astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    scores = heads(torch.from_numpy(rows))
    assert [tuple(one.shape) for one in scores] == [(90, 5)] * 3
    assert np.array_equal(scores[0].argmax(1).numpy(), found.labels[0])
    np.testing.assert_allclose(scores[0].numpy(), 10 * rows @ found.state["centroids_0"].T, rtol=1e-5, atol=1e-5)


def test_training_changes_the_neck_and_leaves_the_prototypes(finished: Config, tmp_path: Path) -> None:
    state = saved(finished)
    for head in range(3):
        centroids = state["assignments"]["state"][f"centroids_{head}"]
        assert torch.equal(state["network"][f"heads.prototypes_{head}"], centroids)
        torch.testing.assert_close(centroids.norm(dim=1), torch.ones(12))
    start = METHOD.neck(16, seed=0)
    names = {name.removeprefix("neck.") for name in state["network"] if name.startswith("neck.")}
    assert names == set(start.state_dict()), "the neck is kept"
    fresh = Method(projection_dim=6, hidden_dim=8).neck(16, seed_for(0, "neck")).state_dict()
    for name in ("layers.1.weight", "layers.2.running_mean", "layers.4.bias"):
        assert not torch.equal(state["network"][f"neck.{name}"], fresh[name])
    assert len(state["optimisers"]["body"]["state"]) == 9 + 6, "the optimiser of the body trains the neck"


def test_the_exported_backbone_has_no_neck(finished: Config) -> None:
    backbone = raycluster.load_backbone(finished.run.dir)
    trained = saved(finished)["network"]
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(tensor, trained[f"backbone.{name}"])
    assert backbone(torch.zeros(2, 3, 16, 16)).shape == (2, 16)


def test_features_are_extracted_once_and_then_gathered_in_training(tmp_path: Path) -> None:
    phases = [event.phase for event in pretrain(tiny(tmp_path), LocalWorkers()) if isinstance(event, Progress)]
    first = phases.index("training")
    assert "extracting" in phases[:first] and "extracting" not in phases[first:]
    rows = read_npz(str(next((tmp_path / "online-features").iterdir())), ["samples", "values"])
    assert rows["values"].shape[1] == 2 * 6
    assert not np.allclose(rows["values"][:, :6], rows["values"][:, 6:], atol=0.01), "two crops"
    norms = np.linalg.norm(rows["values"].astype(np.float32).reshape(-1, 6), axis=1)
    np.testing.assert_allclose(norms, 1, atol=2e-3)


def test_the_bank_keeps_the_first_views_side_by_side(tmp_path: Path) -> None:
    bank = OnlineFeatureBank(str(tmp_path), METHOD.feature_request(0), num_views=3)
    for step in range(2):
        bank.register_batch(np.array([4 + step, 9]), first_time=2 * step)
        for view in range(3):
            bank(torch.nn.Identity(), (torch.tensor([[-1.0, 10 * step + view], [2.0, 100 + 10 * step + view]]),))
    bank.write(1)
    rows = read_npz(str(next(tmp_path.iterdir())), ["samples", "values"])
    assert rows["samples"].tolist() == [4, 5, 9]
    assert rows["values"].tolist() == [[-1, 0, -1, 1], [-1, 10, -1, 11], [2, 110, 2, 111]]


@pytest.mark.parametrize("asked", [pytest.param(9, marks=pytest.mark.slow), 25])
def test_stopped_anywhere_and_resumed_equals_undisturbed(finished: Config, tmp_path: Path, asked: int) -> None:
    config, questions = tiny(tmp_path, "run.checkpoint_minutes=1e-9"), count()
    with pytest.raises(RunStopped):
        list(pretrain(config, LocalWorkers(stopping=lambda: next(questions) >= asked)))
    list(pretrain(config, LocalWorkers()))
    assert_same(config, finished)


@pytest.mark.slow
def test_fast_mode_agrees(finished: Config, tmp_path: Path) -> None:
    config = tiny(tmp_path, "training.mode=fast")
    losses = [event.record["loss"] for event in pretrain(config, LocalWorkers()) if isinstance(event, Round)]
    expected = [record["loss"] for record in saved(finished)["records"]]
    assert losses[0] == pytest.approx(expected[0], rel=1e-4) and losses[1] == pytest.approx(expected[1], rel=0.05)


@pytest.mark.slow
@pytest.mark.ray
def test_workers_end_bitwise_identical_to_one_process(ray_cluster: None, finished: Config, tmp_path: Path) -> None:
    from raycluster.distributed.train.trainer import fit

    config = tiny(tmp_path, "run.workers=2", "run.actors=2")
    fit(config)
    assert_same(config, finished)


@pytest.mark.slow
def test_smoke_configuration_improves_on_the_untrained_network(tmp_path: Path) -> None:
    config = load(Config, ROOT / "configs/smoke/deepcluster_v2.yaml", [f"run.dir={tmp_path}"])
    *_, last = pretrain(config, LocalWorkers())
    assert isinstance(last, Finished)
    before, after = (last.report["accuracies"][name] for name in ("untrained", "pre-trained"))
    assert after["knn_accuracy"] > before["knn_accuracy"] + 0.1
    assert after["linear_probe_accuracy"] > before["linear_probe_accuracy"] + 0.03


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"views": ("train",)}, r"seen 2 of views \['train'\]; wanted .* such as \['train', 'train'\]"),
        ({"views": ("train", "small")}, "wanted so many views of the same section"),
        ({"num_heads": 1}, "seen 2; wanted at most num_heads, 1"),
        ({"views": ()}, "at least 1"),
    ],
)
def test_views_that_cannot_be_clustered_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        Method(**options)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("training.head_lr=0.5", "training.head_lr: seen 0.5; wanted None .* heads are not trained"),
        ("training.head_momentum=0.9", "training.head_momentum: seen 0.9; wanted 0.0"),
        ("training.rotation=true", "minimises MultiCropCrossEntropy, which cannot predict rotations"),
        ("method.views=[train, train, tiny]", r"needs views\.extra\.tiny"),
        ("views.train={size: 16}", r"joins 2 views of an image, but views\.train is always the same"),
    ],
)
def test_settings_without_effect_are_refused(tmp_path: Path, override: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        validate_and_initialize(tiny(tmp_path, override))
