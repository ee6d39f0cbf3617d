"""Accuracies of complete runs: mean (standard deviation) over seeds, beside the untrained networks."""

from __future__ import annotations

import json
import resource
import sys
import time
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

from benchmarks.runs import Figures, head, row

from raycluster.config import load
from raycluster.events import Finished, Round
from raycluster.run.config import Config
from raycluster.run.local_workers import LocalWorkers
from raycluster.run.loop import pretrain
from raycluster.training.determinism import prepare_process

_PROBES = ("knn", "whitened_knn", "linear_probe")
_COST = {"CPU minutes": ".1f", "peak MB": ".0f"}


class Trial(NamedTuple):
    """One run. file: where its figures are kept."""

    config: str
    overrides: tuple[str, ...]
    file: Path


def run(
    data: str, out: str, configs: str, settings: str = "", seeds: int = 3, first_seed: int = 0, processes: int = 1
) -> str:
    """A table with a row for each configuration.

    data: folder of Parquet files `train-*` and `test-*`, labelled. out: folder for the figures of each run; those that
    are there are not measured again. configs: names of files in configs/, separated by commas. settings: overrides for
    all of them, separated by spaces. processes: runs at the same time, each with one thread. CPU minutes are those of
    pre-training in all, without the evaluation.
    """
    common = (f"data.uri={data}/train-*.parquet", f"evaluation.test_uri={data}/test-*.parquet", "training.threads=1")
    overrides = (*common, f"evaluation.probes=[{','.join(_PROBES)}]", *settings.split())
    trials = {
        name: [
            Trial(f"configs/{name}.yaml", (*overrides, f"seed={seed}"), Path(out, f"{name}-{seed}.json"))
            for seed in range(first_seed, first_seed + seeds)
        ]
        for name in configs.split(",")
    }
    with get_context("spawn").Pool(processes, maxtasksperchild=1) as pool:
        for file in pool.imap_unordered(_measure, [trial for some in trials.values() for trial in some], chunksize=1):
            print(file, file.read_text(), file=sys.stderr, flush=True)
    columns = {name: ".1f" for name in (*_PROBES, *(f"untrained {probe}" for probe in _PROBES))} | _COST
    rows = [row(name, [_figures(trial) for trial in some], columns) for name, some in trials.items()]
    return "\n".join([head("configuration", columns), *rows])


def _measure(trial: Trial) -> Path:
    if not trial.file.exists():
        trial.file.parent.mkdir(parents=True, exist_ok=True)
        prepare_process()
        directory = trial.file.with_suffix("")
        settings = load(Config, trial.config, [*trial.overrides, f"run.dir={directory}"])
        cpu = 0.0
        for event in pretrain(settings, LocalWorkers()):
            if isinstance(event, Round):
                cpu = time.process_time()
            elif isinstance(event, Finished):
                memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
                figures = event.report["accuracies"] | {"cost": {"CPU minutes": cpu / 60, "peak MB": memory}}
                trial.file.write_text(json.dumps(figures))
    return trial.file


def _figures(trial: Trial) -> Figures:
    found = json.loads(trial.file.read_text())
    accuracies = {
        f"{prefix}{probe}": 100 * found[network][f"{probe}_accuracy"]
        for network, prefix in (("untrained", "untrained "), ("pre-trained", ""))
        for probe in _PROBES
    }
    return accuracies | found["cost"]
