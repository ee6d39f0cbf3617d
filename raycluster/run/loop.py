"""Images become features, features become assignments, assignments become labels, and labels train the network; then
again."""

from __future__ import annotations

import time
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from hashlib import sha256

import numpy as np
import torch
from numpy.typing import NDArray

from raycluster.data.epoch_plan import StepRows, from_step, plan_epoch, split_chunks, steps
from raycluster.data.loader import rows_within
from raycluster.evaluation.metrics import balance
from raycluster.evaluation.runner import Evaluation
from raycluster.events import Event, Finished, Progress, Round, Saved, Started, this_process
from raycluster.features.extraction import SkippedImage
from raycluster.features.online import OnlineFeatureBank
from raycluster.io import storage
from raycluster.io.assignments import write_assignments
from raycluster.io.run_paths import RunPaths
from raycluster.models.export import export
from raycluster.run.checkpoint_policy import CheckpointPolicy, checkpoint, sync_skipped
from raycluster.run.config import Config
from raycluster.run.directory import read_report, write_lines, write_report, write_skipped
from raycluster.run.network import build_heads, build_objective, fresh_network
from raycluster.run.reassignment import Reassignment, reassign
from raycluster.run.state import Run, State, open_run, restore
from raycluster.runtime.workers import Workers
from raycluster.seeding import generator, seed_for
from raycluster.training.determinism import reproducible
from raycluster.training.step import Microbatch, Step
from raycluster.types import Assignments, Chunk, ImageBlock

# Images lie in shared memory, which torch may read; nothing here writes to them.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")

CHUNK_BYTES = 64 * 2**20  # of pixels that a stream waits for at a time; only memory depends on it


def pretrain(config: Config, workers: Workers) -> Iterator[Event]:
    """Train a network on the clusters of its own features; every worker iterates over the same call.

    Continues the run that lives in config.run.dir, if there is one. Yields how far it is, a Round at the end of each
    round, and Finished. Raises UserError for users' errors, and RunStopped, with everything saved, when asked to stop.
    """
    with reproducible(config.training.threads, exact=config.training.mode == "exact"):
        run = open_run(config, workers)
        try:
            yield from _run_rounds(run, restore(run))
        finally:
            run.checkpointer.close()


def _run_rounds(run: Run, state: State) -> Iterator[Event]:
    state.online_features = _open_online_features(run, state)
    if state.round < len(run.rounds):
        processes = tuple(run.workers.all_gather([this_process()]))
        num_samples, epochs = run.dataset.num_samples, run.config.training.epochs
        yield Started(num_samples, run.rounds, state.round, state.step, epochs, processes)
    checkpoint_policy = CheckpointPolicy(run, state)
    while state.round < len(run.rounds):
        if state.assigned != state.round:
            adopt(run, state, (yield from reassign(run, state)))
            checkpoint(run, state)
            yield Saved(state.round, state.step)
        yield from train(run, state, checkpoint_policy)
        yield finish_round(run, state, evaluate_round(run, state))
    yield from finish(run, state)


def adopt(run: Run, state: State, found: Reassignment) -> None:
    """Train on new labels: with the heads and the objective that the method makes of them."""
    config = run.config
    state.assignments, state.assigned, state.skipped = found.assignments, state.round, found.skipped
    for phase, seconds in found.seconds.items():
        state.running_sums[f"seconds_{phase}"] += seconds
    heads = build_heads(config, state.network.num_features, found.assignments, state.round)
    if heads is not None:
        state.network.heads = heads.to(run.workers.device)
        state.optimisers.new_heads(state.network.heads)
    objective = build_objective(config, found.assignments)
    objective.load_state_dict(state.objective.state_dict())
    state.objective = objective


def _open_online_features(run: Run, state: State) -> OnlineFeatureBank | None:
    """The features gathered so far, if the method requests online ones."""
    request = run.config.method.feature_request(state.round)
    if request is None or not request.online:
        return None
    objective, folder = state.objective, RunPaths(run.config.run.dir).online_features
    bank = OnlineFeatureBank(folder, request, num_views=len(objective.views), copies=objective.copies)
    bank.read(run.workers, run.position(state.round, state.step))
    return bank


# ------------------------------------------------------------------------------------------------------------- training


