from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

from raycluster.config import PluginField
from raycluster.models import alexnet, resnet18, resnet50, resnet50v2, resnet101, smallnet, vgg16
from raycluster.models.backbone import Backbone, FlattenTo, ModelSettings, adaptive_average, pool
from raycluster.models.batchnorm import GhostBatchNorm
from raycluster.types import UserError

MODELS: dict[str, Any] = {
    "smallnet": smallnet.Model,
    "alexnet": alexnet.Model,
    "vgg16": vgg16.Model,
    "resnet18": resnet18.Model,
    "resnet50": resnet50.Model,
    "resnet50v2": resnet50v2.Model,
    "resnet101": resnet101.Model,
}
SMALL_ALEXNET = (64, 192, 384, 256, 256)


@pytest.mark.parametrize("name", PluginField("raycluster.models", "Model").modules())
def test_every_model_can_start_from_weights(name: str) -> None:
    assert issubclass(import_module(f"raycluster.models.{name}").Model, ModelSettings)


@pytest.mark.parametrize("input", ["rgb", "sobel"])
@pytest.mark.parametrize("name", ["smallnet", "resnet18"])
def test_every_layer_can_be_seen(name: str, input: str) -> None:
    backbone = MODELS[name](input=input).build(0).eval()
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    for layer in backbone.layers:
        assert len(backbone(images, layer)) == 2
    assert backbone(images).shape == (2, backbone.num_features)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("alexnet", [55, 27, 13, 13, 13]),
        ("vgg16", [224] * 2 + [112] * 2 + [56] * 3),
        pytest.param("resnet50v2", [56, 28, 14, 7], marks=pytest.mark.slow),
        pytest.param("resnet101", [56, 28, 14, 7], marks=pytest.mark.slow),
    ],
)
def test_map_sizes_at_224(name: str, sizes: list[int]) -> None:
    backbone = MODELS[name]().build(0).eval()
    with torch.no_grad():
        for layer, size in zip(backbone.layers, sizes, strict=False):
            assert backbone(torch.zeros(1, 3, 224, 224), layer).shape[2:] == (size, size)


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_small_alexnet_has_the_widths_of_torchvision() -> None:
    small = alexnet.Model(input="rgb", widths=SMALL_ALEXNET).build(0)
    theirs = torchvision.models.alexnet()
    shapes = [tuple(one.weight.shape) for one in theirs.features if isinstance(one, nn.Conv2d)]
    assert [tuple(one.weight.shape) for one in small.body.modules() if isinstance(one, nn.Conv2d)] == shapes
    fully_connected = num_parameters(theirs.classifier[1]) + num_parameters(theirs.classifier[4])
    batch_norm = 2 * sum(SMALL_ALEXNET)
    assert num_parameters(small) == num_parameters(theirs.features) + fully_connected + batch_norm == 57_006_144
    with torch.no_grad():
        sizes = [small.eval()(torch.zeros(1, 3, 224, 224), layer).shape[1:] for layer in small.layers]
    maps = [(width, side, side) for width, side in zip(SMALL_ALEXNET, (55, 27, 13, 13, 13), strict=True)]
    assert sizes == [*maps, (4096,), (4096,)]


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("resnet18", 11_689_512 - 513_000),  # those of torchvision, less the classifier
        ("resnet50", 25_557_032 - 2_049_000),
        ("resnet50v2", 25_557_032 - 2_049_000 - 7_680),  # 3,840 channels of batch norm less than version 1
        pytest.param("resnet101", 44_549_160 - 2_049_000, marks=pytest.mark.slow),
    ],
)
def test_numbers_of_parameters(name: str, count: int) -> None:
    assert num_parameters(MODELS[name]().build(0)) == count


def test_version_2_is_that_of_timm() -> None:
    timm = pytest.importorskip("timm")
    ours, theirs = resnet50v2.Model().build(1).eval(), timm.create_model("resnetv2_50", num_classes=0).eval()
    names = {"conv1": "stem.conv", "bn": "norm"}
    state = {}
    for name, value in ours.body.state_dict().items():
        if name.startswith("layer"):
            stage, _, rest = name[5:].partition(".")
            block, _, rest = rest.partition(".")
            rest = rest.replace("bn", "norm").replace("downsample.0", "downsample.conv")
            state[f"stages.{int(stage) - 1}.blocks.{block}.{rest}"] = value
        else:
            module, _, rest = name.partition(".")
            state[f"{names[module]}.{rest}"] = value
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected and all(key.endswith("num_batches_tracked") for key in missing)
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(ours.input_layer(images)))
        torch.testing.assert_close(ours(images, "layer3"), theirs.forward_intermediates(ours.input_layer(images))[1][3])


def test_alexnet_descriptor_is_fc7_before_its_relu() -> None:
    backbone = alexnet.Model().build(0).eval()
    features = backbone(torch.rand(2, 3, 224, 224))
    assert features.shape == (2, 4096)
    assert features.min() < 0
    stage = [type(module).__name__ for module in backbone.body.fc6]
    assert stage == ["MaxPool2d", "ReLU", "FlattenTo", "SeededDropout", "Linear"]


def test_layers_are_seen_before_their_relu() -> None:
    backbone = smallnet.Model(widths=(4, 8, 8)).build(0)
    images = torch.rand(4, 3, 32, 32)
    assert all(backbone(images, layer).min() < 0 for layer in backbone.layers[:-1])
    assert backbone(images).min() >= 0


def test_initial_weights() -> None:
    backbone = alexnet.Model().build(3)
    conv, linear = backbone.body.conv2[2], backbone.body.fc7[2]
    assert conv.weight.std().item() == pytest.approx((2 / (25 * 256)) ** 0.5, rel=0.02)
    assert linear.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert conv.bias.eq(0).all()
    assert linear.bias.eq(0).all()


