from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import pytest
import safetensors.torch
import torch

from raycluster.models import resnet18, smallnet
from raycluster.models.backbone import Backbone
from raycluster.models.batchnorm import GhostBatchNorm
from raycluster.models.export import export, load_backbone
from raycluster.types import UserError
from tests.damage import damages


def _write(folder: Path, backbone: Backbone, settings: dict[str, object]) -> None:
    weights, description = export(backbone, settings)
    (folder / "backbone.safetensors").write_bytes(weights)
    (folder / "backbone.json").write_bytes(description)


def test_loaded_features_are_bitwise_identical(tmp_path: Path) -> None:
    backbone = smallnet.Model(input="sobel", widths=(8, 64)).build(5)
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    backbone(images)
    for module in backbone.modules():
        if isinstance(module, GhostBatchNorm) and module.statistics is not None:
            module.update(module.statistics)
    _write(tmp_path, backbone, {"seed": 0, "model": {"name": "smallnet", "input": "sobel", "widths": [8, 64]}})
    loaded = load_backbone(tmp_path)  # a pathlib.Path
    assert not loaded.training
    assert torch.equal(loaded(images), backbone.eval()(images))
    assert json.loads((tmp_path / "backbone.json").read_text())["num_features"] == 64


@pytest.mark.parametrize(
    "model",
    [
        pytest.param({"name": "resnet50v2", "stem": "small"}, marks=pytest.mark.slow),
        pytest.param({"name": "alexnet", "widths": [64, 192, 384, 256, 256]}, marks=pytest.mark.slow),
        pytest.param({"name": "resnet101"}, marks=pytest.mark.slow),
        {"name": "timm", "arch": "mobilenetv3_small_050", "input": "sobel"},
        {"name": "timm", "arch": "vit_tiny_patch16_224", "image_size": 32},
    ],
    ids=lambda model: model.get("arch", model["name"]),
)
def test_larger_networks_are_exported(tmp_path: Path, model: dict[str, object]) -> None:
    if model["name"] == "timm":
        pytest.importorskip("timm")
    backbone = import_module(f"raycluster.models.{model['name']}").Model(**model).build(5).eval()
    _write(tmp_path, backbone, {"model": model})
    side = 96 if model["name"] == "alexnet" else 32
    images = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(load_backbone(tmp_path)(images), backbone(images))


def test_weights_file_has_plain_names(tmp_path: Path) -> None:
    weights = safetensors.torch.load(export(resnet18.Model().build(0), {"model": {"name": "resnet18"}})[0])
    assert {"conv1.weight", "bn1.running_mean", "layer4.1.conv2.weight"} <= set(weights)


def test_export_of_another_version_is_refused(tmp_path: Path) -> None:
    _write(tmp_path, smallnet.Model(widths=(4, 8)).build(0), {"model": {"name": "smallnet", "widths": [8, 8]}})
    with pytest.raises(UserError, match="cannot rebuild"):
        load_backbone(str(tmp_path))


def test_missing_export_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"backbone\.json"):
        load_backbone(str(tmp_path / "nowhere"))


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    _write(tmp_path, smallnet.Model(widths=(4, 8)).build(0), {"model": {"name": "smallnet", "widths": [4, 8]}})
    weights = tmp_path / "backbone.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match=r"backbone\.safetensors is damaged"):
        load_backbone(str(tmp_path))


SMALL = {"seed": 0, "model": {"name": "smallnet", "widths": [4, 8]}}


@pytest.mark.parametrize("name", ["backbone.json", "backbone.safetensors"])
def test_damaged_exports_are_refused(tmp_path: Path, name: str) -> None:
    _write(tmp_path, smallnet.Model(widths=(4, 8)).build(0), SMALL)
    content, refused = (tmp_path / name).read_bytes(), 0
    for data in damages(content, 200):
        (tmp_path / name).write_bytes(data)
        try:
            load_backbone(tmp_path)
        except UserError:
            refused += 1
    assert refused > 100


def test_damaged_weights_without_a_checksum_are_refused(tmp_path: Path) -> None:
    _write(tmp_path, smallnet.Model(widths=(4, 8)).build(0), SMALL)
    description = json.loads((tmp_path / "backbone.json").read_text())
    del description["sha256"]
    (tmp_path / "backbone.json").write_text(json.dumps(description))
    content = (tmp_path / "backbone.safetensors").read_bytes()
    for data in damages(content[:600], 50):
        (tmp_path / "backbone.safetensors").write_bytes(data)
        with pytest.raises(UserError, match=r"damaged|cannot rebuild"):
            load_backbone(tmp_path)


@pytest.mark.parametrize("settings", [[], {}, {"model": None}, {"model": {}}, {"model": {"name": 5}}])
def test_a_description_of_another_form_is_named(tmp_path: Path, settings: object) -> None:
    _write(tmp_path, smallnet.Model(widths=(4, 8)).build(0), SMALL)
    (tmp_path / "backbone.json").write_text(json.dumps({"settings": settings}))
    with pytest.raises(UserError, match=r"backbone\.json is damaged"):
        load_backbone(tmp_path)


def test_a_model_this_version_lacks_is_named(tmp_path: Path) -> None:
    for name in ("nosuch", "export", "smallnet"):
        _write(tmp_path, smallnet.Model(widths=(4, 8)).build(0), {"model": {"name": name, "unknown": 1}})
        with pytest.raises(UserError, match="cannot rebuild"):
            load_backbone(tmp_path)
