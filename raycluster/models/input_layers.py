"""Fixed input layers: normalisation of the colours, or Sobel gradients of the result."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from raycluster.types import IMAGE_MEAN, IMAGE_STD

Input = Literal["rgb", "sobel"]

_HORIZONTAL = ((1.0, 0.0, -1.0), (2.0, 0.0, -2.0), (1.0, 0.0, -1.0))
_VERTICAL = ((1.0, 2.0, 1.0), (0.0, 0.0, 0.0), (-1.0, -2.0, -1.0))


class Normalise(nn.Module):
    """(n, 3, h, w) uint8, or float in [0, 1] -> float32, less ImageNet's mean, over its standard deviation."""

    mean: Tensor
    std: Tensor
    num_channels = 3

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(IMAGE_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGE_STD).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, h, w) -> same shape, float32."""
        white = 1.0 if images.is_floating_point() else 255.0
        values = images.to(self.mean.dtype, memory_format=torch.channels_last)
        return (values - self.mean * white) * (1 / (self.std * white))


class Sobel(Normalise):
    """Sobel gradients of the mean of the normalised channels: (n, 3, h, w) -> (n, 2, h, w), zero padding of 1.

    Frozen, no scaling, no magnitude, as in DeepCluster (Caron et al., ECCV 2018, section 3.3). Channel mean and
    gradients are linear, so one 3x3 convolution computes both. Images of two channels are such gradients already, as
    the data stream makes them where `views` asks for `sobel`.
    """

    kernel: Tensor
    num_channels = 2

    def __init__(self) -> None:
        super().__init__()
        gradients = torch.tensor((_HORIZONTAL, _VERTICAL)).unsqueeze(1)
        self.register_buffer("kernel", gradients.expand(2, 3, 3, 3) / 3, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, h, w), or gradients (n, 2, h, w) -> (n, 2, h, w), float32 also under autocast."""
        if images.shape[1] == self.num_channels:
            return images.to(self.kernel.dtype, memory_format=torch.channels_last)
        with torch.autocast(images.device.type, enabled=False):
            return self.gradients(super().forward(images))

    def gradients(self, values: Tensor) -> Tensor:
        """(n, 3, h, w) -> (n, 2, h, w): horizontal, vertical."""
        return conv2d(values, self.kernel, padding=1)


def make_input_layer(input: Input) -> Normalise:
    """The input layer for `model.input`; its `num_channels` is the width of its output."""
    return Sobel() if input == "sobel" else Normalise()
