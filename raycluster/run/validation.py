"""Checks of a run before any expensive work."""

from __future__ import annotations

from dataclasses import replace

import torch

from raycluster.config.registry import did_you_mean
from raycluster.data.dataset import ImageDataset, ensure_manifest, open_dataset
from raycluster.evaluation.runner import Evaluation
from raycluster.features.matrix import device
from raycluster.io import storage
from raycluster.io.run_paths import RunPaths
from raycluster.models.backbone import Backbone
from raycluster.models.export import load_backbone, load_weights
from raycluster.run.config import Config
from raycluster.run.directory import (
    check_directory,
    check_same_images,
    holds_run,
    write_config,
)
from raycluster.run.local_workers import LocalWorkers
from raycluster.run.network import build_neck, build_objective
from raycluster.training.memory import check_head_memory
from raycluster.training.optimiser import layer_names
from raycluster.types import UserError


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
    if request and request.visits > 1 and not config.views.section(request.view).is_random:
        raise UserError(
            f"method {'joins' if request.concatenate else 'averages'} {request.visits} views of an image, but "
            f"views.{request.view} is always the same: let it crop or vary at random, or take 1"
        )
    backbone = config.model.build(0)
    if config.run.workers == 0:
        check_heads(config, backbone, device())
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


def check_heads(config: Config, backbone: Backbone, device: torch.device) -> None:
    """UserError if the heads do not fit the memory of the device."""
    neck = build_neck(config, backbone)
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
