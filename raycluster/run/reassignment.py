"""Labels anew: the features of every image with the weights of now, and the assignments that a method finds in them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

from raycluster.evaluation.metrics import balance
from raycluster.evaluation.metrics.agreement import mutual_information
from raycluster.events import Event, Progress
from raycluster.features.extraction import FeatureSpec, SkippedImage, extract
from raycluster.features.interruptible import Interruptible
from raycluster.io.run_paths import RunPaths
from raycluster.models.heads import Heads
from raycluster.run.directory import write_skipped
from raycluster.run.state import Run, State
from raycluster.runtime.workers import FeatureBlocksLost
from raycluster.seeding import seed_for
from raycluster.types import Assignments, FeatureRequest, UserError


def reassign(run: Run, state: State) -> Iterator[Event]:
    """Features of every image with the weights of now, and new labels from them."""
    config, workers, began = run.config, run.workers, time.monotonic()
    wanted, version, again = config.method.feature_request(), workers.run_on_rank_zero(_version, state), False
    while True:
        if wanted is not None:
            yield from _extract(run, state, wanted, version, again=again)
        extracted = time.monotonic()
        yield Progress("clustering", 0, 1, f"into {' + '.join(map(str, config.method.heads()))}")
        try:
            found = workers.run_on_rank_zero(_assign, run, state, version)
            break
        except FeatureBlocksLost:
            again = True
    state.running_sums["seconds_extracting"] += extracted - began
    state.running_sums["seconds_assigning"] += time.monotonic() - extracted
    state.assignments, state.assigned = found, state.round
    # Extracted by a group of workers that is gone, which knew why.
    state.skipped += _unnamed(found, state.skipped)
    if config.method.resets_heads:
        sizes = (*found.num_clusters, *config.training.auxiliary_heads)
        heads = Heads(state.network.backbone.num_features, sizes, seed_for(config.seed, "head", state.round))
        state.network.heads = heads.to(workers.device)
        state.optimisers.new_heads(state.network.heads)


def _extract(run: Run, state: State, wanted: FeatureRequest, version: str, *, again: bool) -> Iterator[Event]:
    """What the method wants, of every image that can be read. again: not for the first time."""
    view, epoch = getattr(run.config.views, wanted.view), -1 - state.round  # epochs of training begin with 0
    feature_spec = FeatureSpec(view, wanted.layer, wanted.kind, wanted.visits, epoch if view.is_random else 0)
    shards: Sequence[int] = range(len(run.dataset.manifest.shards))
    if state.online_features is not None:
        skipped = np.array([item.sample for item in state.skipped], np.int64)
        shards = state.online_features.put(run.workers, version, run.dataset.manifest.shards, skipped)
    for event in extract(
        state.network.backbone,
        run.dataset,
        run.workers,
        feature_spec=feature_spec,
        version=version,
        shards=shards,
        again=again,
    ):
        if isinstance(event, SkippedImage):
            state.skipped = sorted({*state.skipped, event})
        else:
            yield event
    _check_budget(run, state.skipped)


def _unnamed(found: Assignments, skipped: list[SkippedImage]) -> list[SkippedImage]:
    absent = set(np.flatnonzero((found.labels < 0).all(axis=0)).tolist()) - {item.sample for item in skipped}
    return [SkippedImage(sample, "it had no features to cluster") for sample in sorted(absent)]


def _version(state: State) -> str:
    """Names the weights that features come from, so that features of other weights are never mixed in."""
    digest = sha256(str(state.round).encode())
    for tensor in state.network.backbone.state_dict().values():
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _check_budget(run: Run, skipped: list[SkippedImage]) -> None:
    data, total = run.config.data, run.dataset.manifest.num_samples
    run.workers.run_on_rank_zero(write_skipped, run.config.run.dir, run.dataset.manifest, skipped)
    if len(skipped) > data.max_broken_fraction * total:
        first = [f"{run.dataset.manifest.paths[item.sample]}: {item.reason}" for item in skipped[:3]]
        raise UserError(
            f"{len(skipped)} of {total} images could not be read, more than data.max_broken_fraction = "
            f"{data.max_broken_fraction} allows; the first: {'; '.join(first)}. All of them are named in "
            f"{RunPaths(run.config.run.dir).skipped}; mend or remove them, or allow more"
        )


def _assign(run: Run, state: State, version: str) -> Assignments:
    """New labels, with what a user wants to know about them."""
    method = run.config.method
    found: Assignments = method.assign(
        Interruptible(run.workers.features(version), run.workers.stopping) if method.feature_request() else None,
        num_samples=run.dataset.manifest.num_samples,
        seed=seed_for(run.config.seed, "assign", state.round),
        heads=state.network.heads.arrays()[: len(method.heads())],
        previous=state.assignments,
    )
    figures = {**found.figures, **describe(found, state.assignments, run.dataset.manifest.labels)}
    return Assignments(found.labels, found.num_clusters, figures, found.state)


def describe(found: Assignments, previous: Assignments | None, truth: NDArray[np.int32] | None) -> dict[str, float]:
    """Figures of an assignment: sizes, change since the previous one, agreement with labels; means over the heads."""
    before = [None] * len(found.labels) if previous is None else previous.labels
    heads = [
        _describe_head(labels, size, old, truth)
        for labels, size, old in zip(found.labels, found.num_clusters, before, strict=True)
    ]
    return {name: float(np.mean([figures[name] for figures in heads])) for name in heads[0]}


def _describe_head(
    labels: NDArray[np.int32], num_clusters: int, previous: NDArray[np.int32] | None, truth: NDArray[np.int32] | None
) -> dict[str, float]:
    included = labels >= 0
    figures = balance.balance(np.bincount(labels[included], minlength=num_clusters))
    if previous is not None:
        both = included & (previous >= 0)
        figures["nmi_previous"] = mutual_information(labels[both], previous[both])
        figures["changed_share"] = balance.changed_share(labels, previous)
    if truth is not None:
        known = included & (truth >= 0)
        figures["nmi_labels"] = mutual_information(labels[known], truth[known])
    return figures
