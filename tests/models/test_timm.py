from __future__ import annotations

import sys

import pytest
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from raycluster.models.backbone import Backbone
from raycluster.models.batchnorm import GhostBatchNorm
from raycluster.models.timm import Model
from raycluster.types import UserError

IMAGES = torch.randint(0, 256, (4, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
CASES = [
    {"arch": "mobilenetv3_small_050"},  # batch norm with an activation, and a layer after the average pool
    {"arch": "resnet10t", "input": "sobel"},
    {"arch": "vit_tiny_patch16_224", "image_size": 64},
    pytest.param({"arch": "convnext_atto"}, marks=pytest.mark.slow),
]


def test_without_timm_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"pip install 'raycluster\[timm\]'"):
        Model(arch="convnext_tiny").build(0)


@pytest.mark.parametrize("options", CASES)
def test_stages_and_parameters_are_those_of_timm(options: dict) -> None:
    timm = pytest.importorskip("timm")
    model = Model(**options)
    ours, channels = model.build(3).eval(), 2 if model.input == "sobel" else 3
    size = {"img_size": 64} if model.image_size else {}
    theirs = timm.create_model(model.arch, num_classes=0, in_chans=channels, **size).eval()
    assert sum(one.numel() for one in ours.parameters()) == sum(one.numel() for one in theirs.parameters())
    missing, unexpected = theirs.load_state_dict(ours.body.state_dict(), strict=False)
    assert not unexpected and all(name.endswith("num_batches_tracked") for name in missing)
    with torch.no_grad():
        values = ours.input_layer(IMAGES)
        torch.testing.assert_close(ours(IMAGES), theirs(values))
        assert ours(IMAGES).shape == (4, ours.num_features)
        for layer, info in zip(ours.layers, theirs.feature_info, strict=False):
            assert layer == info["module"]
            maps = ours(IMAGES, layer)
            assert maps.shape[:2] == (4, info["num_chs"]) and maps.shape[2] == 64 // info["reduction"]
    assert len(ours.layers) == len(theirs.feature_info) + 1


def test_batch_norm_is_that_of_timm_per_microbatch() -> None:
    timm = pytest.importorskip("timm")
    ours = Model(arch="mobilenetv3_small_050").build(3)
    theirs = timm.create_model("mobilenetv3_small_050", num_classes=0)
    theirs.load_state_dict(ours.body.state_dict(), strict=False)
    norms = [module for module in ours.modules() if isinstance(module, GhostBatchNorm)]
    assert len(norms) == sum(isinstance(module, _BatchNorm) for module in theirs.modules()) > 20
    assert not any(isinstance(module, _BatchNorm) for module in ours.modules())
    for norm in norms:
        norm.microbatch = 2
    values = ours.input_layer(IMAGES)
    torch.testing.assert_close(ours(IMAGES), torch.cat([theirs(part) for part in values.split(2)]))


def test_the_seed_alone_decides_the_weights() -> None:
    pytest.importorskip("timm")
    state = torch.get_rng_state()
    first, same, other = (Model(arch="resnet10t").build(seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["body.conv1.0.weight"], other["body.conv1.0.weight"])


def test_nothing_is_drawn_in_training() -> None:
    pytest.importorskip("timm")
    backbone = Model(arch="repghostnet_050").build(0)  # whose dropout is 0.2 by default
    assert torch.equal(backbone(IMAGES), backbone(IMAGES))


def test_networks_that_cannot_be_used_are_named() -> None:
    pytest.importorskip("timm")
    with pytest.raises(UserError, match=r"model\.arch: seen convnext_tny; wanted .* did you mean convnext_tiny\?"):
        Model(arch="convnext_tny").build(0)
    with pytest.raises(UserError, match=r"timm cannot build resnet10t for {'img_size': 64}"):
        Model(arch="resnet10t", image_size=64).build(0)
    with pytest.raises(UserError, match=r"cannot take images of 64x64 pixels .* set model\.image_size"):
        Model(arch="vit_tiny_patch16_224").build(0)(IMAGES)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_batch_norm_over_parts_of_images_is_refused(mode: str) -> None:
    pytest.importorskip("timm")
    backbone: Backbone = Model(arch="levit_128s").build(0)
    with pytest.raises(UserError, match=r"levit_128s, which normalises .* parts of 4 images"):
        backbone.train(mode == "train")(torch.zeros(4, 3, 224, 224))
