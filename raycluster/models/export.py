"""The backbone as a file for other programs: weights as safetensors, and the settings that rebuild it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from importlib import import_module
from typing import Any

import safetensors.torch

from raycluster.io import storage
from raycluster.models.backbone import Backbone
from raycluster.types import UserError

WEIGHTS, DESCRIPTION = "backbone.safetensors", "backbone.json"


def export(backbone: Backbone, settings: Mapping[str, Any]) -> tuple[bytes, bytes]:
    """(content of backbone.safetensors, content of backbone.json).

    settings: the resolved configuration; its section `model` is needed to build the network again. Residual networks
    keep torchvision's parameter names, so `torchvision.models.resnet50().load_state_dict(..., strict=False)` takes the
    weights.
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


def load_backbone(run_uri: str) -> Backbone:
    """The exported backbone of a run, in evaluation mode: (n, 3, h, w) RGB uint8 or [0, 1] -> features before the last
    ReLU.

    Raises UserError if `run_uri` holds no exported backbone, a damaged one, or one that this version cannot build.
    """
    description = json.loads(storage.read_bytes(storage.join(run_uri, DESCRIPTION)))
    content = storage.read_bytes(storage.join(run_uri, WEIGHTS))
    if description.get("sha256") not in (None, sha256(content).hexdigest()):
        raise UserError(
            f"{storage.join(run_uri, WEIGHTS)} is damaged: its content does not match the checksum in {DESCRIPTION}; "
            "copy both files again, or remove report.json and run the same command to export them again"
        )
    model = description["settings"]["model"]
    try:
        backbone: Backbone = import_module(f"raycluster.models.{model['name']}").Model(**model).build(seed=0)
        weights = safetensors.torch.load(content)
        backbone.body.load_state_dict(weights)
    except (ImportError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"the backbone in {run_uri} is a {model!r}, which this version cannot rebuild: {error}. Load it with the "
            "version that exported it"
        ) from error
    return backbone.eval()
