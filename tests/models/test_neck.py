from __future__ import annotations

import numpy as np
import pytest
import torch

from raycluster.data.transforms import View
from raycluster.features.extraction import FeatureSpec
from raycluster.models.neck import ProjectionNeck
from raycluster.training.step import Network
from tests.training.partition import network


def test_the_projection_by_hand() -> None:
    neck = ProjectionNeck(5, hidden=7, num_features=3, seed=2)
    features = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    first, second = neck.layers[1], neck.layers[4]
    hidden = features.relu() @ first.weight.T  # the biases start at 0
    hidden = (hidden - hidden.mean(0)) / (hidden.var(0, unbiased=False) + 1e-5).sqrt()
    projected = hidden.relu() @ second.weight.T
    torch.testing.assert_close(neck(features), projected / projected.norm(dim=1, keepdim=True))


def test_weights_follow_from_the_seed_within_their_bounds() -> None:
    one, same, other = (ProjectionNeck(100, hidden=50, num_features=9, seed=seed).layers[1] for seed in (1, 1, 2))
    assert torch.equal(one.weight, same.weight) and not torch.equal(one.weight, other.weight)
    assert one.weight.abs().max().item() == pytest.approx(0.1, rel=0.01) and one.bias.eq(0).all()


def test_heads_read_the_backbone_through_the_neck() -> None:
    plain = network()
    necked = Network(plain.backbone, torch.nn.Identity(), ProjectionNeck(32, hidden=8, num_features=4, seed=0)).eval()
    images = torch.randint(0, 255, (3, 3, 16, 16), dtype=torch.uint8)
    (output,) = necked(images)
    assert (plain.num_features, necked.num_features) == (32, 4)
    torch.testing.assert_close(output, necked.neck(necked.backbone(images)))
    torch.testing.assert_close(output, necked.body(images))
    names = [name for name, _ in necked.body.named_parameters()]
    assert len(names) == len(list(plain.backbone.parameters())) + 6, "the neck is trained with the backbone"


def test_views_are_put_side_by_side() -> None:
    body, cpu = network().backbone.eval(), torch.device("cpu")
    images = np.random.default_rng(0).integers(0, 255, (6, 16, 16, 3), dtype=np.uint8)
    single = FeatureSpec(View(size=16)).describe(body, images, cpu)
    joined = FeatureSpec(View(size=16), visits=2, concatenate=True).describe(body, images, cpu)
    assert np.array_equal(joined, single.reshape(3, -1))
