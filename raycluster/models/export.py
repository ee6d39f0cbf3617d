"""Export of the backbone: weights as safetensors, and the settings that rebuild the network."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from hashlib import sha256
from importlib import import_module
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from raycluster.io import storage
from raycluster.io.run_paths import RunPaths
from raycluster.models.backbone import Backbone
from raycluster.types import UserError

_LISTED = 5  # tensors named in an error


def export(backbone: Backbone, settings: Mapping[str, Any]) -> tuple[bytes, bytes]:
    """(content of backbone.safetensors, content of backbone.json).

    settings: the resolved configuration; `load_backbone` needs its section `model`. Residual networks use torchvision's
    parameter names, so `torchvision.models.resnet50().load_state_dict(..., strict=False)` accepts the weights.
    """
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in backbone.body.state_dict().items()}
    content = safetensors.torch.save(weights)
    description = {
        "settings": settings,
        "layers": backbone.layers,
        "num_features": backbone.num_features,
        "sha256": sha256(content).hexdigest(),
    }
    return content, json.dumps(description, indent=2).encode()


def load_backbone(run_dir: str | os.PathLike[str]) -> Backbone:
    """The exported backbone of a run, in evaluation mode: (n, 3, h, w) RGB uint8 or [0, 1] -> features before the last
    ReLU.

    run_dir: path or URI. Raises UserError if it holds no exported backbone, a damaged one, or one that this version
    cannot build.
    """
    paths = RunPaths(os.fspath(run_dir))
    description, content = _exported(paths)
    model = description["settings"]["model"]
    try:
        backbone: Backbone = import_module(f"raycluster.models.{model['name']}").Model(**model).build(seed=0)
        weights = safetensors.torch.load(content)
        backbone.body.load_state_dict(weights)
    except safetensors.SafetensorError as error:
        raise _damaged(paths.backbone_weights, error) from error
    except (ImportError, AttributeError, TypeError, ValueError, RuntimeError, MemoryError) as error:
        raise UserError(
            f"the backbone in {paths.directory} is a {model!r}, which this version cannot rebuild: {error}. Load it "
            "with the version that exported it"
        ) from error
    return backbone.eval()


def load_weights(backbone: Backbone, source: str) -> None:
    """Replace the weights and running statistics of a backbone by those of another one, in place.

    source: path or URI of the directory of a finished run, or of a .safetensors file. Names that the backbone lacks,
    such as those of heads, are ignored. Raises UserError if the source is damaged, or names or shapes do not fit.
    """
    wanted, found = backbone.body.state_dict(), _tensors(source)
    faults = [f"{name} is missing" for name in wanted if name not in found]
    faults += [
        f"{name} is {list(found[name].shape)}, wanted {list(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in found and found[name].shape != tensor.shape
    ]
    if faults:
        more = f" and {len(faults) - _LISTED} more" if len(faults) > _LISTED else ""
        raise UserError(
            f"model.weights: {storage.shown(source)} does not fit the model in {len(faults)} of {len(wanted)} tensors: "
            f"{'; '.join(faults[:_LISTED])}{more}. Choose the model that the weights were trained with, in its settings"
        )
    backbone.body.load_state_dict({name: found[name] for name in wanted})


def _tensors(source: str) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of the export in a run directory."""
    uri = source
    if storage.without_options(source)[0].endswith(".safetensors"):
        content = storage.read_bytes(source)
    else:
        paths = RunPaths(source)
        if not storage.exists(paths.backbone_weights):
            raise UserError(
                f"model.weights: seen {storage.shown(source)}, which holds no backbone.safetensors; wanted the "
                "directory of a finished run, or a .safetensors file"
            )
        uri, content = paths.backbone_weights, _exported(paths)[1]
    try:
        return safetensors.torch.load(content)
    except safetensors.SafetensorError as error:
        raise UserError(f"model.weights: {storage.shown(uri)} is no intact .safetensors file: {error}") from error


def _exported(paths: RunPaths) -> tuple[dict[str, Any], bytes]:
    """Content of backbone.json and of backbone.safetensors, whose checksum it holds."""
    description, content = _description(paths.backbone_description), storage.read_bytes(paths.backbone_weights)
    if description.get("sha256") not in (None, sha256(content).hexdigest()):
        raise _damaged(paths.backbone_weights, "its content does not match the checksum in backbone.json")
    return description, content


def _description(uri: str) -> dict[str, Any]:
    """Content of backbone.json, checked as far as it is read."""
    try:
        description: dict[str, Any] = json.loads(storage.read_bytes(uri))
        if isinstance(description["settings"]["model"]["name"], str):
            return description
        cause: object = "settings.model.name is no text"
    except UserError:
        raise
    except KeyError as error:
        cause = f"{error} is missing"
    except (ValueError, TypeError, RecursionError) as error:
        cause = error
    raise _damaged(uri, cause)


def _damaged(uri: str, cause: object) -> UserError:
    return UserError(
        f"{uri} is damaged: {cause}; copy backbone.json and backbone.safetensors again, or remove report.json and run "
        "the same command to export them again"
    )
