"""AlexNet as deep clustering uses it: batch norm, no local response normalisation, no grouped convolutions."""

from __future__ import annotations

from typing import Literal

from torch import nn

from raycluster.config import settings
from raycluster.models.backbone import Backbone, FlattenTo, ModelSettings, conv_bn, initialise
from raycluster.models.batchnorm import GhostBatchNorm
from raycluster.models.dropout import SeededDropout
from raycluster.models.input_layers import Input

_LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7")


def _relu() -> nn.ReLU:
    return nn.ReLU(inplace=True)


@settings
class Model(ModelSettings):
    """AlexNet of DeepCluster (Caron et al., ECCV 2018), for 224x224; at other sizes maps are average-pooled to 6x6
    before fc6.

    input: `sobel` gradients as published, or `rgb`.
    """

    name: Literal["alexnet"] = "alexnet"
    input: Input = "sobel"

    def build(self, seed: int) -> Backbone:
        """A new network; the same weights for the same seed."""
        stem = nn.Conv2d(2 if self.input == "sobel" else 3, 96, 11, stride=4, padding=2)
        body = {
            "conv1": nn.Sequential(stem, GhostBatchNorm(96)),
            "conv2": nn.Sequential(_relu(), nn.MaxPool2d(3, 2), *conv_bn(96, 256, 5, bias=True)),
            "conv3": nn.Sequential(_relu(), nn.MaxPool2d(3, 2), *conv_bn(256, 384, 3, bias=True)),
            "conv4": nn.Sequential(_relu(), *conv_bn(384, 384, 3, bias=True)),
            "conv5": nn.Sequential(_relu(), *conv_bn(384, 256, 3, bias=True)),
            "fc6": nn.Sequential(
                _relu(), nn.MaxPool2d(3, 2), FlattenTo(6), SeededDropout(6), nn.Linear(256 * 6 * 6, 4096)
            ),
            "fc7": nn.Sequential(_relu(), SeededDropout(7), nn.Linear(4096, 4096)),
        }
        return initialise(Backbone(body, _LAYERS, num_features=4096, input=self.input), seed)
