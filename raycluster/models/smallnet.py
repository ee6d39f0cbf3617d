"""A small network for images of 32 to 64 pixels and for training on a CPU."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import nn

from raycluster.config import settings
from raycluster.models.backbone import Backbone, GlobalAverage, ModelSettings, conv_bn, initialise
from raycluster.models.input_layers import Input


@settings
class Model(ModelSettings):
    """3x3 convolutions with batch norm, 2x2 max pools in between, and the global average of the last activations.

    input: `rgb`, or `sobel` gradients. widths: channels of conv1, conv2, ...; the last is the number of features.
    """

    name: Literal["smallnet"] = "smallnet"
    input: Input = "rgb"
    widths: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1, max_length=6)] = (32, 64, 128, 256)

    def build(self, seed: int) -> Backbone:
        """A new network; the same weights for the same seed."""
        inputs = 2 if self.input == "sobel" else 3
        body: dict[str, nn.Module] = {"conv1": nn.Sequential(*conv_bn(inputs, self.widths[0], 3))}
        for number, (before, width) in enumerate(zip(self.widths, self.widths[1:], strict=False), 2):
            body[f"conv{number}"] = nn.Sequential(nn.MaxPool2d(2), nn.ReLU(inplace=True), *conv_bn(before, width, 3))
        body["avgpool"] = nn.Sequential(nn.ReLU(inplace=True), GlobalAverage())
        return initialise(Backbone(body, tuple(body), num_features=self.widths[-1], input=self.input), seed)
