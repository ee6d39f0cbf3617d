"""ResNet-50 version 2: pre-activation."""

from __future__ import annotations

from typing import Literal

from raycluster.config import settings
from raycluster.models.backbone import Backbone, ModelSettings, initialise
from raycluster.models.input_layers import Input
from raycluster.models.resnet import PreActivationBottleneck, Stem, resnet


@settings
class Model(ModelSettings):
    """Pre-activation ResNet-50 (He et al., Identity mappings in deep residual networks, ECCV 2016); features are the
    global average after the last batch norm and ReLU.

    input: `rgb`, or `sobel` gradients. stem: `imagenet` (7x7 stride 2, max pooling), or `small` (3x3, no pooling) for
    images of about 32 pixels.
    """

    name: Literal["resnet50v2"] = "resnet50v2"
    input: Input = "rgb"
    stem: Stem = "imagenet"

    def build(self, seed: int) -> Backbone:
        """A new network; the same weights for the same seed."""
        return initialise(resnet(PreActivationBottleneck, (3, 4, 6, 3), input=self.input, stem=self.stem), seed)
