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

from raycluster.data.epoch_plan import Rows, from_step, pieces, plan_epoch, steps
from raycluster.data.loader import rows_within
from raycluster.evaluation.metrics import balance
from raycluster.evaluation.runner import Evaluation
from raycluster.events import Event, Finished, Progress, Round, Saved, Started
from raycluster.features.extraction import Skipped
from raycluster.features.online import Harvest
from raycluster.io import storage
from raycluster.models.export import export
from raycluster.monitoring.status import this_process
from raycluster.run.checkpoint_policy import Lookout, checkpoint, gather_skipped
from raycluster.run.directory import read_report, write_assignments, write_lines, write_report, write_skipped
from raycluster.run.reassignment import reassign
from raycluster.run.state import Config, Run, State, fresh_network, restore, start
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
        run = start(config, workers)
        try:
            yield from _go_on(run, restore(run))
        finally:
            run.saver.close()


def _go_on(run: Run, state: State) -> Iterator[Event]:
    state.harvest = _harvest(run, state)
    if state.round < len(run.rounds):
        processes = tuple(run.workers.gather([this_process()]))
        num_samples, epochs = run.pictures.manifest.num_samples, run.config.training.epochs
        yield Started(num_samples, run.rounds, state.round, state.step, epochs, processes)
    lookout = Lookout(run, state)
    while state.round < len(run.rounds):
        if state.assigned != state.round:
            yield from reassign(run, state)
            checkpoint(run, state)
            yield Saved(state.round, state.step)
        yield from train(run, state, lookout)
        yield close_round(run, state, judge(run, state))
    yield from finish(run, state)


def _harvest(run: Run, state: State) -> Harvest | None:
    """What was gathered so far, if the method wants that."""
    wanted = run.config.method.wants()
    if wanted is None or not wanted.harvested:
        return None
    training = run.config.training
    harvest = Harvest(
        storage.join(run.config.run.dir, "harvest"), copies=training.rows_per_microbatch // training.microbatch
    )
    harvest.read(run.workers, run.position(state.round, state.step))
    return harvest


# ------------------------------------------------------------------------------------------------------------- training


def train(run: Run, state: State, lookout: Lookout) -> Iterator[Event]:
    """The rest of the round, from state.step on."""
    config, workers = run.config, run.workers
    first, last = run.rounds[state.round]
    exact = config.training.mode == "exact"
    network = state.network if exact else workers.parallel(state.network)
    step = Step(network, state.optimisers, config.training, add=workers.add)
    began = time.monotonic()
    hook = state.network.heads.register_forward_pre_hook(state.harvest) if state.harvest else None
    for microbatches in _microbatches(run, state):
        result = step(microbatches, epoch=(first + state.step) / run.steps_per_epoch)
        state.step += 1
        now = time.monotonic()
        state.tally["loss"] += result.loss
        state.tally["steps"] += 1
        state.tally["seconds_training"] += now - began
        began = now
        yield Progress("training", state.step, last - first, f"loss {state.tally['loss'] / state.tally['steps']:.3f}")
        yield from lookout.after_step()
    if hook:
        hook.remove()


def _microbatches(run: Run, state: State) -> Iterator[list[Microbatch]]:
    """This worker's microbatches of every step that the round still has, one list a step."""
    config, found = run.config, state.assignments
    assert found is not None
    weights = config.method.weights(found.labels)
    lanes = run.workers.share(range(config.training.num_microbatches))
    microbatch = config.training.microbatch
    load = run.pictures.loader(config.views.train, microbatch)
    for epoch, begin, stop in _epochs(run, state):
        mine = [chunk for chunk in _plan(run, found, epoch) if chunk.lane in lanes]
        rest = from_step(mine, begin, microbatch)
        rows_at_once = rows_within(CHUNK_BYTES, config.views.train.size, microbatch)
        blocks = run.workers.stream(pieces(rest, rows_at_once, microbatch), load)
        for step, rows in zip(range(begin, stop), steps(blocks, lanes, microbatch), strict=False):
            seeds = [seed_for(config.seed, "microbatch", epoch, step, lane) for lane in lanes]
            if state.harvest is not None:
                place = (epoch * run.steps_per_epoch + step) * config.training.num_microbatches
                for lane in lanes:
                    state.harvest.expect(rows[lane][0], (place + lane) * config.training.microbatch)
            yield [_microbatch(state, rows[lane], weights, seed) for lane, seed in zip(lanes, seeds, strict=True)]


def _microbatch(state: State, rows: Rows, weights: NDArray[np.float32], seed: int) -> Microbatch:
    assert state.assignments is not None
    samples, images, errors = rows
    labels = state.assignments.labels[:, samples].astype(np.int64)
    broken = errors != ""
    if broken.any():  # it was whole when its features were extracted
        labels[:, broken] = -1
        news = map(Skipped, samples[broken].tolist(), errors[broken].tolist())
        state.skipped = sorted({*state.skipped, *news})
    return Microbatch(torch.from_numpy(images), torch.from_numpy(labels), torch.from_numpy(weights[samples]), seed)


