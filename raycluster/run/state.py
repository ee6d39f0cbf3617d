"""A run: what is fixed during it, its state, and how the state is saved and restored."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from raycluster.data.dataset import ImageDataset, open_dataset
from raycluster.data.sampling import whole_batches
from raycluster.features.extraction import SkippedImage
from raycluster.features.online import OnlineFeatureBank
from raycluster.io.run_paths import RunPaths
from raycluster.models.export import load_weights
from raycluster.run.checkpoint import AsyncCheckpointer, load_newest
from raycluster.run.config import Config
from raycluster.run.directory import (
    differences,
)
from raycluster.run.network import build_heads, build_objective, fresh_network
from raycluster.run.validation import check_heads, validate_and_initialize
from raycluster.runtime.workers import Workers
from raycluster.seeding import generator
from raycluster.training.objective import Objective
from raycluster.training.optimiser import Optimisers
from raycluster.training.step import Network
from raycluster.types import Assignments, Crops, LabelSet, UserError


@dataclass(frozen=True)
class Run:
    """What stays the same during a run."""

    config: Config
    workers: Workers
    dataset: ImageDataset
    checkpointer: AsyncCheckpointer

    @cached_property
    def images(self) -> ImageDataset:
        """The data set with each image as one sample, whatever the samples of the method are."""
        return replace(self.dataset, crops=None)

    def located(self, assignments: Assignments) -> ImageDataset:
        """The data set with its samples where these assignments have them."""
        return self.dataset if assignments.crops is None else replace(self.dataset, crops=assignments.crops)

    @cached_property
    def steps_per_epoch(self) -> int:
        size, num_samples = self.config.training.global_batch, self.dataset.num_samples
        num_rows = self.config.method.rows_per_epoch(self.config.training.images_per_round or num_samples)
        return whole_batches(num_rows, size) // size

    def draw(self, round: int) -> NDArray[np.bool_] | None:
        """(N,) the samples of this round, None for all: it follows from the seed alone."""
        number, total = self.config.training.images_per_round, self.dataset.num_samples
        if number is None or number >= total:
            return None
        drawn = np.zeros(total, np.bool_)
        drawn[generator(self.config.seed, "draw", round).choice(total, number, replace=False)] = True
        return drawn

    @cached_property
    def rounds(self) -> list[tuple[int, int]]:
        """(first step, step after the last) of every round."""
        starts = self.config.method.reassign_steps(self.config.training.epochs, self.steps_per_epoch)
        return list(zip(starts, [*starts[1:], self.config.training.epochs * self.steps_per_epoch], strict=True))

    def position(self, round: int, step: int) -> int:
        """Optimiser steps done in the run when `step` steps of `round` are."""
        return (self.rounds[round][0] if round < len(self.rounds) else self.rounds[-1][1]) + step


@dataclass
class State:
    """What a checkpoint holds: a run can resume from it with any number of workers.

    step: within the round. assigned: the round that `assignments` belong to. running_sums: over the round so far.
    """

    network: Network
    optimisers: Optimisers
    objective: Objective
    round: int = 0
    step: int = 0
    assigned: int = -1
    assignments: Assignments | None = None
    skipped: list[SkippedImage] = field(default_factory=list)
    online_features: OnlineFeatureBank | None = None
    running_sums: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    records: list[dict[str, Any]] = field(default_factory=list)


def open_run(config: Config, workers: Workers) -> Run:
    """The run as its directory has it, initialized if need be. Collective."""
    workers.run_on_rank_zero(_ensure_initialized, config)
    dataset = open_dataset(config.data, RunPaths(config.run.dir).manifest, workers, config.seed)
    dataset = replace(dataset, crops=config.method.crops(dataset.manifest.num_samples, config.seed))
    return Run(config, workers, dataset, AsyncCheckpointer(config.run.dir, keep=config.run.keep_checkpoints))


def _ensure_initialized(config: Config) -> None:
    if differences(config.run.dir, config) != []:
        validate_and_initialize(config)


def restore(run: Run) -> State:
    """The state in the newest checkpoint, or that of a run that has not started."""
    config, device = run.config, run.workers.device
    network = fresh_network(config, device)
    check_heads(config, network.backbone, device)
    saved = load_newest(config.run.dir, device)
    if saved is None:
        if config.model.weights:
            load_weights(network.backbone, config.model.weights)
        optimisers = Optimisers(network.body, network.heads, config.training)
        return State(network, optimisers, build_objective(config, None))
    assignments = _unpack_assignments(saved["assignments"])
    if assignments is not None:
        heads = build_heads(config, network.num_features, assignments, saved["assigned"])
        network.heads = (heads or network.heads).to(device)
    _check_head_sizes(saved["head_shapes"], network.heads)
    network.load_state_dict(saved["network"])
    optimisers = Optimisers(network.body, network.heads, config.training)
    optimisers.load_state_dict(saved["optimisers"])
    objective = build_objective(config, assignments)
    objective.load_state_dict(saved["objective"])
    return State(
        network,
        optimisers,
        objective,
        round=saved["round"],
        step=saved["step"],
        assigned=saved["assigned"],
        assignments=assignments,
        skipped=[SkippedImage(*item) for item in saved["skipped"]],
        running_sums=defaultdict(float, saved["running_sums"]),
        records=saved["records"],
    )


def save(run: Run, state: State, skipped: Sequence[SkippedImage]) -> None:
    """Begin to write a checkpoint; one worker does it for all. skipped: of all workers."""
    saved = {
        "network": state.network.state_dict(),
        "head_shapes": _head_shapes(state.network.heads),
        "optimisers": state.optimisers.state_dict(),
        "objective": state.objective.state_dict(),
        "round": state.round,
        "step": state.step,
        "assigned": state.assigned,
        "assignments": _pack_assignments(state.assignments),
        "skipped": [tuple(item) for item in skipped],
        "running_sums": dict(state.running_sums),
        "records": state.records,
    }
    run.checkpointer.save(saved)


def _head_shapes(heads: nn.Module) -> dict[str, list[int]]:
    """What numbers of classes a checkpoint holds, which may change from round to round."""
    return {name: list(tensor.shape) for name, tensor in heads.state_dict().items()}


def _check_head_sizes(saved: dict[str, list[int]], heads: nn.Module) -> None:
    if saved != _head_shapes(heads):
        raise UserError(
            f"the checkpoint holds heads of shapes {saved}, this version makes {_head_shapes(heads)} of its "
            "assignments; resume with the version that wrote it, or start again in another run.dir"
        )


def _pack_assignments(found: Assignments | None) -> dict[str, Any] | None:
    """Plain tensors, numbers and lists, as checkpoints hold them."""
    if found is None:
        return None
    return {
        "num_samples": found.num_samples,
        "label_sets": [(torch.from_numpy(one.labels), one.num_classes, one.weight) for one in found.label_sets],
        "metrics": found.metrics,
        "state": {name: torch.from_numpy(array) for name, array in found.state.items()},
        "drawn": None if found.drawn is None else torch.from_numpy(found.drawn),
        "crops": None if found.crops is None else [*map(torch.from_numpy, (found.crops.images, found.crops.boxes))],
    }


def _unpack_assignments(saved: dict[str, Any] | None) -> Assignments | None:
    if saved is None:
        return None
    label_sets = tuple(LabelSet(labels.cpu().numpy(), *sizes) for labels, *sizes in saved["label_sets"])
    state = {name: tensor.cpu().numpy() for name, tensor in saved["state"].items()}
    drawn, crops = saved.get("drawn"), saved.get("crops")
    return Assignments(
        saved["num_samples"],
        label_sets,
        saved["metrics"],
        state,
        None if drawn is None else drawn.cpu().numpy(),
        None if crops is None else Crops(*(tensor.cpu().numpy() for tensor in crops)),
    )
