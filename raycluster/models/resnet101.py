"""ResNet-101."""

from __future__ import annotations

from typing import Literal

from raycluster.config import settings
from raycluster.models.backbone import Backbone, ModelSettings, initialise
from raycluster.models.input_layers import Input
from raycluster.models.resnet import LeadingReluBottleneck, Stem, resnet


@settings
class Model(ModelSettings):
    """ResNet-101 (He et al., CVPR 2016); features are the global average after the last ReLU.

    input: `rgb`, or `sobel` gradients. stem: `imagenet` (7x7 stride 2, max pooling), or `small` (3x3, no pooling) for
    images of about 32 pixels.
    """

    name: Literal["resnet101"] = "resnet101"
    input: Input = "rgb"
    stem: Stem = "imagenet"

    def build(self, seed: int) -> Backbone:
        """A new network; the same weights for the same seed."""
        return initialise(resnet(LeadingReluBottleneck, (3, 4, 23, 3), input=self.input, stem=self.stem), seed)
