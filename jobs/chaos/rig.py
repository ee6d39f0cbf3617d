"""Scenarios of faults, and the comparison of their results with a reference run without faults."""

from __future__ import annotations

import json
import logging
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from chaos.cluster import TestCluster
from chaos.faults import FAULTS, FaultContext
from raycluster.config import parse
from raycluster.monitoring.status import Loss, Status
from raycluster.run.checkpoint import load_newest
from raycluster.run.config import Config
from raycluster.run.local_workers import LocalWorkers
from raycluster.run.loop import pretrain
from raycluster.types import UserError

logger = logging.getLogger("chaos")

RUN = """
data: {uri: digits, shard_size: 150}
views: {train: {size: 32, crop_scale: [0.5, 1.0]}, eval: {size: 64}}
model: {name: smallnet, widths: [8, 16, 32]}
method: {name: deepcluster, num_clusters: 60, layer: conv3, descriptor: pooled, pca_dim: 16, iterations: 60}
training: {epochs: 7, global_batch: 64, microbatch: 16, mode: exact, threads: 1, head_lr: 0.5}
evaluation: {max_samples: 600}
run: {dir: unset, workers: {min: 1, max: 2}, resize_seconds: 3, checkpoint_minutes: 0.03}
"""
TOLERANCE = 1e-4  # of weights, in fast mode
_ACTIVE_PHASES = ("extracting", "clustering", "training")
_SETTLE_SECONDS = 240.0


@dataclass(frozen=True)
class Scenario:
    """A run and its faults, in order.

    options: overrides of the run. first_round: the first round with faults. fault_starts_job: the first fault starts
    the job. tolerance: largest difference of weights from those of the reference run.
    """

    faults: tuple[str, ...]
    options: tuple[str, ...] = ()
    first_round: int = 1
    fault_starts_job: bool = False
    tolerance: float = 0.0


_FAST = ("training.mode=fast", "training.epochs=1")
_RARE_CHECKPOINTS = ("run.checkpoint_minutes=60",)  # only those triggered by events
_TWICE = ("training.epochs=14",)  # so that all faults occur before the end
_LONG = (*_RARE_CHECKPOINTS, *_TWICE)
_STARTING = ("disk full for 30 s", "bucket unreachable for 30 s", "images truncated in the middle of a shard")
SCENARIOS = (
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
    Scenario(("node removed while extracting", "node added", "node removed while clustering"), _RARE_CHECKPOINTS),
    Scenario(
        (
            "second job on the same directory",
            "job stopped by SIGTERM, 2 -> 1 workers",
            "job interrupted while clustering, 1 -> 0 workers",
            "job interrupted while extracting, 0 -> 2 workers",
        )
    ),
    *(Scenario((fault,), fault_starts_job=True) for fault in _STARTING),
    Scenario(("node drained while extracting",), _LONG),
    Scenario(("training worker killed while training",), _FAST, first_round=0, tolerance=TOLERANCE),
    Scenario(("training worker killed while extracting",), _FAST, first_round=0, tolerance=TOLERANCE),
)


@dataclass(frozen=True)
class Outcome:
    """The effect of a fault. repeated: seconds of repeated work. recovery: seconds until the run resumed."""

    fault: str
    moment: str
    repeated: float
    recovery: float
    result: str


def run_scenarios(only: str, *, seed: int, out: Path) -> Iterator[Outcome]:
    """Run the scenarios with a fault whose name contains `only`; yields the outcome of each of their faults.

    out: keeps the run directories and logs of failed scenarios.
    """
    references: dict[tuple[str, ...], str] = {}
    selected = [scenario for scenario in SCENARIOS if any(only in fault for fault in scenario.faults)]
    logger.info("starting a cluster of 3 nodes for %d scenarios with seed %d", len(selected), seed)
    with TestCluster() as test_cluster, tempfile.TemporaryDirectory(prefix="chaos-") as scratch:
        for number, scenario in enumerate(selected, 1):
            options = tuple(option for option in scenario.options if option.startswith("training."))
            if options not in references:
                logger.info("running the reference %s", " ".join(options))
                references[options] = str(Path(scratch) / f"reference-{len(references)}")
                run_reference(references[options], options)
            logger.info("scenario %d of %d", number, len(selected))
            test_cluster.restore()
            with _scenario_folder(out, f"seed-{seed}-scenario-{SCENARIOS.index(scenario) + 1}") as folder:
                context = make_context(scenario, test_cluster, folder, seed=seed)
                outcomes = run_scenario(scenario, context, references[options])
                if any(outcome.result.startswith("FAILED") for outcome in outcomes):
                    shutil.copytree(folder, out / folder.name, dirs_exist_ok=True, ignore_dangling_symlinks=True)
            yield from outcomes


@contextmanager
def _scenario_folder(out: Path, name: str) -> Iterator[Path]:
    """An empty folder with a name of its own, removed at the end; an earlier one below `out` is removed, too."""
    shutil.rmtree(out / name, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True) as scratch:
        folder = Path(scratch) / name
        folder.mkdir()
        yield folder


