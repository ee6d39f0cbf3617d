"""Any network of the library timm by its name (Wightman, PyTorch Image Models), with ghost batch norm."""

from __future__ import annotations

from importlib import import_module
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from raycluster.config import NonEmpty, settings
from raycluster.config.registry import did_you_mean
from raycluster.models.backbone import Backbone, ModelSettings
from raycluster.models.batchnorm import GhostBatchNorm
from raycluster.models.input_layers import Input
from raycluster.types import UserError

_LAST = "pre_logits"
_RANDOM = ("drop_prob", "drop_rate", "prob")  # of timm's layers that draw random numbers in training


@settings
class Model(ModelSettings):
    """A network of timm without its classifier, its weights drawn afresh; needs `pip install raycluster[timm]`.

    Layers are timm's stages, after their activation, and last `pre_logits`, what the classifier would read. arch: its
    name in timm, such as `convnext_tiny`. input: `rgb`, or `sobel` gradients. image_size: side in pixels, for networks
    that are built for one size (as vision transformers are); null for the one that timm sets.
    """

    name: Literal["timm"] = "timm"
    arch: NonEmpty
    input: Input = "rgb"
    image_size: Annotated[int, Field(ge=1, le=2048)] | None = None

    def build(self, seed: int) -> Backbone:
        """A new network; the same weights for the same seed. Raises UserError if timm is missing or cannot build it."""
        timm = _library()
        if not timm.is_model(self.arch):
            raise UserError(
                f"model.arch: seen {self.arch}; wanted a network of timm {timm.__version__}, see timm.list_models()"
                + did_you_mean(self.arch, timm.list_models())
            )
        size = {} if self.image_size is None else {"img_size": self.image_size}
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            try:
                network = timm.create_model(
                    self.arch, num_classes=0, in_chans=2 if self.input == "sobel" else 3, **size
                )
            except TypeError as error:
                raise UserError(f"timm cannot build {self.arch} for {size or self.input}: {error}") from error
        return TimmBackbone(network, self.arch, input=self.input)


class TimmBackbone(Backbone):
    """A network of timm; `body` has timm's parameter names.

    Batch norm becomes ghost batch norm. Dropout and stochastic depth are left out: no seed of a microbatch decides
    their draws. Raises UserError if another layer keeps statistics of batches.
    """

    def __init__(self, network: Any, arch: str, *, input: Input) -> None:
        stages = [one["module"] for one in network.feature_info] if hasattr(network, "forward_intermediates") else []
        width = getattr(network, "head_hidden_size", None) or network.num_features
        super().__init__({}, (*stages, _LAST), num_features=width, input=input)
        self.arch = arch
        self.body = network
        _use_ghost_batch_norm(network, arch)
        _leave_out_random_draws(network)
        self._norms = [module for module in network.modules() if isinstance(module, _RowsNorm)]
        self.to(memory_format=torch.channels_last)

    def run(self, values: Tensor, layer: str) -> Tensor:
        """The output of the input layer -> (n, num_features), or the (n, C, h, w) output of a stage."""
        for norm in self._norms:
            norm.rows = len(values)
        network: Any = self.body
        try:
            if layer == _LAST:
                return network(values)
            index = self.layers.index(layer)
            return network.forward_intermediates(values, indices=[index], stop_early=True, intermediates_only=True)[0]
        except AssertionError as error:  # by which timm refuses an input size
            size = "x".join(map(str, values.shape[2:]))
            raise UserError(
                f"{self.arch} cannot take images of {size} pixels ({error}): set model.image_size or the views' size"
            ) from error


class _RowsNorm(GhostBatchNorm):
    """Ghost batch norm with the activation of timm's BatchNormAct2d; its rows must be those of the network.

    rows: of the forward pass. arch: of the network.
    """

    def __init__(self, norm: Any, arch: str) -> None:
        super().__init__(norm.num_features, eps=norm.eps, momentum=norm.momentum)
        self.rows, self.arch = 0, arch
        self.drop, self.act = getattr(norm, "drop", nn.Identity()), getattr(norm, "act", nn.Identity())
        state = {name: value for name, value in norm.state_dict().items() if name != "num_batches_tracked"}
        self.load_state_dict(state)

    def forward(self, values: Tensor) -> Tensor:
        """(n, C) or (n, C, ...) -> same shape. UserError if n is not the number of images."""
        if len(values) != self.rows:
            raise UserError(
                f"model.arch: seen {self.arch}, which normalises {len(values)} parts of {self.rows} images as rows of "
                "a batch; wanted one row per image, without which statistics are not those of microbatches. Choose "
                "another network, for instance one with layer norm"
            )
        return self.act(self.drop(super().forward(values)))


def _library() -> Any:
    try:
        return import_module("timm")
    except ImportError as error:
        raise UserError(
            f"model timm needs the library timm, which cannot be imported here ({error}): "
            "pip install 'raycluster[timm]' on every machine"
        ) from error


def _use_ghost_batch_norm(network: nn.Module, arch: str) -> None:
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, _BatchNorm) and _replaceable(child):
                setattr(parent, name, _RowsNorm(child, arch))
    for name, module in network.named_modules():
        if not isinstance(module, GhostBatchNorm) and "running_var" in dict(module.named_buffers(recurse=False)):
            raise UserError(
                f"model.arch: seen {arch}, whose layer {name} is a {type(module).__name__}; wanted batch norm that can "
                "be computed per microbatch, without which results depend on the number of workers. Choose another"
            )


def _replaceable(norm: _BatchNorm) -> bool:
    """Whether it is plain batch norm, or that with an activation."""
    plain = type(norm).__name__ in ("BatchNorm1d", "BatchNorm2d", "BatchNormAct2d")
    return plain and norm.affine and norm.track_running_stats and norm.momentum is not None


def _leave_out_random_draws(network: nn.Module) -> None:
    for module in network.modules():
        for name in ("p",) if isinstance(module, _DropoutNd) else _RANDOM:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
