"""Evaluate a finished run on the machines at hand."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from hashlib import sha256

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raycluster.config import parse
from raycluster.config.registry import did_you_mean
from raycluster.data.dataset import ImageDataset, open_dataset
from raycluster.distributed.errors import user_errors
from raycluster.distributed.features.feature_pool import FeaturePoolClient, start_pool
from raycluster.distributed.session import ray_session
from raycluster.distributed.workers import RayWorkers
from raycluster.evaluation.metrics import agreement
from raycluster.evaluation.runner import Evaluation
from raycluster.io import storage
from raycluster.models.backbone import Backbone
from raycluster.models.export import load_backbone
from raycluster.monitoring.console import agreement_table, table
from raycluster.run.state import Config
from raycluster.types import UserError


def evaluate_run(run_dir: str, overrides: Sequence[str] = ()) -> str:
    """Tables of accuracies per layer, and of the agreement of the run's clusters with the true labels, as text.

    run_dir: of a finished run. overrides: of its settings, e.g. `data.uri=...`, `evaluation.layer=all`.
    """
    text = storage.read_bytes(storage.join(run_dir, "config.yaml")).decode()
    config = parse(Config, text, overrides, source=storage.join(run_dir, "config.yaml"))
    backbone = load_backbone(run_dir)
    layers = _layers(config.evaluation.layer, backbone)
    with ray_session(), user_errors():
        workers = RayWorkers(FeaturePoolClient(start_pool(f"evaluate-{uuid.uuid4().hex[:8]}", 1)))
        backbone.to(workers.device)
        scratch = storage.join(run_dir, "evaluation", sha256(repr(config.data).encode()).hexdigest()[:8])
        dataset = open_dataset(config.data, storage.join(scratch, "manifest.parquet"), workers, config.seed)
        Evaluation(config.evaluation, config.views.eval, scratch, workers).check(dataset)
        rows: dict[str, dict[str, float]] = {}
        for layer in layers:
            evaluation = Evaluation(replace(config.evaluation, layer=layer), config.views.eval, scratch, workers)
            rows |= {layer: evaluation.compare({layer: backbone}, dataset)[layer]}
    return "\n\n".join([table(rows), agreement_table(_agreement(run_dir, dataset))])


def _layers(wanted: str | None, backbone: Backbone) -> Sequence[str]:
    if wanted == "all":
        return backbone.layers
    if wanted is not None and wanted not in backbone.layers:
        raise UserError(
            f"evaluation.layer: seen {wanted}; wanted all, or one of {', '.join(backbone.layers)}"
            + did_you_mean(wanted, backbone.layers)
        )
    return (wanted or backbone.layers[-1],)


def _agreement(run_dir: str, dataset: ImageDataset) -> dict[str, dict[str, float]]:
    """Per head: the run's clusters against the true labels of the pictures that both know, by path."""
    if dataset.manifest.labels is None:
        return {}
    files = storage.list_files(storage.join(run_dir, "assignments"))
    read = partial(pq.read_table, page_checksum_verification=True)
    found = pa.concat_tables([read(pa.BufferReader(storage.read_bytes(uri))) for uri in files])
    truth = dict(zip(dataset.manifest.paths.to_pylist(), dataset.manifest.labels, strict=True))
    known = np.array([truth.get(path, -1) for path in found["path"].to_pylist()])
    if not (known >= 0).any():
        return {}
    heads = [name for name in found.column_names if name.startswith("label_")]
    return {name: agreement.evaluate(found[name].to_numpy(), known) for name in heads}
