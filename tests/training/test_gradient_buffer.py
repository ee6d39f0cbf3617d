from __future__ import annotations

import pytest
import torch
from torch import nn

from raycluster.training.gradient_buffer import FixedPoint, Sums
from raycluster.types import UserError


def _sums(values: torch.Tensor) -> Sums:
    sums = Sums([nn.Parameter(torch.zeros(len(values) - 1))], [], num_figures=1)
    sums.values.copy_(values)
    return sums


def test_gradients_are_views_whatever_the_memory_format() -> None:
    conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    sums = Sums(conv.parameters(), [5], num_figures=2)
    sums.clear()
    conv(torch.rand(1, 3, 3, 3).contiguous(memory_format=torch.channels_last)).sum().backward()
    assert conv.weight.grad is not None
    assert conv.weight.grad.stride() == conv.weight.stride()
    assert conv.weight.grad.untyped_storage().data_ptr() == sums.values.untyped_storage().data_ptr()
    torch.testing.assert_close(sums.gradients.sum(), conv.weight.grad.sum() + 4)  # four biases, each seen once
    assert [tuple(part.shape) for part in sums.statistics] == [(2, 5)]
    sums.add([torch.ones(2, 5)], torch.tensor([3.0, 4.0]))
    assert sums.statistics[0].eq(1).all()
    assert sums.figures.tolist() == [3, 4]


def test_any_order_gives_the_bitwise_identical_mean() -> None:
    terms = torch.randn(7, 1001) * torch.logspace(-6, 2, 1001)
    means = []
    for order in (range(7), reversed(range(7)), (3, 1, 6, 0, 5, 2, 4)):
        result = _sums(torch.zeros(1001))
        parts = [FixedPoint(result, 7) for _ in range(3)]
        for position, index in enumerate(order):
            parts[position % 3].add(_sums(terms[index]))
        parts[0].total += parts[1].total + parts[2].total
        parts[0].mean_into(result)
        means.append(result.values)
    assert torch.equal(means[0], means[1])
    assert torch.equal(means[0], means[2])
    torch.testing.assert_close(means[0], terms.double().mean(0).float(), atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1e9])
def test_what_does_not_fit_is_an_error_after_the_sum(bad: float) -> None:
    fixed = FixedPoint(_sums(torch.zeros(3)), 2)
    fixed.add(_sums(torch.tensor([1.0, bad, 0.0])))
    fixed.add(_sums(torch.tensor([1.0, 1.0, 0.0])))
    with pytest.raises(UserError, match="1 of 2 microbatches"):
        fixed.mean_into(_sums(torch.zeros(3)))
