"""Exemplar-CNN: the published shapes, and fc1 as a convolution on larger images."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import conv2d

from raycluster.models.backbone import quadrants
from raycluster.models.exemplarcnn import Model
from raycluster.models.smallnet import Model as SmallNet
from raycluster.types import UserError


def test_shapes_of_the_published_network() -> None:
    backbone = Model().build(0).eval()
    assert [name for name in backbone.layers] == ["conv1", "conv2", "conv3", "fc1", "avgpool"]
    weights = {name: tuple(tensor.shape) for name, tensor in backbone.body.state_dict().items() if tensor.dim() == 4}
    assert list(weights.values()) == [(92, 3, 5, 5), (256, 92, 5, 5), (512, 256, 5, 5), (1024, 512, 7, 7)]
    images = torch.zeros(1, 3, 32, 32)
    with torch.no_grad():
        assert [backbone(images, layer).shape[2] for layer in ("conv1", "conv2", "conv3", "fc1")] == [32, 15, 7, 1]
        whole = quadrants(backbone, torch.zeros(1, 3, 96, 96), "conv3")
    assert whole.shape == (1, 3440), "4 * (92 + 256 + 512), as published"


def small() -> Model:
    return Model(image_size=16, widths=(4, 6, 8), features=10)


def test_the_fully_connected_layer_slides_over_larger_images() -> None:
    """Its output at a position is that of the linear layer on the maps below, and the last layer averages them."""
    backbone = small().build(0).eval()
    images = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
    with torch.no_grad():
        maps, found, last = backbone(images, "conv3"), backbone(images, "fc1"), backbone(images)
        weight, bias = (backbone.body.state_dict()[f"fc1.2.{name}"] for name in ("weight", "bias"))
        part = maps.relu()[:, :, 2:5, 1:4]
        assert found.shape == (2, 10, 7, 7)
        assert torch.allclose(found[:, :, 2, 1], part.flatten(1) @ weight.flatten(1).T + bias, atol=1e-5)
        assert torch.allclose(found, conv2d(maps.relu(), weight, bias), atol=1e-5)
        assert torch.allclose(last, found.relu().mean((2, 3)), atol=1e-6)


def test_smaller_images_are_refused() -> None:
    with pytest.raises(UserError, match=r"model\.image_size: the network is built for maps of 3 x 3, .* give 1 x 1"):
        small().build(0).eval()(torch.zeros(1, 3, 8, 8))


def test_activations_keep_their_size() -> None:
    """Without batch norm, what the heads read must be of the order of the input."""
    backbone = Model(widths=(64, 128, 256), features=256).build(0).eval()
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert 0.3 < float(backbone(images).std()) < 10


def test_quadrants_by_hand() -> None:
    """The maxima of the four quadrants of every layer with maps, before the ReLU, layer after layer."""
    backbone = SmallNet(widths=(2, 3)).build(0).eval()
    images = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    with torch.no_grad():
        found = quadrants(backbone, images)
        expected = []
        for layer, half in (("conv1", 4), ("conv2", 2)):
            maps = backbone(images, layer)
            for channel in range(maps.shape[1]):
                for rows in (slice(None, half), slice(half, None)):
                    for columns in (slice(None, half), slice(half, None)):
                        expected.append(maps[:, channel, rows, columns].amax((1, 2)))
        assert torch.equal(found, torch.stack(expected, 1)) and (found < 0).any()
        assert torch.equal(quadrants(backbone, images, "conv1"), found[:, :8])
