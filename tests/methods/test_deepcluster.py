"""The variants of DeepCluster in its authors' comparisons (descriptor, head, views, sampler), on real images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from raycluster.events import Round
from raycluster.features.matrix import LocalFeatures
from raycluster.methods.base import AssignmentContext
from raycluster.methods.deepcluster import Method
from raycluster.models.heads import Heads, TwoLayerHeads
from raycluster.run.config import Config
from raycluster.run.local_workers import LocalWorkers
from raycluster.run.loop import pretrain
from raycluster.types import Assignments, Block, LabelSet, UserError

LEARNING = ["training.head_lr=0.5", "training.head_momentum=0.9", "training.epochs=4", "method.reassign_every_epochs=4"]
FOUND = Assignments(6, (LabelSet(np.array([0, 1, 2, 0, -1, 0], np.int32), 3),))


def records(config: Config) -> list[dict]:
    return [event.record for event in pretrain(config, LocalWorkers()) if isinstance(event, Round)]


@pytest.mark.parametrize(
    "words",
    [
        ["method.descriptor=activations", "method.layer=conv2"],
        ["method.head=two_layers"],
        ["method.head=no_relu", "method.layer=conv3"],
        ["method.sampling=legacy"],
        ["views.train.vertical_flip=0.5", "views.train.fixed_crop=true"],
    ],
    ids=lambda words: words[0],
)
def test_variants_train(tiny: Callable[..., Config], tmp_path: Path, words: list[str]) -> None:
    (record,) = records(tiny(tmp_path, *LEARNING, *words))
    assert record["loss_over_chance"] < 0.98 and record["nmi_labels"] > 0.2


def test_features_after_the_relu_are_other_features(tiny: Callable[..., Config], tmp_path: Path) -> None:
    words = ["method.layer=conv2", "training.epochs=1"]
    labels = [
        records(tiny(tmp_path / kind, *words, f"method.descriptor={kind}"))[0]["assignments"]
        for kind in ("flat", "activations")
    ]
    assert len(set(labels)) == 2


def test_heads_by_hand() -> None:
    features = torch.tensor([[1.0, -2.0], [-3.0, 4.0]])
    linear, plain, two = (
        Method(head=head).heads(2, FOUND, auxiliary=(4,), seed=3) for head in ("linear", "no_relu", "two_layers")
    )
    assert isinstance(linear, Heads) and isinstance(plain, Heads) and isinstance(two, TwoLayerHeads)
    weight = linear.linear[0].weight
    assert torch.equal(weight, plain.linear[0].weight) and torch.equal(weight, two.heads.linear[0].weight)
    torch.testing.assert_close(linear(features)[0], features.relu() @ weight.T)
    torch.testing.assert_close(plain(features)[0], features @ weight.T)
    with torch.no_grad():
        two.hidden.weight.copy_(torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))
    torch.testing.assert_close(two(features)[0], torch.tensor([[0.0, 0.0], [4.0, 0.0]]) @ weight.T)
    assert [logits.shape for logits in two(features)] == [(2, 3), (2, 4)]


def test_the_hidden_layer_is_drawn_from_the_seed() -> None:
    one, same, other = (TwoLayerHeads(256, (5,), seed).hidden for seed in (1, 1, 2))
    assert torch.equal(one.weight, same.weight) and not torch.equal(one.weight, other.weight)
    assert one.weight.std().item() == pytest.approx(0.01, rel=0.02) and one.bias.eq(0).all()


CROSS = np.array([[5, 2], [1, 2], [3, 3], [3, 1]], np.float32)  # about (3, 2), with variances 2 and 1/2


def test_heads_start_as_centroids_by_hand() -> None:
    """Whitened, the points are (+-sqrt 2, 0) and (0, +-sqrt 2), so the four centroids are axes."""
    method = Method(num_clusters=4, descriptor="activations", pca_dim=2, head_start="centroids")
    features = LocalFeatures([Block(np.array([0, 2]), CROSS[[0, 2]]), Block(np.array([1, 3]), CROSS[[1, 3]])])
    context = AssignmentContext(4, round=0, seed=0, heads=torch.nn.Identity(), previous=None)
    found = method.assign(features, context)
    heads = method.heads(2, found, auxiliary=(4,), seed=3)
    assert isinstance(heads, Heads)
    labels = found.labels[0]
    logits = heads(torch.from_numpy(CROSS))[0][:, labels]
    expected = 2.5 * torch.tensor([[1, -1, 0, 0], [-1, 1, 0, 0], [0, 0, 1, -1], [0, 0, -1, 1.0]])
    torch.testing.assert_close(logits, expected, atol=1e-3, rtol=0)
    plain = Method(num_clusters=4).heads(2, found, auxiliary=(4,), seed=3)
    assert isinstance(plain, Heads) and torch.equal(heads.linear[1].weight, plain.linear[1].weight)


def test_heads_that_start_as_centroids_need_not_learn_the_clusters_anew(
    tiny: Callable[..., Config], tmp_path: Path
) -> None:
    words = ["method.layer=null", "method.descriptor=activations", *LEARNING[:2], "training.epochs=3"]
    random, centroids = (
        records(tiny(tmp_path / start, *words, f"method.head_start={start}"))[-1] for start in ("random", "centroids")
    )
    assert centroids["loss_over_chance"] < random["loss_over_chance"] - 0.05


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "seen layer None and descriptor flat; wanted layer null and descriptor activations for head linear"),
        ({"descriptor": "activations", "layer": "conv3"}, "seen layer conv3"),
        ({"descriptor": "activations", "head": "two_layers"}, "set head to linear"),
    ],
)
def test_centroids_of_features_that_heads_do_not_read_are_refused(options: dict[str, Any], says: str) -> None:
    Method(head="no_relu", head_start="centroids")
    with pytest.raises(ValidationError, match=says):
        Method(head_start="centroids", **options)


def test_heads_beside_adamw_need_a_rate_of_their_own(tiny: Callable[..., Config], tmp_path: Path) -> None:
    words = ["training.optimiser=adamw", "training.lr=1e-3", "training.weight_decay=0.05", "training.epochs=1"]
    with pytest.raises(UserError, match=r"training.head_lr: seen null with optimiser adamw"):
        records(tiny(tmp_path, *words))
    (record,) = records(tiny(tmp_path, *words, "training.head_lr=0.5"))
    assert record["loss_over_chance"] < 1.02


def test_the_legacy_sampler_weighs_every_sample_alike() -> None:
    method = Method(num_clusters=3, sampling="legacy")
    counts = method.visit_counts(FOUND, 12, np.random.default_rng(0))
    assert counts.sum() == 12 and counts[4] == 0
    assert method.sample_weights(FOUND).tolist() == [1, 1, 1, 1, 0, 1]
