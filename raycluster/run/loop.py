"""Images become features, features become assignments, assignments become labels, and labels train the network; then
again."""

from __future__ import annotations

import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
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
from raycluster.io.run_paths import RunPaths
from raycluster.models.export import export
from raycluster.run.checkpoint_policy import CheckpointPolicy, checkpoint, sync_skipped
from raycluster.run.directory import read_report, write_assignments, write_lines, write_report, write_skipped
from raycluster.run.reassignment import reassign
from raycluster.run.state import Config, Run, State, fresh_network, open_run, restore
from raycluster.runtime.workers import Workers
from raycluster.seeding import generator, seed_for
from raycluster.training.determinism import reproducible
from raycluster.training.step import Microbatch, Step
from raycluster.types import Assignments, Chunk

# Images lie in shared memory, which torch may read; nothing here writes to them.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")

CHUNK_BYTES = 64 * 2**20  # of pixels that a lane waits for at a time; only memory depends on it


def pretrain(config: Config, workers: Workers) -> Iterator[Event]:
    """Train a network on the clusters of its own features; every worker iterates over the same call.

    Continues the run that lives in config.run.dir, if there is one. Yields how far it is, a Round at the end of each
    round, and Finished. Raises UserError for users' mistakes, and Stopped, with everything saved, when asked to stop.
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
        num_samples, epochs = run.dataset.manifest.num_samples, run.config.training.epochs
        yield Started(num_samples, run.rounds, state.round, state.step, epochs, processes)
    checkpoint_policy = CheckpointPolicy(run, state)
    while state.round < len(run.rounds):
        if state.assigned != state.round:
            yield from reassign(run, state)
            checkpoint(run, state)
            yield Saved(state.round, state.step)
        yield from train(run, state, checkpoint_policy)
        yield finish_round(run, state, evaluate_round(run, state))
    yield from finish(run, state)


def _open_online_features(run: Run, state: State) -> OnlineFeatureBank | None:
    """What was gathered so far, if the method wants that."""
    wanted = run.config.method.feature_request()
    if wanted is None or not wanted.online:
        return None
    training = run.config.training
    online_features = OnlineFeatureBank(
        RunPaths(run.config.run.dir).online_features, copies=training.rows_per_microbatch // training.microbatch
    )
    online_features.read(run.workers, run.position(state.round, state.step))
    return online_features


# ------------------------------------------------------------------------------------------------------------- training


def train(run: Run, state: State, checkpoint_policy: CheckpointPolicy) -> Iterator[Event]:
    """The rest of the round, from state.step on."""
    config, workers = run.config, run.workers
    first, last = run.rounds[state.round]
    exact = config.training.mode == "exact"
    network = state.network if exact else workers.wrap_ddp(state.network)
    step = Step(network, state.optimisers, config.training, all_reduce=workers.all_reduce)
    started_at = time.monotonic()
    hook = state.network.heads.register_forward_pre_hook(state.online_features) if state.online_features else None
    for microbatches in _microbatches(run, state):
        result = step(microbatches, epoch=(first + state.step) / run.steps_per_epoch)
        state.step += 1
        now = time.monotonic()
        state.running_sums["loss"] += result.loss
        state.running_sums["steps"] += 1
        state.running_sums["seconds_training"] += now - started_at
        started_at = now
        yield Progress(
            "training", state.step, last - first, f"loss {state.running_sums['loss'] / state.running_sums['steps']:.3f}"
        )
        yield from checkpoint_policy.after_step()
    if hook:
        hook.remove()


def _microbatches(run: Run, state: State) -> Iterator[list[Microbatch]]:
    """This worker's microbatches of every step that the round still has, one list a step."""
    config, found = run.config, state.assignments
    assert found is not None
    weights = config.method.sample_weights(found.labels)
    streams = run.workers.shard(range(config.training.num_microbatches))
    microbatch = config.training.microbatch
    load = run.dataset.loader(config.views.train, microbatch)
    for epoch, validate_and_initialize, stop in _epochs(run, state):
        mine = [chunk for chunk in _plan(run, found, epoch) if chunk.stream in streams]
        rest = from_step(mine, validate_and_initialize, microbatch)
        rows_at_once = rows_within(CHUNK_BYTES, config.views.train.size, microbatch)
        blocks = run.workers.stream(split_chunks(rest, rows_at_once, microbatch), load)
        for step, rows in zip(range(validate_and_initialize, stop), steps(blocks, streams, microbatch), strict=False):
            seeds = [seed_for(config.seed, "microbatch", epoch, step, stream) for stream in streams]
            if state.online_features is not None:
                first_visit = (epoch * run.steps_per_epoch + step) * config.training.num_microbatches
                for stream in streams:
                    state.online_features.register_batch(
                        rows[stream][0], (first_visit + stream) * config.training.microbatch
                    )
            yield [_microbatch(state, rows[stream], weights, seed) for stream, seed in zip(streams, seeds, strict=True)]


