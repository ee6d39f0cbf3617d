"""Evaluation of a finished run on a Ray cluster."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

from raycluster.config import parse
from raycluster.config.registry import did_you_mean
from raycluster.data.dataset import open_dataset
from raycluster.data.decode import BrokenImage
from raycluster.data.manifest import Manifest, read_manifest
from raycluster.data.reader import contents
from raycluster.distributed.errors import user_errors
from raycluster.distributed.features.feature_pool import FeaturePoolClient, start_pool
from raycluster.distributed.session import ray_session
from raycluster.distributed.workers import RayWorkers
from raycluster.evaluation.metrics import agreement
from raycluster.evaluation.runner import Evaluation
from raycluster.io import storage
from raycluster.io.assignments import read_label_sets
from raycluster.io.run_paths import RunPaths
from raycluster.models.backbone import Backbone
from raycluster.models.export import load_backbone
from raycluster.monitoring.console import agreement_table, table
from raycluster.run.config import Config
from raycluster.run.directory import read_config_text
from raycluster.training.determinism import float32_precision
from raycluster.types import UserError

COMPARED = 64  # pairs of images whose content is compared


def evaluate_run(run_dir: str, overrides: Sequence[str] = ()) -> str:
    """Tables of accuracies per layer, and of the agreement of the run's clusters with the true labels, as text.

    run_dir: of a finished run. overrides: of its settings, e.g. `data.uri=...`, `evaluation.layer=all`.
    """
    paths = RunPaths(run_dir)
    config = parse(Config, read_config_text(run_dir), overrides, source=paths.config)
    backbone = load_backbone(run_dir)
    layers = _layers(config.evaluation.layer, backbone)
    with ray_session(), user_errors(), float32_precision(tf32=False):
        workers = RayWorkers(FeaturePoolClient(start_pool(f"evaluate-{uuid.uuid4().hex[:8]}", 1)))
        backbone.to(workers.device)
        scratch = paths.evaluation(sha256(repr(config.data).encode()).hexdigest()[:8])
        dataset = open_dataset(config.data, scratch.manifest, workers, config.seed)
        Evaluation(config.evaluation, config.views.eval, scratch.directory, workers).check(dataset)
        agreements = agreement_with_run(run_dir, dataset.manifest)
        rows: dict[str, dict[str, float]] = {}
        for layer in layers:
            settings = replace(config.evaluation, layer=layer)
            evaluation = Evaluation(settings, config.views.eval, scratch.directory, workers)
            rows |= {layer: evaluation.compare({layer: backbone}, dataset)[layer]}
    return "\n\n".join([table(rows), agreement_table(agreements)])


def _layers(wanted: str | None, backbone: Backbone) -> Sequence[str]:
    if wanted == "all":
        return backbone.layers
    if wanted is not None and wanted not in backbone.layers:
        raise UserError(
            f"evaluation.layer: seen {wanted}; wanted all, or one of {', '.join(backbone.layers)}"
            + did_you_mean(wanted, backbone.layers)
        )
    return (wanted or backbone.layers[-1],)


def agreement_with_run(run_dir: str, manifest: Manifest) -> dict[str, dict[str, float]] | None:
    """Per head: the run's clusters against the true labels in `manifest`; None if its images are not the run's.

    Images are matched by path. Unless both manifests list the same data set, the bytes of `COMPARED` pairs must agree.
    """
    own = read_manifest(RunPaths(run_dir).manifest)
    index = {path: sample for sample, path in enumerate(own.paths.to_pylist())}
    samples = np.array([index.get(path, -1) for path in manifest.paths.to_pylist()], np.int64)
    others = np.flatnonzero(samples >= 0)
    samples = samples[others]
    listed_alike = own.source["uri"] == manifest.source["uri"] and own.fingerprint == manifest.fingerprint
    if manifest.labels is None or not (listed_alike or _same_content(own, samples, manifest, others)):
        return None
    truth, folder = manifest.labels[others], RunPaths(run_dir).assignments
    label_sets = read_label_sets(folder) if storage.exists(folder) else ()
    if any(len(one.labels) != own.num_samples for one in label_sets):  # of crops of the images
        return {}
    return {f"label_{head}": agreement.evaluate(one.labels[samples], truth) for head, one in enumerate(label_sets)}


def _same_content(one: Manifest, samples: NDArray[np.int64], other: Manifest, others: NDArray[np.int64]) -> bool:
    """Whether one[samples[i]] and other[others[i]] have equal bytes, for evenly spread i; skips unreadable pairs."""
    chosen = np.unique(np.linspace(0, len(samples) - 1, min(COMPARED, len(samples))).astype(np.int64))
    try:
        pairs = [
            pair
            for pair in zip(
                contents(one.entries.take(samples[chosen]), one.image_column),
                contents(other.entries.take(others[chosen]), other.image_column),
                strict=True,
            )
            if not any(isinstance(content, BrokenImage) for content in pair)
        ]
    except UserError:  # the images of the run cannot be read
        return False
    return bool(pairs) and all(first == second for first, second in pairs)
