from __future__ import annotations

from math import log
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from raycluster.models.heads import HierarchicalHeads
from raycluster.training.hierarchical import CartesianCrossEntropy, HierarchicalCrossEntropy
from raycluster.training.objective import Batch, CrossEntropy
from raycluster.training.rotation import draw_rotations, rotate_rows
from tests.training.hierarchy import PARENTS, microbatches, train, worker

FEATURES = torch.tensor([[1.0, 2.0], [0.0, 1.0], [-1.0, 0.5]])
WEIGHTS = [[[1, 0], [0, 1]], [[1, 1], [0, 0], [2, -1]], [[0.5, 0], [0, -1]]]
LABELS = torch.tensor([[2, 4, 0], [0, 1, 0]])  # clusters, of which three belong to the first super-cluster; and these
HAND = np.repeat(np.arange(2), (3, 2))


def heads_by_hand() -> HierarchicalHeads:
    """They read FEATURES + 1, which their ReLU leaves alone; their bias takes the 1 away."""
    heads = HierarchicalHeads(2, (2, 3, 2), seed=0)
    with torch.no_grad():
        for layer, weight in zip(heads.linear, WEIGHTS, strict=True):
            layer.weight.copy_(torch.tensor(weight))
            layer.bias.copy_(-layer.weight.sum(1))
    return heads


def rows_by_hand(heads: HierarchicalHeads, rows: slice) -> tuple[list[Tensor], Batch]:
    batch = HierarchicalCrossEntropy(HAND, rotations=False).expand(
        Batch((), LABELS[:, rows], torch.ones(LABELS[:, rows].shape[1]))
    )
    heads.super_classes = batch.labels[0]
    return heads(FEATURES[rows] + 1), batch


def test_loss_and_gradients_by_hand() -> None:
    heads = heads_by_hand()
    outputs, batch = rows_by_hand(heads, slice(None))
    assert batch.labels.tolist() == [[0, 1, 0], [2, 1, 0]]
    pairs = zip(outputs, batch.labels, strict=True)
    each = [functional.cross_entropy(scores, wanted, reduction="none") for scores, wanted in pairs]
    assert each[0].tolist() == pytest.approx([1.313262, 0.313262, 1.701413], abs=1e-6)
    assert each[1].tolist() == pytest.approx([3.094923, 1.313262, 1.023909], abs=1e-6)
    loss = HierarchicalCrossEntropy(HAND, rotations=False).loss([outputs], batch).mean()
    assert loss.item() == pytest.approx(2.920010, abs=1e-6)
    loss.backward()
    expected = [
        [[0.028839, -0.533988], [-0.028839, 0.533988]],
        [[0.516752, 0.499493], [-0.182308, 0.128886], [-0.334444, -0.628379]],
        [[0, 0.243686], [0, -0.243686]],
    ]
    for layer, gradient in zip(heads.linear, expected, strict=True):
        found = layer.weight.grad - layer.bias.grad[:, None]  # with respect to FEATURES
        torch.testing.assert_close(found, torch.tensor(gradient), atol=1e-6, rtol=0)


def test_parts_of_a_batch_add_up() -> None:
    heads, objective = heads_by_hand(), HierarchicalCrossEntropy(HAND, rotations=False)
    whole, *parts = (
        objective.loss([outputs], batch)
        for outputs, batch in (rows_by_hand(heads, rows) for rows in (slice(None), slice(0, 1), slice(1, 3)))
    )
    torch.testing.assert_close(torch.cat(parts), whole)


def test_rows_get_the_head_of_their_super_class_in_any_order() -> None:
    heads, features = HierarchicalHeads(6, (3, 4, 2, 5), seed=0), torch.randn(20, 6)
    heads.super_classes = torch.randint(-1, 3, (20,))
    first, own = heads(features)
    torch.testing.assert_close(first, heads.linear[0](features.relu()))
    for row, group in enumerate(heads.super_classes.clamp(min=0).tolist()):
        expected = heads.linear[1 + group](features[row].relu())
        torch.testing.assert_close(own[row, : len(expected)], expected)
        assert (own[row, len(expected) :] == -torch.inf).all()


