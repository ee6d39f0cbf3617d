"""VGG-16 with batch norm, as deep clustering uses it."""

from __future__ import annotations

from typing import Literal

from torch import nn

from raycluster.config import settings
from raycluster.models.backbone import Backbone, FlattenTo, ModelSettings, conv_bn, initialise
from raycluster.models.dropout import SeededDropout
from raycluster.models.input_layers import Input

_WIDTHS = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
_POOLED_INPUT = (3, 5, 8, 11)  # convolutions after a max pool


@settings
class Model(ModelSettings):
    """VGG-16 of DeepCluster (Caron et al., ECCV 2018), one dropout only, for 224x224; at other sizes maps are
    average-pooled to 7x7 before fc6.

    input: `sobel` gradients as published, or `rgb`.
    """

    name: Literal["vgg16"] = "vgg16"
    input: Input = "sobel"

    def build(self, seed: int) -> Backbone:
        """A new network; the same weights for the same seed."""
        channels = 2 if self.input == "sobel" else 3
        body: dict[str, nn.Module] = {}
        for number, width in enumerate(_WIDTHS, start=1):
            activation = [nn.ReLU(inplace=True)] if number > 1 else []
            halving = [nn.MaxPool2d(2)] if number in _POOLED_INPUT else []
            body[f"conv{number}"] = nn.Sequential(*halving, *activation, *conv_bn(channels, width, 3, bias=True))
            channels = width
        body["fc6"] = nn.Sequential(nn.MaxPool2d(2), nn.ReLU(inplace=True), FlattenTo(7), nn.Linear(512 * 7 * 7, 4096))
        body["fc7"] = nn.Sequential(nn.ReLU(inplace=True), SeededDropout(7), nn.Linear(4096, 4096))
        return initialise(Backbone(body, tuple(body), num_features=4096, input=self.input), seed)
