from __future__ import annotations

import pytest
import torch

from raycluster.models.heads import Heads


def test_relu_then_one_linear_layer_each() -> None:
    heads, features = Heads(6, (3, 5), seed=0), torch.randn(4, 6)
    first, second = heads(features)
    torch.testing.assert_close(first, features.relu() @ heads.linear[0].weight.T)
    assert second.shape == (4, 5)


def test_weights_come_from_the_seed() -> None:
    one, same, other = (Heads(512, (100,), seed).linear[0] for seed in (1, 1, 2))
    assert torch.equal(one.weight, same.weight)
    assert not torch.equal(one.weight, other.weight)
    assert one.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert one.bias.eq(0).all()
