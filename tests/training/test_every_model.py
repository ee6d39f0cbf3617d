"""Every backbone, stem and input trains in every mode and precision; on the CPU, where fp16 and tf32 run as well."""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from math import isfinite
from typing import Any

import pytest
import torch

from raycluster.models.heads import Heads
from raycluster.training.config import TrainingSettings
from raycluster.training.optimiser import Optimisers
from raycluster.training.step import Microbatch, Network, Step

NETWORKS: dict[str, tuple[int, dict[str, Any]]] = {  # (image size, settings); the word before "-" names the model
    "smallnet": (16, {}),
    "exemplarcnn": (16, {"image_size": 16, "widths": (8, 16, 32), "features": 32}),
    "alexnet": (64, {}),
    "alexnet-small": (64, {"widths": (64, 192, 384, 256, 256)}),
    "vgg16": (32, {}),
    "resnet18": (32, {}),
    "resnet18-small": (16, {"stem": "small"}),
    "resnet50": (64, {}),
    "resnet50-small": (16, {"stem": "small"}),
    "resnet50v2": (64, {}),
    "resnet50v2-small": (16, {"stem": "small"}),
    "resnet101": (64, {}),
    "timm-mobilenet": (64, {"arch": "mobilenetv3_small_050"}),
    "timm-vit": (32, {"arch": "vit_tiny_patch16_224", "image_size": 32}),
}
PRECISIONS = [(mode, precision) for precision in ("fp32", "tf32", "bf16") for mode in ("exact", "fast")]
PRECISIONS.append(("fast", "fp16"))  # exact mode refuses it
QUICK = {
    *(("smallnet", input, *combination) for input in ("rgb", "sobel") for combination in PRECISIONS),
    *(("exemplarcnn", "rgb", *combination) for combination in PRECISIONS),
    ("alexnet", "sobel", "fast", "fp32"),
    ("resnet18", "sobel", "fast", "fp32"),
    ("resnet18-small", "rgb", "exact", "fp32"),
    ("resnet18-small", "rgb", "fast", "bf16"),
    ("resnet50", "rgb", "fast", "fp32"),
    ("resnet50-small", "sobel", "fast", "fp32"),
    ("resnet50v2", "rgb", "fast", "fp32"),
    ("resnet50v2-small", "sobel", "exact", "fp32"),
    *((model, "rgb", mode, "fp32") for model in ("timm-mobilenet", "timm-vit") for mode in ("exact", "fast")),
}
CASES = [
    pytest.param(*case, marks=[] if case in QUICK else [pytest.mark.slow], id="-".join(case))
    for model in NETWORKS
    for input in ("rgb", "sobel")
    for case in [(model, input, mode, precision) for mode, precision in PRECISIONS]
]


@lru_cache(maxsize=1)  # drawing the weights of the large ones takes longer than a step
def _network(model: str, input: str) -> Network:
    module = import_module(f"raycluster.models.{model.partition('-')[0]}")
    backbone = module.Model(input=input, **NETWORKS[model][1]).build(seed=0)
    return Network(backbone, Heads(backbone.num_features, (5, 3), seed=0))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("model", "input", "mode", "precision"), CASES)
def test_one_step_changes_every_weight(model: str, input: str, mode: str, precision: str) -> None:
    if model.startswith("timm"):
        pytest.importorskip("timm")
    network, (size, _) = _network(model, input), NETWORKS[model]
    settings = TrainingSettings(mode=mode, precision=precision, global_batch=8, microbatch=4, lr=1e-3, threads=1)
    optimisers = Optimisers(network.backbone, network.heads, settings)
    if precision == "fp16":
        optimisers.loss_scale = 16.0  # the first step of a run may be left out to find the scale
    generator = torch.Generator().manual_seed(0)
    microbatches = [
        Microbatch(
            torch.randint(256, (4, size, size, 3), generator=generator, dtype=torch.uint8),
            torch.randint(3, (2, 4), generator=generator),
            torch.ones(4),
            seed,
        )
        for seed in range(2)
    ]
    before = {name: weight.double().norm() for name, weight in network.named_parameters() if weight.dim() > 1}
    result = Step(network, optimisers, settings)(microbatches, epoch=0)
    assert result.applied
    assert isfinite(result.loss)
    after = dict(network.named_parameters())
    assert [name for name, norm in before.items() if after[name].double().norm() == norm] == []
    assert all(torch.isfinite(weight).all() for weight in after.values())
