from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn

from raycluster.models.heads import Heads
from raycluster.training.config import LayerSettings, TrainingSettings
from raycluster.training.lars import LARS
from raycluster.training.objective import CrossEntropy
from raycluster.training.optimiser import Optimisers, layer_names, rate
from raycluster.training.rotation import with_rotation
from raycluster.training.step import Step
from tests.training.partition import CLUSTERS, microbatches, network, settings


def test_constant_rate_after_warmup() -> None:
    settings = TrainingSettings(warmup_epochs=2)
    assert [rate(settings, epoch) for epoch in (0, 0.5, 1, 2, 50)] == [0, 0.25, 0.5, 1, 1]


def test_cosine_rate() -> None:
    settings = TrainingSettings(schedule="cosine", epochs=10)
    assert [rate(settings, epoch) for epoch in (0, 5, 10)] == pytest.approx([1, 0.5, 0])


def test_step_rate() -> None:
    settings = TrainingSettings(schedule="step", milestones=(2, 4), epochs=10)
    assert [rate(settings, epoch) for epoch in (1.99, 2, 3.99, 4)] == pytest.approx([1, 0.1, 0.1, 0.01])


def _body_and_heads() -> tuple[nn.Linear, Heads]:
    body, heads = nn.Linear(2, 2), Heads(2, (3,), 0)
    for parameter in (*body.parameters(), *heads.parameters()):
        parameter.grad = torch.ones_like(parameter)
    return body, heads


def test_backbone_keeps_momentum_when_heads_are_new() -> None:
    body, heads = _body_and_heads()
    optimisers = Optimisers(body, heads, TrainingSettings(lr=1.0, weight_decay=0, momentum=0.5))
    start, first = body.weight.detach().clone(), heads.linear[0].weight.detach().clone()
    optimisers.step(0)
    optimisers.step(0)
    torch.testing.assert_close(start - body.weight, torch.full((2, 2), 2.5))
    torch.testing.assert_close(first - heads.linear[0].weight, torch.full((3, 2), 2.0))
    _, fresh = _body_and_heads()
    optimisers.new_heads(fresh)
    before = body.weight.detach().clone()
    optimisers.step(0)
    torch.testing.assert_close(before - body.weight, torch.full((2, 2), 1.75))
    assert not torch.equal(fresh.linear[0].bias, torch.zeros(3))


def test_heads_have_their_own_rate() -> None:
    body, heads = _body_and_heads()
    Optimisers(body, heads, TrainingSettings(lr=1.0, head_lr=0.25, weight_decay=0)).step(0)
    torch.testing.assert_close(heads.linear[0].bias.detach(), torch.full((3,), -0.25))


@pytest.mark.parametrize("rotation", [False, True])
def test_each_of_two_heads_learns_as_if_it_were_alone(rotation: bool) -> None:
    """Equal heads with equal labels: the mean over both, and its gradients, are those of one."""
    chosen = settings("exact", head_lr=0.5, head_momentum=0.9, weight_decay=1e-3)
    auxiliary = (4,) if rotation else ()
    networks = [network(), network()]
    for one, copies in zip(networks, (1, 2), strict=True):
        one.heads = Heads(32, (*CLUSTERS[:1] * copies, *auxiliary), 2, averaged=copies)
    with torch.no_grad():
        for mine, theirs in zip((0, 1, -1), (0, 0, -1), strict=True):
            networks[1].heads.linear[mine].load_state_dict(networks[0].heads.linear[theirs].state_dict())
    for one, copies in zip(networks, (1, 2), strict=True):
        objective = with_rotation(CrossEntropy()) if rotation else CrossEntropy()
        step = Step(one, Optimisers(one.backbone, one.heads, chosen), chosen, objective=objective)
        for number in range(3):
            batches = [batch._replace(labels=batch.labels[:1].repeat(copies, 1)) for batch in microbatches(number)]
            step(batches, epoch=0)
    alone, both = networks
    for mine, theirs in zip((0, 1, -1), (0, 0, -1), strict=True):
        torch.testing.assert_close(both.heads.linear[mine].weight, alone.heads.linear[theirs].weight)
    torch.testing.assert_close(both.backbone.state_dict(), alone.backbone.state_dict())


def test_lars_by_hand() -> None:
    """|w| = 5, |g| = 2, decay 0.5: r = 0.001 * 5 / (2 + 2.5), and momentum adds up what is scaled."""
    weight = nn.Parameter(torch.tensor([3.0, 4.0]))
    bias = nn.Parameter(torch.zeros(1))
    optimiser = LARS([weight, bias], 2.0, momentum=0.5, weight_decay=0.5)
    weight.grad, bias.grad = torch.tensor([0.0, 2.0]), torch.tensor([0.25])
    optimiser.step()
    moved = 0.005 / 4.5 * torch.tensor([1.5, 4.0])
    torch.testing.assert_close(weight.detach(), torch.tensor([3.0, 4.0]) - 2 * moved)
    torch.testing.assert_close(bias.detach(), torch.tensor([-0.5]))  # at zero, it has no scale: plain SGD
    before = weight.detach().clone()
    weight.grad, bias.grad = torch.zeros(2), torch.zeros(1)
    optimiser.step()
    torch.testing.assert_close(before - weight.detach(), 2 * 0.5 * moved)