def test_with_the_rotation_as_super_class_the_chain_rule_gives_the_joint_loss() -> None:
    joint, clusters, rotations = torch.randn(9, 5, 4), torch.randint(5, (9,)), torch.randint(4, (9,))
    cartesian = CartesianCrossEntropy(5, rotations=True)
    flat = Batch((), cartesian.classes(clusters, rotations), torch.ones(9))
    hierarchical = HierarchicalCrossEntropy(np.zeros(5, np.int64), rotations=True)
    nested = Batch((), hierarchical.classes(clusters, rotations), torch.ones(9))
    inner = joint[torch.arange(9), :, rotations]
    torch.testing.assert_close(
        hierarchical.loss([[joint.logsumexp(1), inner]], nested), cartesian.loss([[joint.flatten(1)]], flat)
    )
    assert cartesian.chance(()) == pytest.approx(hierarchical.chance(())) == pytest.approx(log(20))


def test_one_super_class_is_plain_cross_entropy() -> None:
    scores, labels, weights = torch.randn(7, 5), torch.randint(-1, 5, (1, 7)), torch.rand(7)
    plain = CrossEntropy().loss([[scores]], Batch((), labels, weights))
    objective = HierarchicalCrossEntropy(np.zeros(5, np.int64), rotations=False)
    batch = objective.expand(Batch((), labels, weights))
    assert torch.equal(objective.loss([[torch.zeros(7, 1), scores]], batch), plain)
    flat = CartesianCrossEntropy(5, rotations=False)
    assert torch.equal(flat.loss([[scores]], flat.expand(Batch((), labels, weights))), plain)
    assert flat.measure([[scores]], batch).shape == (0, 7)


def test_each_row_is_rotated_as_its_microbatch_says() -> None:
    batches = microbatches(0)
    images, labels = torch.cat([one.images for one in batches]), torch.cat([one.labels for one in batches], 1)
    batch = Batch((images, images.flip(2)), labels, torch.ones(48), tuple(one.seed for one in batches))
    rotations = draw_rotations(batch)
    assert np.bincount(rotations, minlength=4).min() > 4
    alone = Batch((), labels[:, 16:24], torch.ones(8), batch.seeds[2:3])
    assert torch.equal(draw_rotations(alone), rotations[16:24]), "it does not matter what is computed together"
    for row, rotated in enumerate(rotate_rows(images, rotations)):
        assert np.array_equal(rotated, np.rot90(images[row], rotations[row]))
    expanded = HierarchicalCrossEntropy(PARENTS, rotations=True).expand(batch)
    assert torch.equal(expanded.images[1], rotate_rows(images.flip(2), rotations))
    included = labels[0] >= 0
    wanted = (4 * labels[1] + rotations)[included]
    assert torch.equal(expanded.labels[0][included], wanted) and (expanded.labels[:, ~included] == -1).all()
    inside = expanded.labels[1][included]
    assert torch.equal(torch.tensor([0, 4, 5])[labels[1][included]] + inside, labels[0][included])


def test_accuracies_by_hand() -> None:
    """Super-classes 4 c + r: right, right rotation of the wrong super-cluster, wrong rotation, no part."""
    objective = HierarchicalCrossEntropy(HAND, rotations=True)
    scores = functional.one_hot(torch.tensor([5, 1, 4, 0]), 8).float()
    batch = Batch((), torch.tensor([[5, 5, 5, -1], [0, 0, 0, -1]]), torch.tensor([1.0, 1.0, 1.0, 0.0]))
    assert objective.metrics == ("super_accuracy", "rotation_accuracy")
    assert objective.measure([[scores]], batch).tolist() == [[1, 0, 0, 0], [1, 1, 0, 0]]
    assert objective.chance(()) == pytest.approx(log(8) + (log(3) + log(2)) / 2)


@pytest.mark.slow
def test_training_is_bitwise_identical_for_any_split_of_microbatches(tmp_path: Path) -> None:
    """Exact mode bitwise; with gradients averaged by DistributedDataParallel, to rounding; heads without rows too."""
    exact, fast = train("exact"), train("fast")
    assert all((exact[key] - fast[key]).abs().max() < 1e-5 for key in exact)
    torch.multiprocessing.spawn(worker, (2, str(tmp_path)), nprocs=2)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert all(torch.equal(found["exact"][key], exact[key]) for key in exact)
        assert all((found["wrapped"][key] - fast[key]).abs().max() < 1e-5 for key in fast)