def _microbatch(state: State, rows: StepRows, weights: NDArray[np.float32], seed: int) -> Microbatch:
    assert state.assignments is not None
    samples, images, errors = rows
    labels = state.assignments.labels[:, samples].astype(np.int64)
    broken = errors != ""
    if broken.any():  # it was whole when its features were extracted
        labels[:, broken] = -1
        news = map(SkippedImage, samples[broken].tolist(), errors[broken].tolist())
        state.skipped = sorted({*state.skipped, *news})
    return Microbatch(torch.from_numpy(images), torch.from_numpy(labels), torch.from_numpy(weights[samples]), seed)


def _epochs(run: Run, state: State) -> Iterator[tuple[int, int, int]]:
    """(epoch, first step in it, step after the last in it) for what is left of the round."""
    first, last = run.rounds[state.round]
    size, position = run.steps_per_epoch, first + state.step
    while position < last:
        epoch, validate_and_initialize = divmod(position, size)
        stop = min(last - epoch * size, size)
        yield epoch, validate_and_initialize, stop
        position = epoch * size + stop


def _plan(run: Run, found: Assignments, epoch: int) -> list[Chunk]:
    config = run.config
    num_rows = run.steps_per_epoch * config.training.global_batch
    return plan_epoch(
        config.method.visit_counts(found.labels, num_rows, generator(config.seed, "sampling", epoch)),
        run.dataset.manifest.shards,
        streams=config.training.num_microbatches,
        microbatch=config.training.microbatch,
        seed=config.seed,
        epoch=epoch,
        window_shards=config.data.shuffle_window_shards,
    )


# --------------------------------------------------------------------------------------------------------------- rounds


def evaluate_round(run: Run, state: State) -> dict[str, float]:
    """How good the network is after the round, where `evaluation.every_rounds` wants to know; training ignores it."""
    every, done, started_at = run.config.evaluation.every_rounds, state.round + 1, time.monotonic()
    if not every or (done % every and done < len(run.rounds)):
        return {}
    assert state.assignments is not None
    evaluation = Evaluation(run.config.evaluation, run.config.views.eval, run.config.run.dir, run.workers)
    clusters = state.assignments.labels[0]
    figures = evaluation.after_round(state.network.backbone, run.dataset, clusters, f"after round {done}")
    return {**figures, "seconds_evaluating": time.monotonic() - started_at}


def finish_round(run: Run, state: State, judgement: dict[str, float]) -> Round:
    """Write down what the round did, and make the next one the one to begin."""
    found = state.assignments
    assert found is not None
    sync_skipped(run, state)
    running_sums = state.running_sums
    loss = running_sums["loss"] / max(1, running_sums["steps"])
    images = running_sums["steps"] * run.config.training.global_batch
    record = {
        "round": state.round,
        "epoch": run.rounds[state.round][1] / run.steps_per_epoch,
        "step": run.rounds[state.round][1],
        "steps": int(running_sums["steps"]),
        "loss": loss,
        "loss_over_chance": balance.loss_over_chance(
            loss, *found.num_clusters, further=run.config.training.auxiliary_heads
        ),
        "images_per_second": images / max(running_sums["seconds_training"], 1e-9),
        **{key: running_sums[key] for key in ("seconds_extracting", "seconds_assigning", "seconds_training")},
        **found.figures,
        **judgement,
        "num_skipped": len(state.skipped),
        "assignments": sha256(found.labels.tobytes()).hexdigest()[:16],
    }
    state.records.append(record)
    state.round, state.step, state.running_sums = state.round + 1, 0, defaultdict(float)
    checkpoint(run, state)
    run.workers.run_on_rank_zero(_write_round, run, state)
    return Round(record)


def _write_round(run: Run, state: State) -> None:
    assert state.assignments is not None
    write_lines(RunPaths(run.config.run.dir).metrics, state.records)
    write_skipped(run.config.run.dir, run.dataset.manifest, state.skipped)
    write_assignments(run.config.run.dir, run.dataset.manifest, state.assignments.labels)


def finish(run: Run, state: State) -> Iterator[Event]:
    """Export the backbone and, where there are true labels, compare it with itself before training."""
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
    if run.dataset.manifest.labels is not None:
        yield Progress("evaluating", 0, 1)
        untrained = fresh_network(run.config, run.workers.device).backbone
        networks = {"untrained": untrained, "pre-trained": state.network.backbone}
        evaluation = Evaluation(run.config.evaluation, run.config.views.eval, run.config.run.dir, run.workers)
        report["accuracies"] = evaluation.compare(networks, run.dataset)
    run.workers.run_on_rank_zero(write_report, run.config.run.dir, report)
    yield Finished(report)


def write_export(run: Run, state: State) -> None:
    """backbone.safetensors and backbone.json: what `raycluster.load_backbone` reads."""
    weights, description = export(state.network.backbone, asdict(run.config))
    storage.write_bytes(RunPaths(run.config.run.dir).backbone_weights, weights)
    storage.write_bytes(RunPaths(run.config.run.dir).backbone_description, description)