def test_adamw_of_the_body_is_the_framework_s() -> None:
    settings = TrainingSettings(optimiser="adamw", lr=0.01, momentum=0.8, weight_decay=0.1, head_lr=0.5)
    body, heads = _body_and_heads()
    other = deepcopy(body)
    for parameter in other.parameters():
        parameter.grad = torch.ones_like(parameter)
    ours = Optimisers(body, heads, settings)
    theirs = torch.optim.AdamW(other.parameters(), 0.01, betas=(0.8, 0.999), weight_decay=0.1)
    for _ in range(3):
        ours.step(0)
        theirs.step()
    assert torch.equal(body.weight, other.weight)
    torch.testing.assert_close(heads.linear[0].bias.detach(), torch.full((3,), -1.42625))  # SGD with weight decay


@pytest.mark.parametrize("optimiser", ["sgd", "adamw", "lars"])
def test_state_continues(optimiser: Any) -> None:
    settings = TrainingSettings(head_momentum=0.9, optimiser=optimiser)
    body, heads = _body_and_heads()
    optimisers, gradient = Optimisers(body, heads, settings), torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    body.weight.grad = gradient.clone()
    optimisers.step(0)
    state, weights = deepcopy(optimisers.state_dict()), body.weight.detach().clone()
    body.weight.grad = gradient.clone()
    optimisers.step(0)
    expected = body.weight.detach().clone()
    with torch.no_grad():
        body.weight.copy_(weights)
    body.weight.grad = gradient.clone()
    again = Optimisers(body, heads, settings)
    again.load_state_dict(state)
    again.step(0)
    assert torch.equal(body.weight, expected)


def test_loss_scale_shrinks_on_overflow_and_grows_after_quiet() -> None:
    optimisers = Optimisers(*_body_and_heads(), TrainingSettings(precision="fp16"))
    scale = optimisers.loss_scale
    assert not optimisers.check_overflow(torch.tensor([1.0, float("nan")]))
    assert not optimisers.check_overflow(torch.tensor([float("inf")]))
    assert optimisers.loss_scale == scale / 4
    assert all(optimisers.check_overflow(torch.ones(2)) for _ in range(2000))
    assert optimisers.loss_scale == scale / 2


def test_step_rate_with_a_factor_for_each_milestone() -> None:
    settings = TrainingSettings(schedule="step", milestones=(75, 85, 92, 100), decay=(0.4, 0.25, 0.4, 0.25), epochs=110)
    assert [rate(settings, epoch) for epoch in (74, 75, 85, 92, 100)] == pytest.approx([1, 0.4, 0.1, 0.04, 0.01])


class _TwoLayers(nn.Module):
    """`body.one` and `body.two`, as a backbone has them, with gradients of 1."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential()
        for name in ("one", "two"):
            self.body.add_module(name, nn.Sequential(nn.Linear(2, 2)))
        for parameter in self.parameters():
            nn.init.constant_(parameter, 10.0)
            parameter.grad = torch.ones_like(parameter)


def test_layers_have_their_own_rate_and_weight_decay() -> None:
    """By hand, one step of SGD at rate 1 * factor from 10: 10 - factor * (1 + decay * 10)."""
    body, heads = _TwoLayers(), Heads(2, (3,), 0)
    heads.linear[0].bias.grad = torch.ones(3)
    layers = {
        "two": LayerSettings(lr_factor=0.5, weight_decay=0.04),
        "biases": LayerSettings(lr_factor=2, weight_decay=0),
        "heads": LayerSettings(lr_factor=0.25, weight_decay=0.1),
    }
    optimisers = Optimisers(body, heads, TrainingSettings(lr=1.0, weight_decay=0.01, layers=layers))
    assert layer_names(body) == ["one", "two", "heads", "biases"]
    for _ in range(2):  # the second at the same rates, from the same place
        with torch.no_grad():
            for parameter in (*body.parameters(), heads.linear[0].bias):
                parameter.fill_(10.0)
        optimisers.body.state.clear()
        optimisers.step(0)
        found = [float(parameter.flatten()[0].detach()) for parameter in body.parameters()]
        assert found == pytest.approx([10 - 1.1, 10 - 2, 10 - 0.5 * 1.4, 10 - 1])
        assert heads.linear[0].bias.tolist() == pytest.approx([10 - 0.25 * 2] * 3)


def test_layers_that_do_not_differ_leave_one_group() -> None:
    optimisers = Optimisers(*_body_and_heads(), TrainingSettings())
    assert len(optimisers.body.param_groups) == len(optimisers.head.param_groups) == 1


def test_a_factor_for_each_milestone_is_wanted() -> None:
    with pytest.raises(ValueError, match=r"decay \[0\.4\] must hold a factor for each of milestones \[2\.0, 4\.0\]"):
        TrainingSettings(schedule="step", milestones=(2, 4), decay=(0.4,), epochs=10)
