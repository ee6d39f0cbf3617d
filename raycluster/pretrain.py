"""Images become features, features become assignments, assignments become labels, and labels train the network; then
again."""

from __future__ import annotations

import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import normalized_mutual_info_score

from raycluster import metrics, storage
from raycluster.data.plan import Rows, from_step, pieces, plan_epoch, steps
from raycluster.evaluate import Evaluation
from raycluster.extraction import Descriptor, Progress, Skipped, extract
from raycluster.models.export import export
from raycluster.models.heads import Heads
from raycluster.run import Config, Run, State, fresh_network, restore, save, start
from raycluster.rundir import read_report, write_assignments, write_lines, write_report, write_skipped
from raycluster.seeding import generator, seed_for
from raycluster.training.process import reproducible
from raycluster.training.step import Microbatch, Step
from raycluster.types import Assignments, Chunk, Stopped, UserError
from raycluster.workers import LostBlocks, Workers

# Images lie in shared memory, which torch may read; nothing here writes to them.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")

CHUNK_BYTES = 64 * 2**20  # of pixels that a lane waits for at a time; only memory depends on it
LOOK_EVERY_STEPS = 8  # how often workers agree on whether to save or stop


@dataclass(frozen=True)
class Started:
    """The run begins or goes on: `step` steps of its round are done.

    rounds: (first step, step after the last) of every round. num_workers: how many share the work now.
    """

    num_samples: int
    rounds: list[tuple[int, int]]
    round: int
    step: int
    num_workers: int


@dataclass(frozen=True)
class Round:
    """A round is over: its line of metrics.jsonl."""

    record: dict[str, Any]


@dataclass(frozen=True)
class Finished:
    """The run is over: what it learned."""

    report: dict[str, Any]


Event = Started | Progress | Round | Finished


def pretrain(config: Config, workers: Workers) -> Iterator[Event]:
    """Train a network on the clusters of its own features; every worker iterates over the same call.

    Continues the run that lives in config.run.dir, if there is one. Yields how far it is, a Round at the end of each
    round, and Finished. Raises UserError for users' mistakes, and Stopped, with everything saved, when asked to stop.
    """
    with reproducible(config.training.threads, exact=config.training.mode == "exact"):
        run = start(config, workers)
        state = restore(run)
        if state.round < len(run.rounds):
            num_workers = len(workers.gather([None]))
            yield Started(run.pictures.manifest.num_samples, run.rounds, state.round, state.step, num_workers)
        while state.round < len(run.rounds):
            if state.assigned != state.round:
                yield from reassign(run, state)
            yield from train(run, state)
            yield close_round(run, state, judge(run, state))
        yield from finish(run, state)


# ---------------------------------------------------------------------------------------------------------- reassigning


def reassign(run: Run, state: State) -> Iterator[Event]:
    """Features of every image with the weights of now, and new labels from them."""
    config, workers, began = run.config, run.workers, time.monotonic()
    version = workers.once(_version, state)
    descriptor = Descriptor(config.method.layer, config.method.descriptor)
    shards = range(len(run.pictures.manifest.shards))
    while True:
        for event in extract(
            state.network.backbone,
            run.pictures,
            workers,
            view=config.views.cluster,
            descriptor=descriptor,
            version=version,
            shards=shards,
        ):
            if isinstance(event, Skipped):
                state.skipped = sorted({*state.skipped, event})
            else:
                yield event
        _check_budget(run, state.skipped)
        extracted = time.monotonic()
        yield Progress("clustering", 0, 1, f"into {' + '.join(map(str, config.method.heads()))}")
        try:
            found = workers.once(_assign, run, state, version)
            break
        except LostBlocks:
            continue
    state.tally["seconds_extracting"] += extracted - began
    state.tally["seconds_assigning"] += time.monotonic() - extracted
    state.assignments, state.assigned = found, state.round
    if config.method.resets_heads:
        heads = Heads(
            state.network.backbone.num_features, found.num_clusters, seed_for(config.seed, "head", state.round)
        )
        state.network.heads = heads.to(workers.device)
        state.optimisers.new_heads(state.network.heads)


def _version(state: State) -> str:
    """Names the weights that features come from, so that features of other weights are never mixed in."""
    digest = sha256(str(state.round).encode())
    for tensor in state.network.backbone.state_dict().values():
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _check_budget(run: Run, skipped: list[Skipped]) -> None:
    data, total = run.config.data, run.pictures.manifest.num_samples
    run.workers.once(write_skipped, run.config.run.dir, run.pictures.manifest, skipped)
    if len(skipped) > data.max_broken_fraction * total:
        first = [f"{run.pictures.manifest.paths[item.sample]}: {item.reason}" for item in skipped[:3]]
        raise UserError(
            f"{len(skipped)} of {total} images could not be read, more than data.max_broken_fraction = "
            f"{data.max_broken_fraction} allows; the first: {'; '.join(first)}. All of them are named in "
            f"{storage.join(run.config.run.dir, 'skipped.jsonl')}; mend or remove them, or allow more"
        )


