"""The base class of all backbones and the layers that they share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_max_pool2d

from raycluster.config import NonEmpty, settings
from raycluster.models.batchnorm import GhostBatchNorm
from raycluster.models.dropout import SeededDropout
from raycluster.models.input_layers import Input, make_input_layer
from raycluster.types import UserError


@settings
class ModelSettings:
    """The settings of every model.

    weights: what training starts from, null for random weights: the directory of a finished run, or a .safetensors file
    with the names of `backbone.safetensors`; a path or URI.
    """

    weights: NonEmpty | None = None


class Backbone(nn.Module):
    """An input layer and a sequence of named modules.

    layers: names of those whose output can be requested, in order. num_features: width of the last one, whose output is
    (n, num_features). A layer's ReLU is at the start of the next module, so outputs are those before the ReLU, which
    deep clustering clusters. A max pool goes before the ReLU: the results are bitwise those of the published order,
    values and gradients, and fewer values pass the ReLU.
    """

    def __init__(
        self, body: Mapping[str, nn.Module], layers: Sequence[str], *, num_features: int, input: Input
    ) -> None:
        super().__init__()
        self.layers, self.num_features = tuple(layers), num_features
        self.input_layer = make_input_layer(input)
        self.body: nn.Module = nn.Sequential()
        for name, module in body.items():
            self.body.add_module(name, module)
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor, layer: str | None = None) -> Tensor:
        """(n, 3, h, w) RGB, uint8 or float in [0, 1] -> output of `layer` before its ReLU; None: of the last layer.

        Raises UserError if the backbone has no such layer.
        """
        wanted = layer or self.layers[-1]
        if wanted not in self.layers:
            raise UserError(f"this backbone has no layer {wanted!r}; choose one of {', '.join(self.layers)}")
        return self.run(self.input_layer(images), wanted)

    def run(self, values: Tensor, layer: str) -> Tensor:
        """The output of the input layer -> the output of `layer`, a name in `layers`."""
        for name, module in self.body.named_children():
            values = module(values)
            if name == layer:
                break
        return values


@contextmanager
def training_mode(backbone: nn.Module, seed: int) -> Iterator[None]:
    """Forward passes as in training, with all rows as one microbatch of this seed, but running statistics stay."""
    norms = [module for module in backbone.modules() if isinstance(module, GhostBatchNorm)]
    microbatches, was_training = [norm.microbatch for norm in norms], backbone.training
    for module in backbone.modules():
        if isinstance(module, GhostBatchNorm):
            module.microbatch = None
        elif isinstance(module, SeededDropout):
            module.seeds = [seed]
    backbone.train()
    try:
        yield
    finally:
        backbone.train(was_training)
        for norm, microbatch in zip(norms, microbatches, strict=True):
            norm.microbatch, norm.statistics = microbatch, None


def pool(features: Tensor) -> Tensor:
    """Global average of (n, C, h, w) maps -> (n, C); (n, C) is returned unchanged."""
    return features.mean((2, 3)) if features.dim() == 4 else features


def quadrants(backbone: Backbone, images: Tensor, layer: str | None = None) -> Tensor:
    """(n, 3, h, w) -> (n, 4 * channels of all layers up to `layer`) maxima of the quadrants of their maps.

    layer: None for the last. Layers without maps are left out. Before the ReLU, which commutes with maxima. Each layer
    is a forward pass of its own, since the next one overwrites its output. UserError if no layer has maps.
    """
    names = backbone.layers[: backbone.layers.index(layer) + 1] if layer else backbone.layers
    outputs = (backbone(images, name) for name in names)
    found = [adaptive_max_pool2d(maps, 2).flatten(1) for maps in outputs if maps.dim() == 4]
    if not found:
        raise UserError(f"quadrants of {', '.join(names)}: none of these layers has maps; choose a later layer")
    return torch.cat(found, 1)


class GlobalAverage(nn.Module):
    """`pool` as a module."""

    def forward(self, values: Tensor) -> Tensor:
        """(n, C, h, w) -> (n, C)."""
        return pool(values)


class FlattenTo(nn.Module):
    """Flattens maps; those of another size go through an adaptive average pool to `side` x `side` first."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, values: Tensor) -> Tensor:
        """(n, C, h, w) -> (n, C * side * side)."""
        if values.shape[2:] != (self.side, self.side):
            values = adaptive_average(values, self.side)
        return values.flatten(1)


def adaptive_average(maps: Tensor, side: int) -> Tensor:
    """(n, C, h, w) -> (n, C, side, side), as `adaptive_avg_pool2d`, whose backward pass on CUDA is not deterministic.

    Two matrix products in float32, one over columns and one over rows; the result has the dtype of `maps`.
    """
    rows, columns = (_pooling_matrix(size, side, maps.device) for size in maps.shape[2:])
    with torch.autocast(maps.device.type, enabled=False):
        return ((maps.float() @ columns.T).mT @ rows.T).mT.to(maps.dtype)


def _pooling_matrix(size: int, side: int, device: torch.device) -> Tensor:
    """(side, size): row i averages positions floor(i size / side) to ceil((i + 1) size / side), the last excluded."""
    bins, positions = torch.arange(side, device=device)[:, None], torch.arange(size, device=device)
    inside = (positions >= bins * size // side) & (positions * side < (bins + 1) * size)
    return inside / inside.sum(1, keepdim=True)


def conv_bn(inputs: int, outputs: int, kernel: int, *, stride: int = 1, bias: bool = False) -> list[nn.Module]:
    """A convolution with padding kernel // 2, and its batch norm."""
    return [nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=bias), GhostBatchNorm(outputs)]


@torch.no_grad()
def initialise(backbone: Backbone, seed: int) -> Backbone:
    """Draw the weights from `seed`, in place; returns `backbone`.

    Normal with standard deviation sqrt(2 / (k k C_out)) for convolutions (He et al., ICCV 2015, fan-out) and 0.01 for
    linear layers, biases 0, as in DeepCluster's published code.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            fan_out = module.out_channels * module.weight[0, 0].numel() if isinstance(module, nn.Conv2d) else None
            drawn = torch.randn(module.weight.shape, generator=generator)
            module.weight.copy_(drawn * ((2 / fan_out) ** 0.5 if fan_out else 0.01))
            if module.bias is not None:
                module.bias.zero_()
    return backbone