def train(run: Run, state: State, checkpoint_policy: CheckpointPolicy) -> Iterator[Event]:
    """The rest of the round, from state.step on."""
    config, workers, sums = run.config, run.workers, state.running_sums
    first, last = run.rounds[state.round]
    exact = config.training.mode == "exact"
    network = state.network if exact else workers.wrap_ddp(state.network)
    objective = state.objective
    step = Step(network, state.optimisers, config.training, all_reduce=workers.all_reduce, objective=objective)
    started_at = time.monotonic()
    bank = state.online_features
    hook = state.network.heads.register_forward_pre_hook(bank) if bank else None
    for microbatches in _microbatches(run, state):
        result = step(microbatches, epoch=(first + state.step) / run.steps_per_epoch)
        state.step += 1
        now = time.monotonic()
        sums["steps"] += 1
        sums["seconds_training"] += now - started_at
        for name, value in {"loss": result.loss, **result.metrics}.items():
            sums[name] += value
        started_at = now
        yield Progress("training", state.step, last - first, f"loss {sums['loss'] / sums['steps']:.3f}")
        yield from checkpoint_policy.after_step()
    if hook:
        hook.remove()


def _microbatches(run: Run, state: State) -> Iterator[list[Microbatch]]:
    """This worker's microbatches of every step that the round still has, one list a step."""
    config, found = run.config, state.assignments
    assert found is not None
    weights = config.method.sample_weights(found)
    streams = run.workers.shard(range(config.training.num_microbatches))
    microbatch = config.training.microbatch
    for epoch, begin, stop in _epochs(run, state):
        blocks = _stream(run, state, epoch, begin, streams)
        for step, rows in zip(range(begin, stop), steps(blocks, streams, microbatch), strict=False):
            seeds = [seed_for(config.seed, "microbatch", epoch, step, stream) for stream in streams]
            if state.online_features is not None:
                first_visit = (epoch * run.steps_per_epoch + step) * config.training.num_microbatches
                for stream in streams:
                    position = (first_visit + stream) * microbatch
                    state.online_features.register_batch(rows[stream].samples, position)
            yield [_microbatch(state, rows[stream], weights, seed) for stream, seed in zip(streams, seeds, strict=True)]


