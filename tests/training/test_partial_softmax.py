from __future__ import annotations

from collections.abc import Callable
from math import log
from pathlib import Path

import pytest
import torch

from raycluster.events import Round
from raycluster.run.local_workers import LocalWorkers
from raycluster.run.loop import pretrain
from raycluster.run.state import Config, validate_and_initialize
from raycluster.training.objective import Batch, CrossEntropy
from raycluster.training.partial_softmax import PartialSoftmax, choose, with_partial_softmax
from raycluster.training.rotation import RotationPrediction
from raycluster.types import UserError

GENERATOR = torch.Generator().manual_seed(0)
LABELS = torch.stack([torch.randint(0, size, (8,), generator=GENERATOR) for size in (50, 30)])
LABELS[0, 3] = -1
BATCH = Batch((), LABELS, torch.rand(8, generator=GENERATOR))


def scores() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, size, generator=generator).requires_grad_() for size in (50, 30)]


def gradients(objective: CrossEntropy) -> tuple[torch.Tensor, list[torch.Tensor]]:
    logits = scores()
    loss = objective.loss([logits], BATCH)
    loss.sum().backward()
    return loss.detach(), [one.grad for one in logits]


def test_over_all_clusters_it_is_cross_entropy_bitwise() -> None:
    (loss, grads), (expected, theirs) = gradients(PartialSoftmax(50, 4)), gradients(CrossEntropy())
    assert torch.equal(loss, expected)
    assert all(torch.equal(one, other) for one, other in zip(grads, theirs, strict=True))


def test_clusters_that_are_not_chosen_have_no_gradient() -> None:
    _, grads = gradients(PartialSoftmax(10, 8))
    for labels, grad in zip(LABELS, grads, strict=True):
        chosen = choose(labels, grad.shape[1], 10)
        assert chosen.sum() == 10 and chosen[labels[labels >= 0]].all()
        assert grad[:, ~chosen].eq(0).all()
        assert grad[labels >= 0][:, chosen].ne(0).all()


def test_by_hand() -> None:
    """Labels 2 and 0 of four clusters, none drawn: a softmax over clusters 0 and 2."""
    logits = torch.log(torch.tensor([[1.0, 9.0, 3.0, 9.0], [1.0, 9.0, 1.0, 9.0]]))
    batch = Batch((), torch.tensor([[2, 0]]), torch.ones(2))
    torch.testing.assert_close(PartialSoftmax(2, 2).loss([[logits]], batch), torch.tensor([log(4 / 3), log(2)]))
    assert PartialSoftmax(1, 2).loss([[logits]], batch).tolist() == pytest.approx([log(4 / 3), log(2)]), "never fewer"


def test_draws_follow_from_the_labels_of_the_microbatch_alone() -> None:
    objective, logits = PartialSoftmax(12, 4), scores()
    whole = objective.loss([logits], BATCH)
    for start in (0, 4):
        part = slice(start, start + 4)
        batch = Batch((), LABELS[:, part], BATCH.weights[part])
        torch.testing.assert_close(objective.loss([[one[part] for one in logits]], batch), whole[part])
    first, second = choose(LABELS[0, :4], 1000, 500), choose(LABELS[0, 4:], 1000, 500)
    assert first.sum() == second.sum() == 500 and 150 < (first & second).sum() < 350


def test_other_objectives_are_refused() -> None:
    with pytest.raises(UserError, match=r"training\.partial_softmax: seen 5; wanted null .* RotationPrediction"):
        with_partial_softmax(RotationPrediction(), 5, 8)


def test_a_run_with_part_of_the_clusters(tiny: Callable[..., Config], tmp_path: Path) -> None:
    words = ["training.partial_softmax=4", "method.num_clusters=100"]
    first, second = (
        event.record for event in pretrain(tiny(tmp_path / "run", *words), LocalWorkers()) if isinstance(event, Round)
    )
    assert log(4) < first["loss"] < log(50), "over the clusters of a microbatch, fewer than all"
    assert second["loss"] < first["loss"]
    with pytest.raises(UserError, match=r"training\.rotation: seen true; wanted false .* PartialSoftmax"):
        validate_and_initialize(tiny(tmp_path / "other", *words, "training.rotation=true"))