@pytest.mark.parametrize("name", ["smallnet", "resnet18"])
def test_the_seed_decides_the_weights_and_nothing_else(name: str) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = MODELS[name]().build(7).state_dict()
    torch.rand(3)
    second, other = MODELS[name]().build(7).state_dict(), MODELS[name]().build(8).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)
    torch.set_rng_state(before)


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("resnet18", torchvision.models.resnet18),
        ("resnet50", torchvision.models.resnet50),
        pytest.param("resnet101", torchvision.models.resnet101, marks=pytest.mark.slow),
    ],
)
def test_residual_networks_are_those_of_torchvision(name: str, theirs: Any) -> None:
    ours, reference = MODELS[name]().build(1).eval(), theirs().eval()
    missing, unexpected = reference.load_state_dict(ours.body.state_dict(), strict=False)
    assert not unexpected
    assert all(key.startswith("fc.") or key.endswith("num_batches_tracked") for key in missing)
    reference.fc = nn.Identity()
    images = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(ours(images), reference(ours.input_layer(images)))


@pytest.mark.parametrize("model", [smallnet.Model(), alexnet.Model()])
def test_a_max_pool_before_the_relu_has_the_bits_of_the_published_order(model: Any) -> None:
    stage, values = model.build(0).body.conv2, torch.randn(4, model.widths[0], 15, 15)
    pool, relu, *rest = stage
    assert isinstance(pool, nn.MaxPool2d) and isinstance(relu, nn.ReLU)
    ours, theirs = values.clone().requires_grad_(), values.clone().requires_grad_()
    out, expected = stage(ours), nn.Sequential(*rest)(pool(theirs.relu()))
    assert torch.equal(out, expected)
    upstream = torch.randn_like(out)
    assert torch.equal(*(torch.autograd.grad(o, x, upstream)[0] for o, x in ((out, ours), (expected, theirs))))


def test_small_stem_keeps_the_size() -> None:
    backbone = resnet18.Model(stem="small").build(0).eval()
    assert backbone(torch.zeros(1, 3, 32, 32), "layer1").shape == (1, 64, 32, 32)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_small_stem_is_convolution_batch_norm_and_relu_and_has_gradients(name: str) -> None:
    backbone = MODELS[name](stem="small").build(0)
    body, images = backbone.body, torch.rand(4, 3, 8, 8)
    stem = body.bn1(body.conv1(backbone.input_layer(images)))
    torch.testing.assert_close(backbone(images, "layer1"), body.layer1(stem.detach().relu()))
    backbone(images).sum().backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())


@pytest.mark.parametrize("name", ["smallnet", "resnet18"])
def test_features_repeat_and_do_not_depend_on_the_batch(name: str) -> None:
    backbone, images = MODELS[name]().build(0).eval(), torch.rand(9, 3, 32, 32)
    with torch.no_grad():
        whole = backbone(images)
        assert torch.equal(whole, backbone(images))
        torch.testing.assert_close(whole, torch.cat([backbone(part) for part in images.split(2)]), atol=1e-5, rtol=1e-5)


def test_every_normalisation_knows_microbatches() -> None:
    for model in (smallnet.Model(), resnet18.Model(), resnet50.Model(), resnet50v2.Model()):
        modules = list(model.build(0).modules())
        assert any(isinstance(module, GhostBatchNorm) for module in modules)
        assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in modules)


def test_unknown_layer_is_named_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"conv9.*conv1, conv2"):
        smallnet.Model().build(0)(torch.zeros(1, 3, 32, 32), "conv9")


def test_pool_and_flatten() -> None:
    maps = torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(pool(maps), maps.mean((2, 3)))
    assert pool(maps[:, :, 0, 0]).shape == (2, 3)
    assert torch.equal(FlattenTo(4)(maps), maps.flatten(1))
    assert FlattenTo(2)(maps).shape == (2, 12)


@pytest.mark.parametrize("shape", [(1, 1), (2, 5), (6, 7), (7, 13), (14, 9)])
@pytest.mark.parametrize("side", [1, 6, 7])
def test_adaptive_average_is_that_of_torch(shape: tuple[int, int], side: int) -> None:
    ours = torch.randn(3, 4, *shape).contiguous(memory_format=torch.channels_last).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    upstream = torch.randn(3, 4, side, side)
    mine, reference = adaptive_average(ours, side), nn.functional.adaptive_avg_pool2d(theirs, side)
    torch.testing.assert_close(mine, reference, atol=1e-6, rtol=1e-6)
    mine.backward(upstream)
    reference.backward(upstream)
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-6)


def test_flatten_averages_in_float32_and_uses_only_operations_that_are_deterministic_on_cuda() -> None:
    maps = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        flat = FlattenTo(3)(maps)
    exact = nn.functional.adaptive_avg_pool2d(maps.float(), 3).flatten(1)
    torch.testing.assert_close(flat, exact.bfloat16(), rtol=2.0**-7, atol=0)  # one unit in the last place
    with torch.profiler.profile() as profile:
        FlattenTo(3)(maps.float().requires_grad_()).sum().backward()
    assert not [event.key for event in profile.key_averages() if "adaptive" in event.key]


def test_backbone_is_a_chain(tmp_path: Any) -> None:
    body = {"a": nn.Conv2d(2, 4, 3), "b": nn.ReLU(), "c": nn.Flatten()}
    backbone = Backbone(body, ("a", "c"), num_features=4, input="sobel")
    images = torch.rand(2, 3, 3, 3)
    torch.testing.assert_close(backbone(images), backbone(images, "a").relu().flatten(1))
