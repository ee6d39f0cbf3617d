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
from dataclasses import dataclass
from pathlib import Path

import torch

from raycluster.checkpoint import load_newest
from raycluster.config import parse
from raycluster.distributed.faults import FAULTS, Scene
from raycluster.distributed.stage import Stage
from raycluster.pretrain import pretrain
from raycluster.run import Config
from raycluster.status import Status
from raycluster.types import UserError
from raycluster.workers import LocalWorkers

RUN = """
data: {uri: digits, shard_size: 150}
views: {train: {size: 32, crop_scale: [0.5, 1.0]}, cluster: {size: 96}}
model: {name: smallnet, widths: [8, 16, 32]}
method: {name: deepcluster, num_clusters: 60, layer: conv3, descriptor: pooled, pca_dim: 16, iterations: 60}
training: {epochs: 4, global_batch: 64, microbatch: 16, mode: exact, threads: 1}
evaluation: {max_samples: 600}
run: {dir: unset, workers: {min: 1, max: 2}, resize_seconds: 3, keep_checkpoints: 2}
"""
FAST = ("training.mode=fast", "training.epochs=1")
FAST_FAULTS = tuple(f"training worker killed while {phase} (fast mode)" for phase in ("training", "extracting"))
MOST_APART = 1e-4
_WORKING = ("extracting", "clustering", "training")


@dataclass(frozen=True)
class Outcome:
    """What one fault did. repeated, recovery: seconds, of work done twice and until work went on."""

    fault: str
    moment: str
    repeated: float
    recovery: float
    result: str


def chaos(names: Sequence[str], *, seed: int, out: Path) -> Iterator[Outcome]:
    """Play the faults one after the other, each on a run of its own; yields what came of each.

    names: some of FAULTS, those with " (fast mode)" in fast mode. out: keeps the run directories and logs of those that
    failed.
    """
    references: dict[tuple[str, ...], str] = {}
    with Stage() as stage, tempfile.TemporaryDirectory(prefix="chaos-") as scratch:
        for name in names:
            folder = out / name.replace(" ", "-").replace(",", "").replace("->", "to").replace("/", "-")
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            options = FAST if name in FAST_FAULTS else ()
            if options not in references:
                references[options] = str(Path(scratch) / f"undisturbed-{len(references)}")
                _undisturbed(references[options], options)
            stage.restore()
            rng = random.Random(f"{seed} {name}")
            scene = Scene(
                stage, folder / "run.yaml", str(folder / "run"), folder, rng, list(options), (0,) if options else (1, 2)
            )
            outcome = _play(name, scene, references[options])
            yield outcome
            if outcome.result.startswith(("identical", "agrees")):
                shutil.rmtree(folder, ignore_errors=True)


def _play(name: str, scene: Scene, reference: str) -> Outcome:
    scene.config.write_text(RUN)
    fast = name in FAST_FAULTS
    try:
        FAULTS[name.removesuffix(" (fast mode)")](scene)
        resumed = _finish(scene)
        if scene.compare_with is not None:
            reference = scene.compare_with
            _undisturbed(reference, scene.options)
        result = compare(scene.run_dir, reference, most_apart=MOST_APART if fast else 0.0)
        repeated, recovery = _cost(scene.status() or Status(), scene.stopped_at, resumed)
        return Outcome(name, scene.moment, repeated, recovery, result)
    except (AssertionError, TimeoutError, UserError, OSError, subprocess.SubprocessError) as error:
        return Outcome(name, scene.moment, 0.0, 0.0, f"FAILED: {error}")
    finally:
        if scene.job is not None and scene.job.poll() is None:
            scene.job.kill()
            scene.job.wait()
        for undo in reversed(scene.undo):
            undo()


def _finish(scene: Scene) -> float:
    """Wait for the end of the job; the time at which it was first seen at work after it had been stopped, else 0."""
    assert scene.job is not None
    resumed, until = 0.0, time.monotonic() + 900
    while scene.job.poll() is None:
        if time.monotonic() > until:
            raise TimeoutError("the run did not end within 15 minutes")
        status = scene.status()
        at_work = status is not None and status.workers > 0 and status.phase in _WORKING
        if not resumed and at_work and status is not None and status.updated_at > scene.stopped_at:
            resumed = status.updated_at
        time.sleep(0.05)
    if scene.job.returncode != 0:
        raise AssertionError(f"exit code {scene.job.returncode}: {(scene.folder / 'job.log').read_text()[-500:]}")
    return resumed


def _cost(status: Status, stopped_at: float, resumed_at: float) -> tuple[float, float]:
    repeated = sum(loss.seconds_repeated for loss in status.lost)
    recoveries = [loss.recovery_seconds or 0.0 for loss in status.lost]
    if stopped_at and resumed_at and not recoveries:
        recoveries = [resumed_at - stopped_at]
    return repeated, sum(recoveries)


def _undisturbed(run_dir: str, options: Sequence[str]) -> None:
    """The same run in one process, or the rest of it."""
    config = parse(Config, RUN, [*options, f"run.dir={run_dir}", "run.workers=0"])
    for _ in pretrain(config, LocalWorkers()):
        pass


def compare(run_dir: str, reference: str, *, most_apart: float = 0.0) -> str:
    """ "identical" (or how well it agrees, if weights may be apart). AssertionError says what differs."""
    rounds, others = (_rounds(folder) for folder in (run_dir, reference))
    numbers, steps = ([record[key] for record in rounds] for key in ("round", "steps"))
    assert numbers == list(range(len(others))), f"metrics.jsonl holds rounds {numbers}"
    assert steps == [record["steps"] for record in others], f"metrics.jsonl counts {steps} steps"
    one, two = (load_newest(folder, torch.device("cpu")) for folder in (run_dir, reference))
    assert one is not None and two is not None
    pairs = [(tensor.double(), two["network"][name].double()) for name, tensor in one["network"].items()]
    apart = max(float((a - b).abs().max()) for a, b in pairs)
    assert apart <= most_apart, f"weights are apart by {apart:.3g}"
    same = [record["assignments"] for record in rounds] == [record["assignments"] for record in others]
    assert same, "assignments differ"
    return f"agrees to {apart:.1g}" if most_apart else "identical"


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