def _epochs(run: Run, state: State) -> Iterator[tuple[int, int, int]]:
    """(epoch, first step in it, step after the last in it) for what is left of the round."""
    first, last = run.rounds[state.round]
    size, position = run.steps_per_epoch, first + state.step
    while position < last:
        epoch, begin = divmod(position, size)
        stop = min(last - epoch * size, size)
        yield epoch, begin, stop
        position = epoch * size + stop


def _plan(run: Run, found: Assignments, epoch: int) -> list[Chunk]:
    config = run.config
    num_rows = run.steps_per_epoch * config.training.global_batch
    return plan_epoch(
        config.method.counts(found.labels, num_rows, generator(config.seed, "sampling", epoch)),
        run.pictures.manifest.shards,
        lanes=config.training.num_microbatches,
        microbatch=config.training.microbatch,
        seed=config.seed,
        epoch=epoch,
        window_shards=config.data.shuffle_window_shards,
    )


# --------------------------------------------------------------------------------------------------------------- rounds


def judge(run: Run, state: State) -> dict[str, float]:
    """How good the network is after the round, where `evaluation.every_rounds` wants to know; training ignores it."""
    every, done, began = run.config.evaluation.every_rounds, state.round + 1, time.monotonic()
    if not every or (done % every and done < len(run.rounds)):
        return {}
    assert state.assignments is not None
    tested = Evaluation(run.config.evaluation, run.config.views.cluster, run.config.run.dir, run.workers)
    clusters = state.assignments.labels[0]
    figures = tested.after_round(state.network.backbone, run.pictures, clusters, f"after round {done}")
    return {**figures, "seconds_evaluating": time.monotonic() - began}


def close_round(run: Run, state: State, judgement: dict[str, float]) -> Round:
    """Write down what the round did, and make the next one the one to begin."""
    found = state.assignments
    assert found is not None
    gather_skipped(run, state)
    tally = state.tally
    loss = tally["loss"] / max(1, tally["steps"])
    images = tally["steps"] * run.config.training.global_batch
    record = {
        "round": state.round,
        "epoch": run.rounds[state.round][1] / run.steps_per_epoch,
        "step": run.rounds[state.round][1],
        "steps": int(tally["steps"]),
        "loss": loss,
        "loss_over_chance": balance.loss_over_chance(
            loss, *found.num_clusters, further=run.config.training.further_heads
        ),
        "images_per_second": images / max(tally["seconds_training"], 1e-9),
        **{key: tally[key] for key in ("seconds_extracting", "seconds_assigning", "seconds_training")},
        **found.figures,
        **judgement,
        "num_skipped": len(state.skipped),
        "assignments": sha256(found.labels.tobytes()).hexdigest()[:16],
    }
    state.records.append(record)
    state.round, state.step, state.tally = state.round + 1, 0, defaultdict(float)
    checkpoint(run, state)
    run.workers.once(_write_round, run, state)
    return Round(record)


def _write_round(run: Run, state: State) -> None:
    assert state.assignments is not None
    write_lines(run.config.run.dir, "metrics.jsonl", state.records)
    write_skipped(run.config.run.dir, run.pictures.manifest, state.skipped)
    write_assignments(run.config.run.dir, run.pictures.manifest, state.assignments.labels)


def finish(run: Run, state: State) -> Iterator[Event]:
    """Export the backbone and, where there are true labels, compare it with itself before training."""
    report = run.workers.once(read_report, run.config.run.dir)
    if report is not None:
        yield Finished(report)
        return
    run.workers.once(run.saver.wait)
    run.workers.once(write_export, run, state)
    report = {
        "images": run.pictures.manifest.num_samples,
        "skipped": len(state.skipped),
        "rounds": len(run.rounds),
        "last_round": state.records[-1] if state.records else {},
    }
    if run.pictures.manifest.labels is not None:
        yield Progress("evaluating", 0, 1)
        untrained = fresh_network(run.config, run.workers.device).backbone
        networks = {"untrained": untrained, "pre-trained": state.network.backbone}
        tested = Evaluation(run.config.evaluation, run.config.views.cluster, run.config.run.dir, run.workers)
        report["accuracies"] = tested.compare(networks, run.pictures)
    run.workers.once(write_report, run.config.run.dir, report)
    yield Finished(report)


def write_export(run: Run, state: State) -> None:
    """backbone.safetensors and backbone.json: what `raycluster.load_backbone` reads."""
    weights, description = export(state.network.backbone, asdict(run.config))
    storage.write_bytes(storage.join(run.config.run.dir, "backbone.safetensors"), weights)
    storage.write_bytes(storage.join(run.config.run.dir, "backbone.json"), description)
