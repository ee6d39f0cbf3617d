from __future__ import annotations

from math import log

import numpy as np
import pytest
import torch

from raycluster.models.heads import Heads
from raycluster.models.smallnet import Model
from raycluster.training.objective import Batch, CrossEntropy
from raycluster.training.optimiser import Optimisers
from raycluster.training.rotation import (
    CrossEntropyWithRotation,
    RotationPrediction,
    rotate_batch,
    with_rotation,
)
from raycluster.training.step import Microbatch, Network, Step
from raycluster.types import UserError
from tests.training.partition import settings


def test_copies_are_rotated_anticlockwise_and_only_the_upright_one_keeps_its_labels() -> None:
    images = torch.randint(256, (2, 5, 5, 3), dtype=torch.uint8)
    labels, weights = torch.tensor([[7, -1], [3, -1]]), torch.tensor([1.0, 0.0])
    (copies,), targets, shares, *_ = rotate_batch(Batch((images,), labels, weights))
    for row in range(2):
        for turns in range(4):
            assert np.array_equal(copies[4 * row + turns], np.rot90(images[row], turns))
    none = [-1] * 4
    assert targets.tolist() == [[7, -1, -1, -1, *none], [3, -1, -1, -1, *none], [0, 1, 2, 3, *none]]
    assert shares.tolist() == [1] * 4 + [0] * 4


def test_loss_by_hand() -> None:
    """Two heads of two clusters that give label 0 odds of 3 and 1, turns of equal odds but for the second copy's."""
    heads = [torch.tensor([[log(odds), 0.0]]).repeat(4, 1) for odds in (3.0, 1.0)]
    turns = torch.zeros(4, 4)
    turns[1, 1] = log(3.0)
    labels = torch.tensor([[0, -1, -1, -1], [0, -1, -1, -1], [0, 1, 2, 3]])
    objective, batch = CrossEntropyWithRotation(), Batch((), labels, torch.ones(4))
    rows = objective.loss([[*heads, turns]], batch)
    cluster = (log(4 / 3) + log(2)) / 2
    torch.testing.assert_close(rows, torch.tensor([4 * cluster + log(4), log(2), log(4), log(4)]))
    assert rows.mean().item() == pytest.approx(cluster + (3 * log(4) + log(2)) / 4)
    assert objective.measure([[*heads, turns]], batch).tolist() == [[1, 1, 0, 0]], "ties are rotation 0"


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_a_step_minimises_both(mode: str) -> None:
    chosen, objective = settings(mode), with_rotation(CrossEntropy())
    assert objective.auxiliary == (4,)
    backbone = Model(widths=(8, 16)).build(0)
    heads = Heads(16, (5, *objective.auxiliary), 0)
    step = Step(Network(backbone, heads), Optimisers(backbone, heads, chosen), chosen, objective=objective)
    generator = torch.Generator().manual_seed(0)
    batches = []
    for stream in range(6):
        images = torch.randint(256, (8, 8, 8, 3), generator=generator, dtype=torch.uint8)
        images[:, :4] //= 4  # dark above: turns can be told
        batches.append(Microbatch(images, torch.randint(5, (1, 8), generator=generator), torch.ones(8), stream))
    first = step(batches, epoch=0)
    assert first.loss == pytest.approx(log(5) + log(4), rel=0.05)
    assert first.weight == pytest.approx(1)
    for _ in range(60):
        last = step(batches, epoch=0)
    assert last.loss < log(5) + log(4) - 1
    assert last.metrics["rotation_accuracy"] > 0.3


def test_rotation_alone_needs_no_labels() -> None:
    objective, chosen = RotationPrediction(), settings("fast")
    images, labels = torch.randint(256, (8, 8, 8, 3), dtype=torch.uint8), torch.zeros(0, 8, dtype=torch.int64)
    weights = torch.ones(8)
    weights[3] = 0  # an image that cannot be read
    expanded = objective.expand(Batch((images,), labels, weights))
    assert expanded.labels.tolist() == [[0, 1, 2, 3] * 3 + [-1] * 4 + [0, 1, 2, 3] * 4]
    backbone = Model(widths=(8, 16)).build(0)
    heads = Heads(16, objective.auxiliary, 0)
    step = Step(Network(backbone, heads), Optimisers(backbone, heads, chosen), chosen, objective=objective)
    result = step([Microbatch(images, labels, weights, seed) for seed in range(6)], epoch=0)
    assert result.loss == pytest.approx(log(4), rel=0.05) and result.weight == pytest.approx(7 / 8)


def test_rotation_beside_an_objective_of_another_kind_is_refused() -> None:
    with pytest.raises(UserError, match=r"training\.rotation: seen true; wanted false .* RotationPrediction"):
        with_rotation(RotationPrediction())
