"""Break a run in every way, and compare what it ends with to a run that was never disturbed."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from chaos.cluster import TestCluster
from chaos.faults import FAULTS, FaultContext
from raycluster.config import parse
from raycluster.monitoring.status import Loss, Status
from raycluster.run.checkpoint import load_newest
from raycluster.run.local_workers import LocalWorkers
from raycluster.run.loop import pretrain
from raycluster.run.state import Config
from raycluster.types import UserError

RUN = """
data: {uri: digits, shard_size: 150}
views: {train: {size: 32, crop_scale: [0.5, 1.0]}, eval: {size: 64}}
model: {name: smallnet, widths: [8, 16, 32]}
method: {name: deepcluster, num_clusters: 60, layer: conv3, descriptor: pooled, pca_dim: 16, iterations: 60}
training: {epochs: 7, global_batch: 64, microbatch: 16, mode: exact, threads: 1, head_lr: 0.5}
evaluation: {max_samples: 600}
run: {dir: unset, workers: {min: 1, max: 2}, resize_seconds: 3, checkpoint_minutes: 0.03}
"""
MOST_APART = 1e-4
_WORKING = ("extracting", "clustering", "training")
_SETTLE_SECONDS = 240.0


@dataclass(frozen=True)
class Scenario:
    """A run, and what happens to it in turn. first_round: in which it may begin; `starts`: a fault starts the job."""

    faults: tuple[str, ...]
    options: tuple[str, ...] = ()
    first_round: int = 1
    starts: bool = False
    most_apart: float = 0.0


_FAST = ("training.mode=fast", "training.epochs=1")
_SELDOM = ("run.checkpoint_minutes=60",)  # so that only what is saved in time is saved
_TWICE = ("training.epochs=14",)  # as long, so that all happens before the run ends
_LONG = (*_SELDOM, *_TWICE)
_BEGINNING_ONE = ("disk full for 30 s", "bucket out of reach for 30 s", "pictures broken in the middle of a shard")
PLAYS = (
    Scenario(
        (
            "training worker killed while training",
            "training worker killed while extracting",
            "training worker killed while clustering",
            "training worker killed in a checkpoint write",
        )
    ),
    Scenario(("node removed while training", "node added", "node drained while training"), _LONG),
    Scenario(
        (
            "job killed while training",
            "job killed while extracting",
            "job killed while clustering",
            "newest checkpoint truncated",
        )
    ),
    Scenario(
        (
            "pool actor killed while extracting",
            "pool actor killed while clustering",
            "pool actor killed while training",
            "all training workers killed",
            "training worker killed, and one more on recovery",
        ),
        _TWICE,
    ),
    Scenario(("node removed while extracting", "node added", "node removed while clustering"), _SELDOM),
    Scenario(
        (
            "second job on the same directory",
            "job stopped by SIGTERM, 2 -> 1 workers",
            "job interrupted while clustering, 1 -> 0 workers",
            "job interrupted while extracting, 0 -> 2 workers",
        )
    ),
    *(Scenario((fault,), starts=True) for fault in _BEGINNING_ONE),
    Scenario(("node drained while extracting",), _LONG),
    Scenario(("training worker killed while training",), _FAST, first_round=0, most_apart=MOST_APART),
    Scenario(("training worker killed while extracting",), _FAST, first_round=0, most_apart=MOST_APART),
)


@dataclass(frozen=True)
class Outcome:
    """What one fault did. repeated, recovery: seconds, of work done twice and until work went on."""

    fault: str
    moment: str
    repeated: float
    recovery: float
    result: str


def chaos(words: str, *, seed: int, out: Path) -> Iterator[Outcome]:
    """Act the plays with a fault whose name contains `words`; yields what came of each of their faults.

    out: keeps the run directories and logs of plays that failed.
    """
    references: dict[tuple[str, ...], str] = {}
    plays = [scenario for scenario in PLAYS if any(words in fault for fault in scenario.faults)]
    with TestCluster() as test_cluster, tempfile.TemporaryDirectory(prefix="chaos-") as scratch:
        for scenario in plays:
            options = tuple(option for option in scenario.options if option.startswith("training."))
            if options not in references:
                references[options] = str(Path(scratch) / f"undisturbed-{len(references)}")
                undisturbed(references[options], options)
            folder = out / f"seed-{seed}-play-{PLAYS.index(scenario) + 1}"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            test_cluster.restore()
            outcomes = act(scenario, scene_of(scenario, test_cluster, folder, seed=seed), references[options])
            yield from outcomes
            if not any(outcome.result.startswith("FAILED") for outcome in outcomes):
                shutil.rmtree(folder, ignore_errors=True)


def scene_of(scenario: Scenario, test_cluster: TestCluster, folder: Path, *, seed: int) -> FaultContext:
    """Where a play is acted: in an empty folder."""
    (folder / "run.yaml").write_text(RUN)
    rng = random.Random(f"{seed} {scenario}")
    return FaultContext(
        test_cluster, folder, rng, list(scenario.options), str(folder / "run"), round=scenario.first_round
    )


def act(scenario: Scenario, context: FaultContext, reference: str) -> list[Outcome]:
    """Let everything happen to one run, wait for its end, and compare it with the run in the directory `reference`."""
    outcomes: list[Outcome] = []
    known: list[int] = []
    losses: tuple[Loss, ...] = ()
    try:
        if not scenario.starts:
            context.start()
        for fault in scenario.faults:
            context.moment, context.stopped_at = "", 0.0
            outcomes.append(Outcome(fault, "", 0.0, 0.0, "not reached"))
            FAULTS[fault](context)
            known.append(context.num_losses)
            outcomes[-1] = Outcome(fault, context.moment, 0.0, _settle(context), "")
        _finish(context)
        losses = (context.status() or Status()).lost
        if context.compare_with is not None:
            reference = context.compare_with
            undisturbed(reference, context.options)
        result = compare(context.run_dir, reference, most_apart=scenario.most_apart)
    except (AssertionError, TimeoutError, UserError, OSError, subprocess.SubprocessError) as error:
        result = f"FAILED: {' '.join(str(error).split())[-300:]}"
    finally:
        if context.job is not None and context.job.poll() is None:
            context.job.kill()
            context.job.wait()
        for undo in reversed(context.undo):
            undo()
    for place, (first, last) in enumerate(zip(known, [*known[1:], len(losses)], strict=True)):
        outcomes[place] = _counted(outcomes[place], losses[first:last])
    return [replace(outcome, result=outcome.result or result) for outcome in outcomes]


def _counted(outcome: Outcome, losses: Sequence[Loss]) -> Outcome:
    """With what the run lost between this fault and the next."""
    repeated = sum(loss.seconds_repeated for loss in losses)
    return replace(
        outcome,
        repeated=repeated,
        recovery=outcome.recovery or sum(loss.recovery_seconds or 0.0 for loss in losses),
    )


def _settle(context: FaultContext) -> float:
    """Until the run works again or has passed the round; after a stop on purpose, seconds until it went on."""
    until = time.monotonic() + _SETTLE_SECONDS
    while time.monotonic() < until and context.job is not None and context.job.poll() is None:
        status = context.status() or Status()
        losses = status.lost[context.num_losses :]
        at_work = status.workers > 0 and status.phase in _WORKING and status.updated_at > context.stopped_at
        if at_work and context.stopped_at and not losses:
            return status.updated_at - context.stopped_at
        if at_work and losses and all(loss.recovery_seconds is not None for loss in losses):
            break
        if at_work and status.round > context.round:
            break
        time.sleep(0.05)
    return 0.0


def _finish(context: FaultContext) -> None:
    assert context.job is not None
    code = context.job.wait(timeout=900)
    assert code == 0, f"exit code {code}: {context.log.read_text()[-500:]}"


def undisturbed(run_dir: str, options: Sequence[str]) -> None:
    """The same run in one process, or the rest of it if it was begun."""
    config = parse(Config, RUN, [*options, f"run.dir={run_dir}", "run.workers=0"])
    for _ in pretrain(config, LocalWorkers()):
        pass


def compare(run_dir: str, reference: str, *, most_apart: float = 0.0) -> str:
    """ "identical" (or how well it agrees, if learned weights may be apart). AssertionError says what differs."""
    rounds, others = (_rounds(folder) for folder in (run_dir, reference))
    numbers, steps = ([record[key] for record in rounds] for key in ("round", "steps"))
    assert numbers == list(range(len(others))), f"metrics.jsonl holds rounds {numbers}"
    assert steps == [record["steps"] for record in others], f"metrics.jsonl counts {steps} steps"
    one, two = (load_newest(folder, torch.device("cpu")) for folder in (run_dir, reference))
    assert one is not None and two is not None
    names = [name for name in two["network"] if not (most_apart and ".running_" in name)]
    distance = max(float((one["network"][name].double() - two["network"][name].double()).abs().max()) for name in names)
    assert distance <= most_apart, f"weights are apart by {distance:.3g}"
    same = [record["assignments"] for record in rounds] == [record["assignments"] for record in others]
    assert same, "assignments differ"
    return f"agrees to {distance:.1g}" if most_apart else "identical"


def _rounds(run_dir: str) -> list[dict]:
    with suppress(FileNotFoundError):
        return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    return []


def row(outcome: Outcome) -> str:
    """A line of the table in the README."""
    return (
        f"| {outcome.fault} | {outcome.moment} | {outcome.repeated:.1f} | {outcome.recovery:.1f} | {outcome.result} |"
    )


HEADER = "| fault | moment | repeated work, s | recovery, s | result |\n|---|---|---|---|---|"
