"""Exemplar-CNN: 5x5 convolutions without batch norm, and a fully connected layer that slides over larger images
(Dosovitskiy et al., "Discriminative unsupervised feature learning with exemplar convolutional neural networks", TPAMI
2016, section 4.1).
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from raycluster.config import settings
from raycluster.models.backbone import Backbone, GlobalAverage, ModelSettings, initialise
from raycluster.models.dropout import SeededDropout
from raycluster.models.input_layers import Input
from raycluster.types import UserError

Width = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]

_KERNEL, _POOL, _STRIDE = 5, 3, 2


class SlidingLinear(nn.Conv2d):
    """A fully connected layer of all maps at patches of the training size; of larger images, at every position."""

    def __init__(self, channels: int, side: int, outputs: int) -> None:
        super().__init__(channels, outputs, side)

    def forward(self, maps: Tensor) -> Tensor:
        """(n, C, h, w) -> (n, outputs, h - side + 1, w - side + 1). UserError if the maps are too small."""
        side = self.kernel_size[0]
        if min(maps.shape[2:]) < side:
            raise UserError(
                f"model.image_size: the network is built for maps of {side} x {side}, but these images give "
                f"{maps.shape[2]} x {maps.shape[3]}; set it to the smallest size of a view"
            )
        return super().forward(maps)


@settings
class Model(ModelSettings):
    """Three convolutions of 5x5, max pools of 3 by stride 2 between them, and fc1, for patches of `image_size` pixels.
    Larger images give maps of fc1, whose average is the last layer.

    input: `rgb` as published, or `sobel` gradients. image_size: of the patches in training. widths: channels of conv1
    to conv3, [64, 128, 256] or [92, 256, 512]. features: width of fc1. conv_dropout: after each convolution.
    fc_dropout: after fc1.
    """

    name: Literal["exemplarcnn"] = "exemplarcnn"
    input: Input = "rgb"
    image_size: Annotated[int, Field(ge=8, le=512)] = 32
    widths: tuple[Width, Width, Width] = (92, 256, 512)
    features: Width = 1024
    conv_dropout: Share = 0.25
    fc_dropout: Share = 0.5

    def build(self, seed: int) -> Backbone:
        """A new network; the same weights for the same seed."""
        one, two, three = self.widths
        side = self.image_size
        for _ in range(2):
            side = (side - _POOL) // _STRIDE + 1
        body = {
            "conv1": _conv(2 if self.input == "sobel" else 3, one),
            "conv2": nn.Sequential(*self._stage(1), _conv(one, two)),
            "conv3": nn.Sequential(*self._stage(2), _conv(two, three)),
            "fc1": nn.Sequential(
                nn.ReLU(inplace=True), SeededDropout(3, self.conv_dropout), SlidingLinear(three, side, self.features)
            ),
            "avgpool": nn.Sequential(nn.ReLU(inplace=True), SeededDropout(4, self.fc_dropout), GlobalAverage()),
        }
        backbone = Backbone(body, tuple(body), num_features=self.features, input=self.input)
        return _keep_variance(initialise(backbone, seed))

    def _stage(self, index: int) -> tuple[nn.Module, ...]:
        """What follows a convolution that is pooled. Dropout comes after the pool: it draws a quarter of the masks."""
        return nn.ReLU(inplace=True), nn.MaxPool2d(_POOL, _STRIDE), SeededDropout(index, self.conv_dropout)


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, _KERNEL, padding=_KERNEL // 2)


@torch.no_grad()
def _keep_variance(backbone: Backbone) -> Backbone:
    """Fan-in in place of fan-out: without batch norm, activations would shrink from layer to layer."""
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.mul_((module.out_channels / module.in_channels) ** 0.5)
    return backbone