def _assign(run: Run, state: State, version: str) -> Assignments:
    """New labels, with what a user wants to know about them."""
    num_samples = run.pictures.manifest.num_samples
    seed = seed_for(run.config.seed, "assign", state.round)
    found: Assignments = run.config.method.assign(run.workers.features(version), num_samples, seed, state.assignments)
    figures = {**found.figures, **describe(found, state.assignments, run.pictures.manifest.labels)}
    return Assignments(found.labels, found.num_clusters, figures, found.state)


def describe(found: Assignments, previous: Assignments | None, truth: NDArray[np.int32] | None) -> dict[str, float]:
    """Figures of an assignment (of its first head): sizes, change since the previous one, agreement with labels."""
    labels = found.labels[0]
    included = labels >= 0
    figures = metrics.balance(np.bincount(labels[included], minlength=found.num_clusters[0]))
    if previous is not None:
        both = included & (previous.labels[0] >= 0)
        figures["nmi_previous"] = float(normalized_mutual_info_score(labels[both], previous.labels[0][both]))
        figures["changed_share"] = metrics.changed_share(labels, previous.labels[0])
    if truth is not None:
        known = included & (truth >= 0)
        figures["nmi_labels"] = float(normalized_mutual_info_score(labels[known], truth[known]))
    return figures


# ------------------------------------------------------------------------------------------------------------- training


def train(run: Run, state: State) -> Iterator[Event]:
    """The rest of the round, from state.step on."""
    config, workers = run.config, run.workers
    first, last = run.rounds[state.round]
    exact = config.training.mode == "exact"
    network = state.network if exact else workers.parallel(state.network)
    step = Step(network, state.optimisers, config.training, add=workers.add)
    saved = began = time.monotonic()
    for microbatches in _microbatches(run, state):
        result = step(microbatches, epoch=(first + state.step) / run.steps_per_epoch)
        state.step += 1
        now = time.monotonic()
        state.tally["loss"] += result.loss
        state.tally["steps"] += 1
        state.tally["seconds_training"] += now - began
        began = now
        yield Progress("training", state.step, last - first, f"loss {state.tally['loss'] / state.tally['steps']:.3f}")
        if state.step % LOOK_EVERY_STEPS == 0:
            wish = workers.once(_wish, run, saved)
            if wish:
                workers.once(save, run, state)
                saved = time.monotonic()
            if wish == "stop":
                raise Stopped(f"stopped in round {state.round + 1}; the same command goes on from there")


def _wish(run: Run, saved: float) -> str:
    if run.workers.stopping():
        return "stop"
    return "save" if time.monotonic() - saved > 60 * run.config.run.checkpoint_minutes else ""


def _microbatches(run: Run, state: State) -> Iterator[list[Microbatch]]:
    """This worker's microbatches of every step that the round still has, one list a step."""
    config, found = run.config, state.assignments
    assert found is not None
    weights = config.method.weights(found.labels)
    lanes = run.workers.share(range(config.training.num_microbatches))
    load = run.pictures.loader(config.views.train)
    for epoch, begin, stop in _epochs(run, state):
        mine = [chunk for chunk in _plan(run, found, epoch) if chunk.lane in lanes]
        rest = from_step(mine, begin, config.training.microbatch)
        rows_at_once = max(1, CHUNK_BYTES // (3 * config.views.train.size**2))
        blocks = run.workers.stream(pieces(rest, rows_at_once, config.training.microbatch), load)
        for step, rows in zip(range(begin, stop), steps(blocks, lanes, config.training.microbatch), strict=False):
            seeds = [seed_for(config.seed, "microbatch", epoch, step, lane) for lane in lanes]
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
    state.skipped = sorted(set(run.workers.gather(state.skipped)))  # each worker met those of its own lanes
    tally = state.tally
    loss = tally["loss"] / max(1, tally["steps"])
    images = tally["steps"] * run.config.training.global_batch
    record = {
        "round": state.round,
        "epoch": run.rounds[state.round][1] / run.steps_per_epoch,
        "step": run.rounds[state.round][1],
        "loss": loss,
        "loss_over_chance": metrics.loss_over_chance(loss, found.num_clusters[0]),
        "images_per_second": images / max(tally["seconds_training"], 1e-9),
        **{key: tally[key] for key in ("seconds_extracting", "seconds_assigning", "seconds_training")},
        **found.figures,
        **judgement,
        "num_skipped": len(state.skipped),
        "assignments": sha256(found.labels.tobytes()).hexdigest()[:16],
    }
    state.records.append(record)
    state.round, state.step, state.tally = state.round + 1, 0, defaultdict(float)
    run.workers.once(_write_round, run, state)
    return Round(record)


def _write_round(run: Run, state: State) -> None:
    assert state.assignments is not None
    save(run, state)  # first: should the rest fail, nothing of the round is lost
    write_lines(run.config.run.dir, "metrics.jsonl", state.records)
    write_skipped(run.config.run.dir, run.pictures.manifest, state.skipped)
    write_assignments(run.config.run.dir, run.pictures.manifest, state.assignments.labels)


def finish(run: Run, state: State) -> Iterator[Event]:
    """Export the backbone and, where there are true labels, compare it with itself before training."""
    report = run.workers.once(read_report, run.config.run.dir)
    if report is not None:
        yield Finished(report)
        return
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
