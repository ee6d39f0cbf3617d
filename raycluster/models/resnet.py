"""Residual networks from torchvision's blocks, with ghost batch norm and the ReLU at the start of each block; version 1
as in torchvision, and version 2 (pre-activation).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, conv1x1

from raycluster.models.backbone import Backbone, GlobalAverage
from raycluster.models.batchnorm import GhostBatchNorm
from raycluster.models.input_layers import Input

Stem = Literal["imagenet", "small"]
_LAYERS = ("layer1", "layer2", "layer3", "layer4", "avgpool")


class LeadingReluBasicBlock(BasicBlock):
    """torchvision's `BasicBlock` with its last ReLU moved to the start of the next block."""

    def forward(self, x: Tensor) -> Tensor:
        """(n, C, h, w) before its ReLU, overwritten -> (n, C', h', w') before its ReLU."""
        x = self.relu(x)
        out = self.relu(self.bn1(self.conv1(x)))
        shortcut = self.downsample(x) if self.downsample is not None else x
        return self.bn2(self.conv2(out)) + shortcut


class LeadingReluBottleneck(Bottleneck):
    """torchvision's `Bottleneck` with its last ReLU moved to the start of the next block."""

    def forward(self, x: Tensor) -> Tensor:
        """(n, C, h, w) before its ReLU, overwritten -> (n, C', h', w') before its ReLU."""
        x = self.relu(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        shortcut = self.downsample(x) if self.downsample is not None else x
        return self.bn3(self.conv3(out)) + shortcut


class PreActivationBottleneck(Bottleneck):
    """torchvision's `Bottleneck` with batch norm and ReLU before each convolution (He et al., ECCV 2016)."""

    def __init__(self, inplanes: int, planes: int, *arguments: Any, **options: Any) -> None:
        super().__init__(inplanes, planes, *arguments, **options)
        self.bn1, self.bn3 = GhostBatchNorm(inplanes), GhostBatchNorm(planes)

    def forward(self, x: Tensor) -> Tensor:
        """(n, C, h, w) -> (n, C', h', w'), both sums of residuals."""
        out = self.relu(self.bn1(x))
        shortcut = self.downsample(out) if self.downsample is not None else x
        out = self.conv2(self.relu(self.bn2(self.conv1(out))))
        return self.conv3(self.relu(self.bn3(out))) + shortcut


Block = type[LeadingReluBasicBlock] | type[LeadingReluBottleneck] | type[PreActivationBottleneck]


def resnet(block: Block, depths: Sequence[int], *, input: Input, stem: Stem) -> Backbone:
    """A residual network (He et al., CVPR 2016) with the parameter names of torchvision's, weights not yet drawn.

    The stride of a bottleneck is that of its 3x3 convolution, as in torchvision. depths: blocks of layer1 to layer4.
    Features: the global average after the last ReLU. Of pre-activation blocks (He et al., ECCV 2016) it is version 2:
    no batch norm after the first convolution and in shortcuts, and one, `bn`, after layer4.
    """
    pre_activation = issubclass(block, PreActivationBottleneck)
    body = _stem(2 if input == "sobel" else 3, stem, pre_activation=pre_activation)
    width = 64
    for index, depth in enumerate(depths):
        outputs, stride = 64 * 2**index, 1 if index == 0 else 2
        body[f"layer{index + 1}"] = _layer(block, depth, width, outputs, stride)
        width = outputs * block.expansion
    if pre_activation:
        body["bn"] = GhostBatchNorm(width)
    body["avgpool"] = nn.Sequential(nn.ReLU(inplace=True), GlobalAverage())
    return Backbone(body, _LAYERS, num_features=width, input=input)


def _stem(channels: int, stem: Stem, *, pre_activation: bool) -> dict[str, nn.Module]:
    large = stem == "imagenet"
    kernel, stride = (7, 2) if large else (3, 1)
    body: dict[str, nn.Module] = {
        "conv1": nn.Conv2d(channels, 64, kernel, stride, padding=kernel // 2, bias=False),
    }
    if not pre_activation:
        body["bn1"] = GhostBatchNorm(64)
    if large:
        body["maxpool"] = nn.MaxPool2d(3, 2, padding=1)  # commutes with the ReLU at the start of layer1
    return body


def _layer(block: Block, depth: int, inputs: int, planes: int, stride: int) -> nn.Sequential:
    outputs = planes * block.expansion
    shortcut = None
    if stride != 1 or inputs != outputs:
        norm = [] if issubclass(block, PreActivationBottleneck) else [GhostBatchNorm(outputs)]
        shortcut = nn.Sequential(conv1x1(inputs, outputs, stride), *norm)
    first = block(inputs, planes, stride, shortcut, norm_layer=GhostBatchNorm)
    return nn.Sequential(first, *(block(outputs, planes, norm_layer=GhostBatchNorm) for _ in range(depth - 1)))
