"""AlexNet as deep clustering uses it: batch norm, no local response normalisation, no grouped convolutions."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import nn

from raycluster.config import settings
from raycluster.models.backbone import Backbone, FlattenTo, ModelSettings, conv_bn, initialise
from raycluster.models.batchnorm import GhostBatchNorm
from raycluster.models.dropout import SeededDropout
from raycluster.models.input_layers import Input

Width = Annotated[int, Field(ge=1)]

_LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7")


def _relu() -> nn.ReLU:
    return nn.ReLU(inplace=True)


@settings
class Model(ModelSettings):
    """AlexNet of DeepCluster (Caron et al., ECCV 2018), for 224x224; at other sizes maps are average-pooled to 6x6
    before fc6.

    input: `sobel` gradients as published, or `rgb`. widths: channels of conv1 to conv5; [64, 192, 384, 256, 256] is the
    small AlexNet of SeLa (Asano et al., ICLR 2020).
    """

    name: Literal["alexnet"] = "alexnet"
    input: Input = "sobel"
    widths: tuple[Width, Width, Width, Width, Width] = (96, 256, 384, 384, 256)

    def build(self, seed: int) -> Backbone:
        """A new network; the same weights for the same seed."""
        one, two, three, four, five = self.widths
        stem = nn.Conv2d(2 if self.input == "sobel" else 3, one, 11, stride=4, padding=2)
        body = {
            "conv1": nn.Sequential(stem, GhostBatchNorm(one)),
            "conv2": nn.Sequential(nn.MaxPool2d(3, 2), _relu(), *conv_bn(one, two, 5, bias=True)),
            "conv3": nn.Sequential(nn.MaxPool2d(3, 2), _relu(), *conv_bn(two, three, 3, bias=True)),
            "conv4": nn.Sequential(_relu(), *conv_bn(three, four, 3, bias=True)),
            "conv5": nn.Sequential(_relu(), *conv_bn(four, five, 3, bias=True)),
            "fc6": nn.Sequential(
                nn.MaxPool2d(3, 2), _relu(), FlattenTo(6), SeededDropout(6), nn.Linear(five * 6 * 6, 4096)
            ),
            "fc7": nn.Sequential(_relu(), SeededDropout(7), nn.Linear(4096, 4096)),
        }
        return initialise(Backbone(body, _LAYERS, num_features=4096, input=self.input), seed)
