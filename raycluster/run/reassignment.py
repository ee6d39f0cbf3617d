"""Reassignment: the features of every sample with the current weights, and the labels that a method finds in them."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from raycluster.evaluation.metrics import balance
from raycluster.evaluation.metrics.agreement import mutual_information
from raycluster.events import Event, Progress
from raycluster.features.extraction import FeatureSpec, SkippedImage, extract
from raycluster.features.interruptible import Interruptible
from raycluster.features.matrix import sample_ids
from raycluster.features.online import KEPT_EPOCHS
from raycluster.io.run_paths import RunPaths
from raycluster.methods.base import AssignmentContext
from raycluster.models.export import load_backbone
from raycluster.run.directory import write_skipped
from raycluster.run.state import Run, State
from raycluster.runtime.workers import FeatureBlocksLost
from raycluster.seeding import seed_for
from raycluster.types import Assignments, FeatureRequest, LabelSet, UserError


@dataclass(frozen=True)
class Reassignment:
    """What a reassignment found. skipped: all images so far that could not be used. seconds: by phase."""

    assignments: Assignments
    skipped: list[SkippedImage]
    seconds: dict[str, float]


def reassign(run: Run, state: State) -> Generator[Event, None, Reassignment]:
    """Extract the features that the method requests, and assign labels. Yields progress, returns a Reassignment.

    Features that are lost with a machine are extracted again. Collective.
    """
    workers, started_at = run.workers, time.monotonic()
    request = run.config.method.feature_request(state.round)
    network = _described(state, request, workers.device)
    version = workers.run_on_rank_zero(_version, state.round, network)
    skipped, again = state.skipped, False
    while True:
        if request is not None:
            skipped = yield from _extract(run, state, request, network, version, again=again)
        extracted_at = time.monotonic()
        sizes = " + ".join(map(str, run.config.method.requested_clusters()))
        yield Progress("clustering", 0, 1, f"into {sizes}" if sizes else "")
        try:
            found, absent = workers.run_on_rank_zero(_assign, run, state, version)
            break
        except FeatureBlocksLost:
            again = True
    seconds = {"extracting": extracted_at - started_at, "assigning": time.monotonic() - extracted_at}
    # What was extracted by an earlier group of workers, which alone knew the reasons.
    known = {item.sample for item in skipped}
    unnamed = [SkippedImage(sample, "it had no features to cluster") for sample in absent if sample not in known]
    return Reassignment(found, skipped + unnamed, seconds)


def _extract(
    run: Run, state: State, request: FeatureRequest, network: nn.Module, version: str, *, again: bool
) -> Generator[Event, None, list[SkippedImage]]:
    """Extract the requested features of every readable sample; returns all skipped images. again: not the first."""
    view, epoch = run.config.views.section(request.view), -1 - state.round  # epochs of training begin with 0
    feature_spec = FeatureSpec(
        view,
        request.layer,
        "flat" if request.kind == "projections" else request.kind,
        request.visits,
        epoch if view.is_random or request.training else 0,
        run.config.training.microbatch if request.training else None,
        request.concatenate,
    )
    skipped, drawn = state.skipped, run.draw(state.round)
    missing = [shard for shard, span in enumerate(run.dataset.shards) if drawn is None or drawn[slice(*span)].any()]
    if state.online_features is not None:
        left_out = np.zeros(run.dataset.num_samples, np.bool_) if drawn is None else ~drawn
        left_out[[item.sample for item in skipped]] = True
        oldest = run.position(state.round, 0) - KEPT_EPOCHS * run.steps_per_epoch
        missing = state.online_features.put(
            run.workers,
            version,
            run.dataset.shards,
            np.flatnonzero(left_out),
            oldest=oldest * run.config.training.global_batch,
        )
    for event in extract(
        network,
        run.dataset,
        run.workers,
        feature_spec=feature_spec,
        version=version,
        shards=missing,
        drawn=drawn,
        again=again,
    ):
        if isinstance(event, SkippedImage):
            skipped = sorted({*skipped, event})
        else:
            yield event
    _check_budget(run, skipped)
    return skipped


def _described(state: State, request: FeatureRequest | None, device: torch.device) -> nn.Module:
    """The network whose features are requested."""
    if request is not None and request.run is not None:
        return load_backbone(request.run).to(device)
    return state.network.body if request is not None and request.kind == "projections" else state.network.backbone


def _version(round: int, network: nn.Module) -> str:
    """Names the weights that features come from, so that features of other weights are never mixed in."""
    digest = sha256(str(round).encode())
    for tensor in network.state_dict().values():
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _check_budget(run: Run, skipped: list[SkippedImage]) -> None:
    data, total = run.config.data, run.dataset.num_samples
    run.workers.run_on_rank_zero(write_skipped, run.config.run.dir, run.dataset, skipped)
    if len(skipped) > data.max_broken_fraction * total:
        first = [f"{run.dataset.path(item.sample)}: {item.reason}" for item in skipped[:3]]
        raise UserError(
            f"{len(skipped)} of {total} images could not be read, more than data.max_broken_fraction = "
            f"{data.max_broken_fraction} allows; the first: {'; '.join(first)}. All of them are named in "
            f"{RunPaths(run.config.run.dir).skipped}; mend or remove them, or allow more"
        )


def _assign(run: Run, state: State, version: str) -> tuple[Assignments, list[int]]:
    """New labels, with what a user wants to know about them; and the samples that had no features, ascending."""
    method, config = run.config.method, run.config
    context = AssignmentContext(
        num_samples=run.dataset.num_samples,
        round=state.round,
        seed=seed_for(config.seed, "assign", state.round),
        heads=state.network.heads,
        previous=state.assignments,
    )
    wanted = method.feature_request(state.round) is not None
    features = Interruptible(run.workers.features(version), run.workers.stopping) if wanted else None
    found: Assignments = replace(method.assign(features, context), drawn=run.draw(state.round))
    metrics = {**found.metrics, **describe(found, state.assignments, run.dataset.labels)}
    if features is None:
        return replace(found, metrics=metrics), []
    absent = ~found.included if found.drawn is None else found.drawn & ~found.included
    if absent.any():  # a method may also leave out samples that have features
        absent[sample_ids(features)] = False
    return replace(found, metrics=metrics), np.flatnonzero(absent).tolist()


def describe(found: Assignments, previous: Assignments | None, truth: NDArray[np.int32] | None) -> dict[str, float]:
    """Metrics of an assignment: sizes, change since the previous one, agreement with labels; means over label sets.

    truth: (N,) true classes, -1 where unknown. Returns {} where there are no label sets.
    """
    before: Sequence[LabelSet | None] = () if previous is None else previous.label_sets
    before = before if len(before) == len(found.label_sets) else [None] * len(found.label_sets)
    sets = [_describe_set(one, old, truth) for one, old in zip(found.label_sets, before, strict=True)]
    names = [name for name in (sets[0] if sets else ()) if all(name in metrics for metrics in sets)]
    return {name: float(np.mean([metrics[name] for metrics in sets])) for name in names}


def _describe_set(one: LabelSet, previous: LabelSet | None, truth: NDArray[np.int32] | None) -> dict[str, float]:
    labels, included = one.labels, one.labels >= 0
    metrics = balance.balance(np.bincount(labels[included], minlength=one.num_classes))
    metrics["num_clusters"] = float(one.num_classes)
    if previous is not None and (both := included & (previous.labels >= 0)).any():
        metrics["nmi_previous"] = mutual_information(labels[both], previous.labels[both])
        metrics["changed_share"] = balance.changed_share(labels, previous.labels)
    if truth is not None:
        known = included & (truth >= 0)
        metrics["nmi_labels"] = mutual_information(labels[known], truth[known])
    return metrics