def make_context(scenario: Scenario, test_cluster: TestCluster, folder: Path, *, seed: int) -> FaultContext:
    """The context of a scenario whose run lies in an empty folder."""
    (folder / "run.yaml").write_text(RUN)
    rng = random.Random(f"{seed} {scenario}")
    return FaultContext(
        test_cluster, folder, rng, list(scenario.options), str(folder / "run"), round=scenario.first_round
    )


def run_scenario(scenario: Scenario, context: FaultContext, reference: str) -> list[Outcome]:
    """Inject all faults into one run, wait for its end, and compare it with the run in the directory `reference`."""
    outcomes: list[Outcome] = []
    known: list[int] = []
    losses: tuple[Loss, ...] = ()
    try:
        if not scenario.fault_starts_job:
            context.start()
        for fault in scenario.faults:
            context.moment, context.stopped_at = "", 0.0
            outcomes.append(Outcome(fault, "", 0.0, 0.0, "not reached"))
            logger.info("  %s", fault)
            FAULTS[fault](context)
            known.append(context.num_losses)
            outcomes[-1] = Outcome(fault, context.moment, 0.0, _settle(context), "")
        _finish(context)
        losses = (context.status() or Status()).lost
        if context.compare_with is not None:
            reference = context.compare_with
            run_reference(reference, context.options)
        result = compare(context.run_dir, reference, tolerance=scenario.tolerance)
    except (AssertionError, TimeoutError, UserError, OSError, subprocess.SubprocessError) as error:
        result = f"FAILED: {' '.join(str(error).split())[-300:]}"
    finally:
        if context.job is not None and context.job.poll() is None:
            context.job.kill()
            context.job.wait()
        for cleanup in reversed(context.cleanups):
            cleanup()
    for index, (first, last) in enumerate(zip(known, [*known[1:], len(losses)], strict=True)):
        outcomes[index] = _with_costs(outcomes[index], losses[first:last])
    return [replace(outcome, result=outcome.result or result) for outcome in outcomes]


def _with_costs(outcome: Outcome, losses: Sequence[Loss]) -> Outcome:
    """The outcome with the costs of the failures between this fault and the next."""
    repeated = sum(loss.seconds_repeated for loss in losses)
    return replace(
        outcome,
        repeated=repeated,
        recovery=outcome.recovery or sum(loss.recovery_seconds or 0.0 for loss in losses),
    )


def _settle(context: FaultContext) -> float:
    """Wait until the run has recovered or passed the round; returns the seconds that a restart took."""
    until = time.monotonic() + _SETTLE_SECONDS
    while time.monotonic() < until and context.job is not None and context.job.poll() is None:
        status = context.status() or Status()
        losses = status.lost[context.num_losses :]
        active = status.workers > 0 and status.phase in _ACTIVE_PHASES and status.updated_at > context.stopped_at
        if active and context.stopped_at and not losses:
            return status.updated_at - context.stopped_at
        if active and losses and all(loss.recovery_seconds is not None for loss in losses):
            break
        if active and status.round > context.round:
            break
        time.sleep(0.05)
    return 0.0


def _finish(context: FaultContext) -> None:
    assert context.job is not None
    code = context.job.wait(timeout=900)
    assert code == 0, f"exit code {code}: {context.log.read_text()[-500:]}"


def run_reference(run_dir: str, options: Sequence[str]) -> None:
    """Run, or resume, the same configuration in one process without faults."""
    config = parse(Config, RUN, [*options, f"run.dir={run_dir}", "run.workers=0"])
    for _ in pretrain(config, LocalWorkers()):
        pass


def compare(run_dir: str, reference: str, *, tolerance: float = 0.0) -> str:
    """`identical`, or the difference of weights within the tolerance. Raises AssertionError if the runs differ."""
    rounds, others = (_rounds(folder) for folder in (run_dir, reference))
    numbers, steps = ([record[key] for record in rounds] for key in ("round", "steps"))
    assert numbers == list(range(len(others))), f"metrics.jsonl holds rounds {numbers}"
    assert steps == [record["steps"] for record in others], f"metrics.jsonl counts {steps} steps"
    one, two = (load_newest(folder, torch.device("cpu")) for folder in (run_dir, reference))
    assert one is not None and two is not None
    names = [name for name in two["network"] if not (tolerance and ".running_" in name)]
    distance = max(float((one["network"][name].double() - two["network"][name].double()).abs().max()) for name in names)
    assert distance <= tolerance, f"weights differ by {distance:.3g}"
    same = [record["assignments"] for record in rounds] == [record["assignments"] for record in others]
    assert same, "assignments differ"
    return f"agrees to {distance:.1g}" if tolerance else "identical"


def _rounds(run_dir: str) -> list[dict]:
    with suppress(FileNotFoundError):
        return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    return []


def row(outcome: Outcome) -> str:
    """A line of the table."""
    return (
        f"| {outcome.fault} | {outcome.moment} | {outcome.repeated:.1f} | {outcome.recovery:.1f} | {outcome.result} |"
    )


HEADER = "| fault | moment | repeated work, s | recovery, s | result |\n|---|---|---|---|---|"
