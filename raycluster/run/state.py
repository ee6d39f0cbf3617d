"""A run: its settings, what is fixed during it, its state, and how the state is saved and restored."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import nn

from raycluster.config import NonEmpty, PluginField, Seed, settings
from raycluster.config.registry import did_you_mean
from raycluster.data.dataset import ImageDataset, ensure_manifest, open_dataset
from raycluster.data.manifest import DataSettings
from raycluster.data.sampling import whole_batches
from raycluster.data.transforms import Views
from raycluster.evaluation.runner import Evaluation, EvaluationSettings
from raycluster.features.extraction import SkippedImage
from raycluster.features.matrix import device
from raycluster.features.online import OnlineFeatureBank
from raycluster.io import storage
from raycluster.io.run_paths import RunPaths
from raycluster.models.backbone import Backbone
from raycluster.models.export import load_backbone, load_weights
from raycluster.models.neck import Neck
from raycluster.run.checkpoint import AsyncCheckpointer, load_newest
from raycluster.run.directory import (
    check_directory,
    check_same_images,
    differences,
    holds_run,
    write_config,
)
from raycluster.run.local_workers import LocalWorkers
from raycluster.runtime.workers import Workers
from raycluster.seeding import generator, seed_for
from raycluster.training.config import TrainingSettings
from raycluster.training.memory import check_head_memory
from raycluster.training.objective import Objective
from raycluster.training.optimiser import Optimisers, layer_names
from raycluster.training.partial_softmax import with_partial_softmax
from raycluster.training.rotation import with_rotation
from raycluster.training.step import Network
from raycluster.types import Assignments, Crops, LabelSet, UserError


@settings
class Elastic:
    """Between `min` and `max` training workers, as machines come and go."""

    min: Annotated[int, Field(ge=1)]
    max: Annotated[int, Field(ge=1)]


@settings
class RunSettings:
    """Where and how to run. Nothing here changes a result.

    dir: the run directory, a path or any URI that all nodes can write. resume: `auto` resumes the run in it,
    if there is one, `never` refuses to. workers: training workers; 0 trains in the job itself, `{min, max}` is elastic,
    `auto` is 0 unless the cluster has several GPUs. device: what workers compute on; `auto` follows the nodes
    that are up, so set `gpu` or `cpu` where an autoscaler has yet to start them. decode_cpus: how many CPUs, in all,
    decoding may request from an autoscaler; 0 for those that are up. actors: of the feature pool, 0 for one a
    node. checkpoint_minutes: between checkpoints within a round. keep_checkpoints: how many stay. max_failures: how
    many lost workers end the run. resize_seconds: between checks whether the cluster offers another number of workers.
    storage_minutes: for how long unreachable storage is retried.
    """

    dir: NonEmpty
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
    seed: Seed = 0


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


def validate_and_initialize(config: Config) -> None:
    """Check everything that can be checked before any expensive work, and leave config and manifest in the directory.

    A run that has a checkpoint is never overwritten; one that has none starts anew. Raises UserError.
    """
    run_dir = config.run.dir
    check_directory(run_dir, config, config.run.resume)
    check_network(config, resumes=holds_run(run_dir))
    manifest_uri = RunPaths(run_dir).manifest
    ensure_manifest(manifest_uri, config.data, fresh=not holds_run(run_dir))
    check_dataset(config, open_dataset(config.data, manifest_uri, LocalWorkers(), config.seed), run_dir)
    write_config(run_dir, config)


def check_dataset(config: Config, dataset: ImageDataset, directory: str) -> None:
    """UserError unless the images suffice for the clusters and the evaluation. directory: of cached manifests."""
    crops = config.method.crops(dataset.manifest.num_samples, config.seed)
    num_samples, num_drawn = replace(dataset, crops=crops).num_samples, config.training.images_per_round
    if num_drawn is not None and num_drawn > num_samples:
        raise UserError(
            f"training.images_per_round: seen {num_drawn}; wanted at most the {num_samples} images of "
            f"{config.data.uri}, or null to train on all of them in each round"
        )
    for num_clusters in config.method.requested_clusters():
        if num_clusters > (num_drawn or num_samples):
            source = f"{config.data.uri} holds {num_samples} images"
            if num_drawn is not None:
                source = f"a round draws training.images_per_round = {num_drawn} images"
            raise UserError(
                f"method wants {num_clusters} clusters, but {source}; wanted at "
                "most one cluster an image, and a tenth of that to learn anything: set fewer clusters or add images"
            )
    request = config.method.feature_request(0)
    if num_drawn is not None and request is not None and config.method.feature_request(1) is None:
        raise UserError(
            f"training.images_per_round: seen {num_drawn}; wanted null, since {config.method.name} finds the labels of "
            "all images in the first round"
        )
    if request is not None and request.run is not None:
        check_same_images(request.run, dataset)
    if dataset.manifest.labels is not None or config.evaluation.test_uri is not None:
        Evaluation(config.evaluation, config.views.eval, directory, LocalWorkers()).check(dataset)


def check_network(config: Config, *, resumes: bool = False) -> None:
    """UserError unless the layers and views that are named exist, views vary where several are averaged, the heads fit
    the memory if this machine trains, and the weights to start from fit the model. resumes: has weights of its own.
    """
    request = config.method.feature_request(0)
    objective = build_objective(config, None)
    for name in objective.views:
        config.views.section(name)
    _check_gradients(config)
    _check_head_optimiser(config)
    if request and request.online and request.visits > len(objective.views):
        raise UserError(
            f"method: seen online features of {request.visits} views; wanted at most {len(objective.views)}, in which "
            "training sees an image"
        )
    if request and request.online and config.training.images_per_round is not None:
        raise UserError(
            f"training.images_per_round: seen {config.training.images_per_round}; wanted null with online features, "
            "which need a visit of every image in each epoch: leave it out, or use extracted features"
        )
    if request and request.visits > 1 and not config.views.section(request.view).is_random:
        raise UserError(
            f"method {'joins' if request.concatenate else 'averages'} {request.visits} views of an image, but "
            f"views.{request.view} is always the same: let it crop or vary at random, or take 1"
        )
    backbone = config.model.build(0)
    if config.run.workers == 0:
        _check_heads(config, backbone, device())
    if config.model.weights and not resumes:
        load_weights(backbone, config.model.weights)
    _check_layer(config.model.name, backbone, "evaluation.layer", config.evaluation.layer)
    _check_exceptions(config, layer_names(backbone))
    if request and request.run is None:
        _check_layer(config.model.name, backbone, "method.layer", request.layer)
    elif request and request.run and not resumes:
        _check_layer(request.run, _finished_backbone(request.run), "method.layer", request.layer)


def _check_exceptions(config: Config, known: list[str]) -> None:
    for name in config.training.layers:
        if name not in known:
            raise UserError(
                f"training.layers: seen {name}; wanted some of {', '.join(known)}, those of {config.model.name}"
                + did_you_mean(name, known)
            )


def _finished_backbone(run_dir: str) -> Backbone:
    if not storage.exists(RunPaths(run_dir).backbone_weights):
        raise UserError(
            f"method: {run_dir} holds no backbone.safetensors; wanted the directory of a finished run, whose features "
            "are clustered"
        )
    return load_backbone(run_dir)


def _check_layer(name: str, backbone: Backbone, path: str, layer: str | None) -> None:
    if layer is not None and layer not in backbone.layers:
        raise UserError(
            f"{path}: seen {layer}; wanted a layer of {name}, one of {', '.join(backbone.layers)}"
            + did_you_mean(layer, backbone.layers)
        )


def _check_heads(config: Config, backbone: Backbone, device: torch.device) -> None:
    neck = _build_neck(config, backbone)
    width = backbone.num_features if neck is None else neck.num_features
    check_head_memory(config.method.head_sizes(None), width, config.training, device)


def _check_head_optimiser(config: Config) -> None:
    """UserError where the optimiser of heads is set for a method that does not train them, or lacks its own rate."""
    training = config.training
    if config.method.trains_heads and training.optimiser != "sgd" and training.head_lr is None:
        raise UserError(
            f"training.head_lr: seen null with optimiser {training.optimiser}; wanted a learning rate for the SGD of "
            f"the heads, for which training.lr = {training.lr} is not meant"
        )
    for name, unset in (("head_lr", None), ("head_momentum", 0.0)):
        if not config.method.trains_heads and getattr(training, name) != unset:
            raise UserError(
                f"training.{name}: seen {getattr(training, name)}; wanted {unset} for method "
                f"{config.method.name}, whose heads are not trained: remove it"
            )


def _check_gradients(config: Config) -> None:
    """UserError where a view carries gradients for a network that reads pixels."""
    views = {"train": config.views.train, "eval": config.views.eval}
    views |= {f"extra.{name}": view for name, view in config.views.extra.items()}
    if config.model.input != "sobel" and (gradients := [name for name, view in views.items() if view.sobel]):
        raise UserError(
            f"views.{gradients[0]}.sobel: seen true; wanted false where model.input is {config.model.input}, since the "
            "network reads pixels: set model.input to sobel, or leave it out"
        )


def open_run(config: Config, workers: Workers) -> Run:
    """The run as its directory has it, initialized if need be. Collective."""
    workers.run_on_rank_zero(_ensure_initialized, config)
    dataset = open_dataset(config.data, RunPaths(config.run.dir).manifest, workers, config.seed)
    dataset = replace(dataset, crops=config.method.crops(dataset.manifest.num_samples, config.seed))
    return Run(config, workers, dataset, AsyncCheckpointer(config.run.dir, keep=config.run.keep_checkpoints))


def _ensure_initialized(config: Config) -> None:
    if differences(config.run.dir, config) != []:
        validate_and_initialize(config)


def build_objective(config: Config, assignments: Assignments | None) -> Objective:
    """What the method minimises, over part of the clusters or with rotation prediction if the settings ask for it."""
    objective: Objective = config.method.objective(assignments)
    if config.training.partial_softmax is not None:
        sizes = config.method.head_sizes(assignments)
        objective = with_partial_softmax(objective, config.training.partial_softmax, sizes)
    return with_rotation(objective) if config.training.rotation else objective


def _build_neck(config: Config, backbone: Backbone) -> Neck | None:
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
    network = Network(backbone, nn.Identity(), _build_neck(config, backbone))
    heads = build_heads(config, network.num_features, None, 0)
    assert heads is not None, f"{config.method.name} makes no heads to start with"
    network.heads = heads
    return network.to(device)


def restore(run: Run) -> State:
    """The state in the newest checkpoint, or that of a run that has not started."""
    config, device = run.config, run.workers.device
    network = fresh_network(config, device)
    _check_heads(config, network.backbone, device)
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
