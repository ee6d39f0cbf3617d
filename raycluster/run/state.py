"""A run: its settings, what stays the same while it goes on, what changes, and how that survives."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from raycluster.config import PluginField, settings
from raycluster.config.registry import did_you_mean
from raycluster.data.dataset import ImageDataset, ensure_manifest, open_dataset
from raycluster.data.manifest import DataSettings
from raycluster.data.sampling import whole_batches
from raycluster.data.transforms import Views
from raycluster.evaluation.runner import Evaluation, EvaluationSettings
from raycluster.features.extraction import SkippedImage
from raycluster.features.online import OnlineFeatureBank
from raycluster.io.run_paths import RunPaths
from raycluster.models.heads import Heads
from raycluster.run.checkpoint import AsyncCheckpointer, load_newest
from raycluster.run.directory import (
    check_directory,
    differences,
    holds_run,
    write_config,
)
from raycluster.run.local_workers import LocalWorkers
from raycluster.runtime.workers import Workers
from raycluster.seeding import seed_for
from raycluster.training.config import TrainingSettings
from raycluster.training.optimiser import Optimisers
from raycluster.training.step import Network
from raycluster.types import Assignments, UserError


@settings
class Elastic:
    """Between `min` and `max` training workers, as machines come and go."""

    min: Annotated[int, Field(ge=1)]
    max: Annotated[int, Field(ge=1)]


@settings
class RunSettings:
    """Where and how to run. Nothing here changes a result.

    dir: the run directory, a path or any URI that all nodes can write. resume: `auto` goes on where the directory
    stands, `never` wants no run in it. workers: training workers; 0 trains in the job itself, `{min, max}` is elastic,
    `auto` is 0 unless the cluster has several GPUs. device: what workers compute on; `auto` looks at the nodes that
    are there, so say `gpu` or `cpu` where an autoscaler has yet to bring them. decode_cpus: how many processors, in
    all, decoding may ask an autoscaler for; 0 for those that are there. actors: of the feature pool, 0 for one a
    node. checkpoint_minutes: between checkpoints within a round. keep_checkpoints: how many stay. max_failures: lost
    workers forgiven. resize_seconds: between looks at whether the cluster offers another number of workers.
    storage_minutes: for how long storage out of reach is tried again.
    """

    dir: str
    resume: Literal["auto", "never"] = "auto"
    workers: Literal["auto"] | Annotated[int, Field(ge=0)] | Elastic = "auto"
    device: Literal["auto", "gpu", "cpu"] = "auto"
    decode_cpus: Annotated[int, Field(ge=0)] = 0
    actors: Annotated[int, Field(ge=0)] = 0
    checkpoint_minutes: Annotated[float, Field(gt=0)] = 10.0
    keep_checkpoints: Annotated[int, Field(ge=1)] = 2
    max_failures: Annotated[int, Field(ge=0)] = 100
    resize_seconds: Annotated[float, Field(gt=0)] = 30.0
    storage_minutes: Annotated[float, Field(ge=0)] = 30.0

    def __post_init__(self) -> None:
        if self.workers == 0 and self.device != "auto":
            raise UserError(
                f"run.device: seen {self.device}; wanted auto where run.workers is 0: the job trains on what its own "
                "machine has. Set run.workers to at least 1, or leave run.device out"
            )

    def workers_wanted(self) -> tuple[int, int]:
        """(fewest, most) as far as the settings say; (0, 0) for `auto`."""
        if isinstance(self.workers, Elastic):
            return self.workers.min, self.workers.max
        return (0, 0) if self.workers == "auto" else (self.workers, self.workers)


@settings
class Config:
    """A whole run. Only the last section may differ between runs that must agree."""

    data: DataSettings
    views: Views
    model: Annotated[Any, PluginField("raycluster.models", "Model")]
    method: Annotated[Any, PluginField("raycluster.methods", "Method")]
    training: TrainingSettings
    run: RunSettings
    evaluation: EvaluationSettings = EvaluationSettings()
    seed: int = 0


@dataclass(frozen=True)
class Run:
    """What stays the same while a run goes on."""

    config: Config
    workers: Workers
    dataset: ImageDataset
    checkpointer: AsyncCheckpointer

    @cached_property
    def steps_per_epoch(self) -> int:
        size = self.config.training.global_batch
        return whole_batches(self.dataset.manifest.num_samples, size) // size

    @cached_property
    def rounds(self) -> list[tuple[int, int]]:
        """(first step, step after the last) of every round."""
        starts = self.config.method.reassignments(self.config.training.epochs, self.steps_per_epoch)
        return list(zip(starts, [*starts[1:], self.config.training.epochs * self.steps_per_epoch], strict=True))

    def position(self, round: int, step: int) -> int:
        """Optimiser steps done in the run when `step` steps of `round` are."""
        return (self.rounds[round][0] if round < len(self.rounds) else self.rounds[-1][1]) + step


@dataclass
class State:
    """What a checkpoint holds: a run can go on from it with any number of workers."""

    network: Network
    optimisers: Optimisers
    round: int = 0
    step: int = 0  # within the round
    assigned: int = -1  # the round that `assignments` belong to
    assignments: Assignments | None = None
    skipped: list[SkippedImage] = field(default_factory=list)
    online_features: OnlineFeatureBank | None = None
    running_sums: defaultdict[str, float] = field(
        default_factory=lambda: defaultdict(float)
    )  # sums over the round so far
    records: list[dict[str, Any]] = field(default_factory=list)


def validate_and_initialize(config: Config) -> None:
    """Check everything that can be checked before any expensive work, and leave config and manifest in the directory.

    Nothing is written over a run that has a checkpoint; what has none is begun anew. Raises UserError.
    """
    run_dir = config.run.dir
    check_directory(run_dir, config, config.run.resume)
    check_layers(config)
    manifest_uri = RunPaths(run_dir).manifest
    ensure_manifest(manifest_uri, config.data, fresh=not holds_run(run_dir))
    check_dataset(config, open_dataset(config.data, manifest_uri, LocalWorkers(), config.seed), run_dir)
    write_config(run_dir, config)


def check_dataset(config: Config, dataset: ImageDataset, directory: str) -> None:
    """UserError unless the images suffice for the clusters and the evaluation. directory: of cached manifests."""
    num_samples = dataset.manifest.num_samples
    for num_clusters in config.method.heads():
        if num_clusters > num_samples:
            raise UserError(
                f"method wants {num_clusters} clusters, but {config.data.uri} holds {num_samples} images; wanted at "
                "most one cluster an image, and a tenth of that to learn anything: set fewer clusters or add images"
            )
    if dataset.manifest.labels is not None or config.evaluation.test_uri is not None:
        Evaluation(config.evaluation, config.views.eval, directory, LocalWorkers()).check(dataset)


def check_layers(config: Config) -> None:
    """UserError unless the network has the layers that are named, and the views vary where several are averaged."""
    layers, wanted = config.model.build(0).layers, config.method.feature_request()
    if wanted and wanted.visits > 1 and not getattr(config.views, wanted.view).is_random:
        raise UserError(
            f"method averages {wanted.visits} views of an image, but views.{wanted.view} is always the same: "
            "average 1, or let it crop or vary at random"
        )
    for path, layer in (("method.layer", wanted and wanted.layer), ("evaluation.layer", config.evaluation.layer)):
        if layer is not None and layer not in layers:
            raise UserError(
                f"{path}: seen {layer}; wanted a layer of {config.model.name}, one of {', '.join(layers)}"
                + did_you_mean(layer, layers)
            )


def open_run(config: Config, workers: Workers) -> Run:
    """The run as its directory has it, begun if need be; collective."""
    workers.run_on_rank_zero(_ensure_initialized, config)
    dataset = open_dataset(config.data, RunPaths(config.run.dir).manifest, workers, config.seed)
    return Run(config, workers, dataset, AsyncCheckpointer(config.run.dir, keep=config.run.keep_checkpoints))


def _ensure_initialized(config: Config) -> None:
    if differences(config.run.dir, config) != []:
        validate_and_initialize(config)


def fresh_network(config: Config, device: torch.device) -> Network:
    """The network before it has learned anything: its weights follow from the seed alone."""
    backbone = config.model.build(seed_for(config.seed, "backbone"))
    sizes = (*config.method.heads(), *config.training.auxiliary_heads)
    heads = Heads(backbone.num_features, sizes, seed_for(config.seed, "head", 0))
    return Network(backbone, heads).to(device)


def restore(run: Run) -> State:
    """The state in the newest checkpoint, or that of a run that has not begun."""
    config, device = run.config, run.workers.device
    network = fresh_network(config, device)
    state = State(network, Optimisers(network.backbone, network.heads, config.training))
    saved = load_newest(config.run.dir, device)
    if saved is None:
        return state
    network.load_state_dict(saved["network"])
    state.optimisers.load_state_dict(saved["optimisers"])
    state.round, state.step, state.assigned = saved["round"], saved["step"], saved["assigned"]
    if saved["assignments"] is not None:
        labels, sizes, figures, arrays = saved["assignments"]
        kept = {name: tensor.cpu().numpy() for name, tensor in arrays.items()}
        state.assignments = Assignments(labels.cpu().numpy(), tuple(sizes), figures, kept)
    state.skipped = [SkippedImage(*item) for item in saved["skipped"]]
    state.running_sums, state.records = defaultdict(float, saved["tally"]), saved["records"]
    return state


def save(run: Run, state: State) -> None:
    """Begin to write a checkpoint; one worker does it for all."""
    found = state.assignments
    saved = {
        "network": state.network.state_dict(),
        "optimisers": state.optimisers.state_dict(),
        "round": state.round,
        "step": state.step,
        "assigned": state.assigned,
        "assignments": found
        and (
            torch.from_numpy(found.labels),
            list(found.num_clusters),
            found.figures,
            {name: torch.from_numpy(array) for name, array in found.state.items()},
        ),
        "skipped": [tuple(item) for item in state.skipped],
        "tally": dict(state.running_sums),
        "records": state.records,
    }
    run.checkpointer.save(saved)
