"""What a run trains: network, heads and objective, as its settings and the assignments of a round make them."""

from __future__ import annotations

import torch
from torch import nn

from raycluster.models.backbone import Backbone
from raycluster.models.neck import Neck
from raycluster.run.config import Config
from raycluster.seeding import seed_for
from raycluster.training.objective import Objective
from raycluster.training.partial_softmax import with_partial_softmax
from raycluster.training.rotation import with_rotation
from raycluster.training.step import Network
from raycluster.types import Assignments


def build_objective(config: Config, assignments: Assignments | None) -> Objective:
    """What the method minimises, over part of the clusters or with rotation prediction if the settings ask for it."""
    objective: Objective = config.method.objective(assignments)
    if config.training.partial_softmax is not None:
        sizes = config.method.head_sizes(assignments)
        objective = with_partial_softmax(objective, config.training.partial_softmax, sizes)
    return with_rotation(objective) if config.training.rotation else objective


def build_neck(config: Config, backbone: Backbone) -> Neck | None:
    """What the heads read the backbone through, None for the backbone itself."""
    neck: Neck | None = config.method.neck(backbone.num_features, seed_for(config.seed, "neck"))
    return neck


def build_heads(config: Config, width: int, assignments: Assignments | None, round: int) -> nn.Module | None:
    """The heads that the method makes for assignments of this round, None if it keeps those there are."""
    auxiliary, seed = build_objective(config, assignments).auxiliary, seed_for(config.seed, "head", round)
    heads: nn.Module | None = config.method.heads(width, assignments, auxiliary=auxiliary, seed=seed)
    return heads


def fresh_network(config: Config, device: torch.device) -> Network:
    """The untrained network: its weights follow from the seed alone."""
    backbone = config.model.build(seed_for(config.seed, "backbone"))
    network = Network(backbone, nn.Identity(), build_neck(config, backbone))
    heads = build_heads(config, network.num_features, None, 0)
    assert heads is not None, f"{config.method.name} makes no heads to start with"
    network.heads = heads
    return network.to(device)
