from __future__ import annotations

from collections.abc import Callable
from math import log
from pathlib import Path

import pytest
import torch

from raycluster.events import Round
from raycluster.models.heads import Heads
from raycluster.run.config import Config
from raycluster.run.local_workers import LocalWorkers
from raycluster.run.loop import pretrain
from raycluster.run.validation import validate_and_initialize
from raycluster.training.objective import Batch, CrossEntropy, cross_entropy
from raycluster.training.partial_softmax import PartialSoftmax, choose, with_partial_softmax
from raycluster.training.rotation import RotationPrediction
from raycluster.types import UserError

GENERATOR = torch.Generator().manual_seed(0)
SIZES = (50, 30)
LABELS = torch.stack([torch.randint(0, size, (8,), generator=GENERATOR) for size in SIZES])
LABELS[0, 3] = -1
BATCH = Batch((), LABELS, torch.rand(8, generator=GENERATOR), seeds=(5,))
FEATURES = torch.randn(8, 16, generator=GENERATOR)


def run(objective: CrossEntropy, batch: Batch = BATCH, features: torch.Tensor = FEATURES) -> tuple[Heads, torch.Tensor]:
    """Heads after a step, and the loss of each row."""
    heads, expanded = Heads(16, SIZES, seed=3), objective.expand(batch)
    with torch.no_grad():
        for layer in heads.linear:
            layer.weight.mul_(30)
    for parameter in heads.parameters():
        parameter.grad = torch.zeros_like(parameter)
    heads.chosen = expanded.chosen
    loss = objective.loss([heads(features)], expanded)
    loss.sum().backward()
    return heads, loss.detach()


def test_over_all_clusters_it_is_cross_entropy_bitwise() -> None:
    (heads, loss), (expected_heads, expected) = run(PartialSoftmax(50, SIZES)), run(CrossEntropy())
    assert torch.equal(loss, expected)
    for one, other in zip(heads.parameters(), expected_heads.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    assert with_partial_softmax(objective := CrossEntropy(), 50, SIZES) is objective


def test_only_chosen_clusters_are_computed_and_have_gradients() -> None:
    objective = PartialSoftmax(10, SIZES)
    heads, _ = run(objective)
    for labels, layer, chosen in zip(LABELS, heads.linear, objective.expand(BATCH).chosen, strict=True):
        (ids,) = chosen
        assert len(ids) == 10 and torch.isin(labels[labels >= 0], ids).all()
        others = ~torch.isin(torch.arange(layer.out_features), ids)
        assert layer.weight.grad[others].eq(0).all() and layer.bias.grad[others].eq(0).all()
        assert layer.weight.grad[ids].ne(0).any(1).all()
    assert [tuple(scores.shape) for scores in heads(FEATURES)] == [(8, 10), (8, 10)]


def test_it_is_cross_entropy_of_the_chosen_columns() -> None:
    objective = PartialSoftmax(10, SIZES)
    _, loss = run(objective)
    chosen = [ids for (ids,) in objective.expand(BATCH).chosen]
    heads, _ = run(CrossEntropy())
    heads.chosen = ()
    kept = [
        torch.zeros(size, dtype=torch.bool).index_fill_(0, ids, True) for size, ids in zip(SIZES, chosen, strict=True)
    ]
    logits = [scores.masked_fill(~mask, -torch.inf) for scores, mask in zip(heads(FEATURES), kept, strict=True)]
    torch.testing.assert_close(loss, cross_entropy(logits, LABELS, BATCH.weights))


def test_by_hand() -> None:
    """Labels 2 and 0 of four clusters, none drawn: a softmax over clusters 0 and 2."""
    batch = PartialSoftmax(1, (4,)).expand(Batch((), torch.tensor([[2, 0]]), torch.ones(2), seeds=(0,)))
    assert [ids.tolist() for (ids,) in batch.chosen] == [[0, 2]], "never fewer than the labels"
    assert batch.labels.tolist() == [[1, 0]]
    logits = torch.log(torch.tensor([[1.0, 3.0], [1.0, 1.0]]))
    assert CrossEntropy().loss([[logits]], batch).tolist() == pytest.approx([log(4 / 3), log(2)])


@pytest.mark.parametrize("num_chosen", [2, 12])
def test_draws_follow_from_the_labels_of_the_microbatch_alone(num_chosen: int) -> None:
    objective = PartialSoftmax(num_chosen, SIZES)
    together, whole = run(objective, BATCH._replace(seeds=(5, 6)))
    gradients = [torch.zeros_like(parameter) for parameter in together.parameters()]
    for start in (0, 4):
        part = slice(start, start + 4)
        batch = Batch((), LABELS[:, part], BATCH.weights[part], seeds=(5,))
        heads, loss = run(objective, batch, FEATURES[part])
        torch.testing.assert_close(loss, whole[part])
        gradients = [total + parameter.grad for total, parameter in zip(gradients, heads.parameters(), strict=True)]
    for parameter, expected in zip(together.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, expected)
    first, second = choose(LABELS[0, :4], 1000, 500), choose(LABELS[0, 4:], 1000, 500)
    assert len(first) == len(second) == 500 and 150 < torch.isin(first, second).sum() < 350


def test_other_objectives_are_refused() -> None:
    with pytest.raises(UserError, match=r"training\.partial_softmax: seen 5; wanted null .* RotationPrediction"):
        with_partial_softmax(RotationPrediction(), 5, (8,))


def test_a_run_with_part_of_the_clusters(tiny: Callable[..., Config], tmp_path: Path) -> None:
    words = ["training.partial_softmax=4", "method.num_clusters=100"]
    first, second = (
        event.record for event in pretrain(tiny(tmp_path / "run", *words), LocalWorkers()) if isinstance(event, Round)
    )
    assert log(4) < first["loss"] < log(50), "over the clusters of a microbatch, fewer than all"
    assert second["loss"] < first["loss"]
    with pytest.raises(UserError, match=r"training\.rotation: seen true; wanted false .* PartialSoftmax"):
        validate_and_initialize(tiny(tmp_path / "other", *words, "training.rotation=true"))