def _stream(run: Run, state: State, epoch: int, step: int, streams: Sequence[int]) -> Iterator[ImageBlock]:
    """The decoded rows of this worker's streams in an epoch, from `step` on."""
    config, microbatch = run.config, run.config.training.microbatch
    assert state.assignments is not None
    mine = _plan(run, state.assignments, epoch, streams)
    views = [config.views.section(name) for name in state.objective.views]
    largest = max(views, key=lambda view: view.blank(1).nbytes)
    rows_at_once = rows_within(CHUNK_BYTES // len(views), largest, microbatch)
    chunks = split_chunks(from_step(mine, step, microbatch), rows_at_once, microbatch)
    dataset = run.located(state.assignments)
    return run.workers.stream(dataset.locate(chunks), dataset.loader(*views, microbatch=microbatch))


def _microbatch(state: State, rows: StepRows, weights: NDArray[np.float32], seed: int) -> Microbatch:
    assert state.assignments is not None
    samples, broken = rows.samples, rows.errors != ""
    label_sets = state.assignments.label_sets
    labels = np.array([one.labels[samples] for one in label_sets], np.int64).reshape(len(label_sets), len(samples))
    row_weights = weights[samples]
    if broken.any():  # it could be read when its features were extracted
        labels[:, broken], row_weights[broken] = -1, 0
        news = map(SkippedImage, samples[broken].tolist(), rows.errors[broken].tolist())
        state.skipped = sorted({*state.skipped, *news})
    extra_views = tuple(map(torch.from_numpy, rows.extra_views))
    images, weight = torch.from_numpy(rows.images), torch.from_numpy(row_weights)
    return Microbatch(images, torch.from_numpy(labels), weight, seed, extra_views)


def _epochs(run: Run, state: State) -> Iterator[tuple[int, int, int]]:
    """(epoch, first step in it, step after the last in it) for what is left of the round."""
    first, last = run.rounds[state.round]
    size, position = run.steps_per_epoch, first + state.step
    while position < last:
        epoch, begin = divmod(position, size)
        stop = min(last - epoch * size, size)
        yield epoch, begin, stop
        position = epoch * size + stop


def _plan(run: Run, found: Assignments, epoch: int, streams: Sequence[int]) -> list[Chunk]:
    """The chunks of these streams in an epoch."""
    config = run.config
    num_rows = run.steps_per_epoch * config.training.global_batch
    return plan_epoch(
        config.method.visit_counts(found, num_rows, generator(config.seed, "sampling", epoch)),
        run.dataset.shards,
        streams=config.training.num_microbatches,
        microbatch=config.training.microbatch,
        seed=config.seed,
        epoch=epoch,
        window_shards=run.dataset.window_shards,
        only=streams,
    )


# --------------------------------------------------------------------------------------------------------------- rounds


def evaluate_round(run: Run, state: State) -> dict[str, float]:
    """How good the network is after the round, where `evaluation.every_rounds` asks for it; training ignores it."""
    every, done, started_at = run.config.evaluation.every_rounds, state.round + 1, time.monotonic()
    if not every or (done % every and done < len(run.rounds)):
        return {}
    assert state.assignments is not None
    evaluation = Evaluation(run.config.evaluation, run.config.views.eval, run.config.run.dir, run.workers)
    clusters = _image_clusters(run, state.assignments)
    metrics = evaluation.after_round(state.network.backbone, run.images, clusters, f"after round {done}")
    return {**metrics, "seconds_evaluating": time.monotonic() - started_at}


def _image_clusters(run: Run, found: Assignments) -> NDArray[np.int32] | None:
    """(images,) the first label set, where it labels images; None where there is none."""
    return found.label_sets[0].labels if found.label_sets and run.dataset.crops is None else None


def finish_round(run: Run, state: State, evaluation: dict[str, float]) -> Round:
    """Write down what the round did, and advance to the next one."""
    found, sums = state.assignments, state.running_sums
    assert found is not None
    state.skipped = sync_skipped(run, state)
    num_steps = max(1, sums["steps"])
    loss = sums["loss"] / num_steps
    images = sums["steps"] * run.config.training.global_batch
    chance = balance.loss_over_chance(loss, state.objective.chance(found.num_classes))
    record = {
        "round": state.round,
        "epoch": run.rounds[state.round][1] / run.steps_per_epoch,
        "step": run.rounds[state.round][1],
        "steps": int(sums["steps"]),
        "loss": loss,
        "loss_over_chance": chance,
        **{name: sums[name] / num_steps for name in state.objective.metrics},
        "images_per_second": images / max(sums["seconds_training"], 1e-9),
        **{key: sums[key] for key in ("seconds_extracting", "seconds_assigning", "seconds_training")},
        **found.metrics,
        **evaluation,
        "num_skipped": len(state.skipped),
        "assignments": _digest(found),
    }
    state.records.append(record)
    state.round, state.step, state.running_sums = state.round + 1, 0, defaultdict(float)
    checkpoint(run, state)
    run.workers.run_on_rank_zero(_write_round, run, state)
    return Round(record)


def _digest(found: Assignments) -> str:
    """16 hex digits that name the labels."""
    digest = sha256()
    for one in found.label_sets:
        digest.update(one.labels.tobytes())
    return digest.hexdigest()[:16]


def _write_round(run: Run, state: State) -> None:
    assert state.assignments is not None
    paths, dataset = RunPaths(run.config.run.dir), run.located(state.assignments)
    write_lines(paths.metrics, state.records)
    write_skipped(run.config.run.dir, dataset, state.skipped)
    if state.assignments.label_sets:
        write_assignments(paths.assignments, state.assignments, dataset.manifest.paths, dataset.crops)


def finish(run: Run, state: State) -> Iterator[Event]:
    """Export the backbone and, where there are true labels, compare it with one of random weights."""
    report = run.workers.run_on_rank_zero(read_report, run.config.run.dir)
    if report is not None:
        yield Finished(report)
        return
    run.workers.run_on_rank_zero(run.checkpointer.wait)
    run.workers.run_on_rank_zero(write_export, run, state)
    report = {
        "images": run.dataset.manifest.num_samples,
        "skipped": len(state.skipped),
        "rounds": len(run.rounds),
        "last_round": state.records[-1] if state.records else {},
    }
    if run.config.model.weights:
        report["weights"] = run.config.model.weights
    if run.dataset.manifest.labels is not None:
        yield Progress("evaluating", 0, 1)
        untrained = fresh_network(run.config, run.workers.device).backbone
        networks = {"untrained": untrained, "pre-trained": state.network.backbone}
        evaluation = Evaluation(run.config.evaluation, run.config.views.eval, run.config.run.dir, run.workers)
        report["accuracies"] = evaluation.compare(networks, run.images)
    run.workers.run_on_rank_zero(write_report, run.config.run.dir, report)
    yield Finished(report)


def write_export(run: Run, state: State) -> None:
    """backbone.safetensors and backbone.json: what `raycluster.load_backbone` reads."""
    weights, description = export(state.network.backbone, asdict(run.config))
    storage.write_bytes(RunPaths(run.config.run.dir).backbone_weights, weights)
    storage.write_bytes(RunPaths(run.config.run.dir).backbone_description, description)
