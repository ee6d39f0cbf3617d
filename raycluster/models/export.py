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

from raycluster.io import storage
from raycluster.io.run_paths import RunPaths
from raycluster.models.backbone import Backbone
from raycluster.types import UserError


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
    description, content = _description(paths.backbone_description), storage.read_bytes(paths.backbone_weights)
    if description.get("sha256") not in (None, sha256(content).hexdigest()):
        raise _damaged(paths.backbone_weights, "its content does not match the checksum in backbone.json")
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
