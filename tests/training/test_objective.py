from __future__ import annotations

from math import log

import pytest
import torch
from torch.nn import functional

from raycluster.models.heads import Heads
from raycluster.models.smallnet import Model
from raycluster.training.objective import Batch, CrossEntropy, cross_entropy
from raycluster.training.rotation import CrossEntropyWithRotation, RotationPrediction


def test_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0], [0.0, log(3.0)]])
    rows = cross_entropy([logits], torch.tensor([[0, 1]]), torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(rows, torch.tensor([log(2), 2 * log(4 / 3)]))


def test_heads_are_averaged_and_rows_add_up_to_the_framework() -> None:
    logits, labels = [torch.randn(6, 4), torch.randn(6, 9)], torch.stack((torch.arange(6) % 4, torch.arange(6)))
    expected = sum(functional.cross_entropy(scores, target) for scores, target in zip(logits, labels, strict=True)) / 2
    torch.testing.assert_close(cross_entropy(logits, labels, torch.ones(6)).mean(), expected)


def test_ignored_rows_add_nothing_and_get_no_gradient() -> None:
    logits = torch.randn(3, 4, requires_grad=True)
    rows = cross_entropy([logits], torch.tensor([[1, -1, -100]]), torch.ones(3))
    rows.sum().backward()
    assert rows[1:].eq(0).all()
    assert logits.grad is not None
    assert logits.grad[1:].eq(0).all()
    assert cross_entropy([logits], torch.tensor([[1, 1, 1]]), torch.zeros(3)).eq(0).all()


@pytest.mark.parametrize("num_clusters", [10, 100, 1000])
def test_fresh_heads_know_nothing(num_clusters: int) -> None:
    backbone, images = Model().build(0), torch.rand(16, 3, 32, 32)
    logits = Heads(backbone.num_features, (num_clusters,), 0)(backbone(images))
    labels = torch.randint(0, num_clusters, (1, 16))
    loss = cross_entropy(logits, labels, torch.ones(16)).mean().item()
    assert loss == pytest.approx(log(num_clusters), rel=0.05)


def test_label_sets_have_their_weights_in_the_mean() -> None:
    logits = [torch.randn(6, 3), torch.randn(6, 5)]
    labels = torch.stack([torch.randint(3, (6,)), torch.randint(5, (6,))])
    each = [functional.cross_entropy(scores, target) for scores, target in zip(logits, labels, strict=True)]
    rows = CrossEntropy((3.0, 1.0)).loss([logits], Batch((), labels, torch.ones(6)))
    torch.testing.assert_close(rows.mean(), (3 * each[0] + each[1]) / 4)


def test_chance_is_the_mean_over_label_sets_plus_auxiliary_heads() -> None:
    assert CrossEntropy().chance((3000,)) == pytest.approx(log(3000))
    assert CrossEntropyWithRotation().chance((10, 1000)) == pytest.approx(log(10_000) / 2 + log(4))
    assert RotationPrediction().chance(()) == pytest.approx(log(4)) and CrossEntropy().chance((1,)) == 0
