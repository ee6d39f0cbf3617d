from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from raycluster.models.batchnorm import GhostBatchNorm


def _pair(channels: int, dims: int) -> tuple[GhostBatchNorm, nn.Module]:
    ghost = GhostBatchNorm(channels)
    reference = (nn.BatchNorm1d if dims == 2 else nn.BatchNorm2d)(channels)
    with torch.no_grad():
        ghost.weight.uniform_(0.5, 2)
        ghost.bias.normal_()
    reference.load_state_dict(ghost.state_dict(), strict=False)
    return ghost, reference


@pytest.mark.parametrize("shape", [(12, 5), (12, 5, 4, 3)])
@pytest.mark.parametrize("microbatch", [None, 3, 6, 12])
@pytest.mark.parametrize("channels_last", [False, True])
def test_equals_the_framework_group_by_group(
    shape: tuple[int, ...], microbatch: int | None, channels_last: bool
) -> None:
    ghost, reference = _pair(5, len(shape))
    ghost.microbatch = microbatch
    values = torch.randn(shape) * 3 + 1
    if channels_last and len(shape) == 4:
        values = values.contiguous(memory_format=torch.channels_last)
    ours, theirs = values.clone().requires_grad_(), values.clone().requires_grad_()
    upstream = torch.randn(shape)
    out = ghost(ours)
    expected = torch.cat([reference(part) for part in theirs.split(microbatch or 12)])
    torch.testing.assert_close(out, expected)
    (out * upstream).sum().backward()
    (expected * upstream).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    torch.testing.assert_close(ghost.weight.grad, reference.weight.grad)
    torch.testing.assert_close(ghost.bias.grad, reference.bias.grad)


@pytest.mark.parametrize("shape", [(32, 48), (32, 48, 3, 2), (32, 48, 6, 6)])  # of which the last has large groups
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_group_has_bitwise_the_result_that_it_has_alone(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    ghost, _ = _pair(shape[1], len(shape))
    ghost.microbatch = 8
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    values, upstream = (torch.randn(shape).to(dtype).contiguous(memory_format=layout) for _ in range(2))
    out, gradients, statistics = _pass(ghost, values, upstream)
    parts = [_pass(ghost, *rows) for rows in zip(values.split(8), upstream.split(8), strict=True)]
    assert out.stride() == values.stride() and gradients[0].stride() == values.stride()
    assert torch.equal(out, torch.cat([part[0] for part in parts]))
    assert torch.equal(gradients[0], torch.cat([part[1][0] for part in parts]))
    for mine, alone in zip(gradients[1:], zip(*(part[1][1:] for part in parts), strict=True), strict=True):
        assert torch.equal(mine, torch.stack(alone).sum(0))
    assert torch.equal(statistics, torch.stack([part[2] for part in parts]).sum(0))


def _pass(ghost: GhostBatchNorm, values: Tensor, upstream: Tensor) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    """Output, gradients of values, weight and bias, and statistics."""
    ghost.statistics, values = None, values.detach().requires_grad_()
    out = ghost(values)
    assert ghost.statistics is not None
    return out.detach(), torch.autograd.grad(out, (values, ghost.weight, ghost.bias), upstream), ghost.statistics


def test_an_in_place_operation_may_follow() -> None:
    ghost = GhostBatchNorm(3)
    ghost.microbatch = 4
    values = torch.randn(8, 3, 2, 2, requires_grad=True)
    gradients = [torch.autograd.grad(relu(ghost(values)).sum(), values)[0] for relu in (torch.relu, torch.relu_)]
    assert torch.equal(*gradients)


def test_gradient_in_double_precision() -> None:
    ghost = GhostBatchNorm(3).double()
    ghost.microbatch = 4
    values = torch.randn(8, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ghost(x), (values,))


def test_statistics_are_summed_over_groups_and_applied_only_by_update() -> None:
    ghost = GhostBatchNorm(3)
    ghost.microbatch = 4
    values = torch.randn(8, 3, 2, 2) * 2 + 5
    ghost(values)
    groups = [part.transpose(0, 1).flatten(1) for part in values.split(4)]
    expected = torch.stack((sum(g.mean(1) for g in groups), sum(g.var(1) for g in groups)))
    assert ghost.statistics is not None
    torch.testing.assert_close(ghost.statistics, expected)
    assert ghost.running_mean.eq(0).all()
    assert ghost.running_var.eq(1).all()
    ghost.update(expected / 2)
    torch.testing.assert_close(ghost.running_mean, 0.1 * expected[0] / 2)
    torch.testing.assert_close(ghost.running_var, 0.9 + 0.1 * expected[1] / 2)


def test_one_group_updates_like_the_framework() -> None:
    ghost, reference = _pair(4, 4)
    values = torch.randn(6, 4, 3, 3)
    reference(values)
    ghost(values)
    assert ghost.statistics is not None
    ghost.update(ghost.statistics)
    torch.testing.assert_close(ghost.running_mean, reference.running_mean)
    torch.testing.assert_close(ghost.running_var, reference.running_var)


def test_evaluation_uses_running_statistics() -> None:
    ghost, reference = _pair(4, 4)
    values = torch.randn(6, 4, 3, 3)
    torch.testing.assert_close(ghost.eval()(values), reference.eval()(values))
    assert ghost.statistics is None


def test_constant_channel_has_variance_zero() -> None:
    ghost = GhostBatchNorm(1)
    assert torch.isfinite(ghost(torch.full((4, 1, 2, 2), 7.0))).all()
    assert ghost.statistics is not None
    assert 0 <= ghost.statistics[1].item() < 1e-6


@pytest.mark.parametrize(("rows", "microbatch"), [(7, 4), (1, None), (3, 1)])
def test_rows_that_cannot_be_grouped_are_named(rows: int, microbatch: int | None) -> None:
    ghost = GhostBatchNorm(2)
    ghost.microbatch = microbatch
    with pytest.raises(ValueError, match=f"{rows} rows"):
        ghost(torch.randn(rows, 2))


def test_half_precision_keeps_statistics_in_single() -> None:
    ghost = GhostBatchNorm(3)
    ghost.microbatch = 4
    out = ghost(torch.randn(8, 3, 4, 4).bfloat16())
    assert out.dtype == torch.bfloat16
    assert ghost.statistics is not None
    assert ghost.statistics.dtype == torch.float32
