"""A trial: a run with the settings of the sweep, changed in the searched keys."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import yaml

from raycluster.config import dump, from_tree
from raycluster.config.errors import format_value, plain, report
from raycluster.data.manifest import DataSettings
from raycluster.io import storage
from raycluster.io.run_paths import RunPaths
from raycluster.run.config import Config
from raycluster.run.directory import read_report, write_config
from raycluster.seeding import generator
from raycluster.sweep.config import SweepConfig
from raycluster.sweep.space import SOURCE, Axis, Values, draw, grid, one_by_one, read_space
from raycluster.types import UserError

WITHOUT_EFFECT = {
    "run": "nothing in `run` changes a result; set it for all trials",
    "evaluation": "it changes how trials are evaluated, not what they learn; set it for all trials",
    "data.labels": "labels are used for evaluation only; set it for all trials",
    "method.engine": "all engines give the same clusters; leave it out",
    "seed": "set sweep.seeds to repeat every combination with other seeds",
    "search": "it is not a setting of a run",
    "sweep": "it is not a setting of a run",
}
SCHEDULE_KEYS = ("reassign_every_epochs", "num_reassignments", "every", "max_per_epoch")  # of methods


@dataclass(frozen=True)
class Trial:
    """One combination with one seed. number: of the combination, from 0. values: {searched key: value}."""

    number: int
    values: Values
    seed: int
    config: Config

    @property
    def run_dir(self) -> str:
        """The run directory of the trial."""
        return self.config.run.dir

    @property
    def name(self) -> str:
        """The name of the run directory."""
        return storage.without_options(self.run_dir)[0].rpartition("/")[2]


@dataclass
class History:
    """The progress of a trial.

    records: by round. outcome: `finished`, `failed` (for a reason), or empty. skipped_lines: of metrics.jsonl that hold
    no record of a round.
    """

    records: dict[int, dict[str, Any]] = field(default_factory=dict)
    outcome: str = ""
    reason: str = ""
    skipped_lines: int = 0


def make_trial(sweep: SweepConfig, number: int, values: Values, seed: int) -> Trial:
    """The trial of a combination. Raises UserError unless the values are valid settings of a run."""
    tree = plain(sweep.run_fields())
    for key, value in values.items():
        _set(tree, key.split("."), plain(value))
    repeated = f"-seed{seed}" if sweep.sweep.seeds > 1 else ""
    tree["run"]["dir"] = RunPaths(sweep.run.dir).trial(f"{number:03d}{repeated}").directory
    tree["seed"] = seed
    tree["evaluation"]["every_rounds"] = max(1, sweep.evaluation.every_rounds)
    source = ", ".join(f"{key}={format_value(value)}" for key, value in values.items())
    return Trial(number, values, seed, from_tree(Config, tree, source=source))


def _set(tree: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    for key in keys[:-1]:
        if not isinstance(tree.get(key), dict):
            tree[key] = {}
        tree = tree[key]
    tree[keys[-1]] = value


def check_space(sweep: SweepConfig) -> tuple[list[Axis], list[Values]]:
    """The axes, and the combinations to try: none for bayesian, which proposes them later.

    Raises UserError with all errors: keys that do not exist or have no effect, values that are invalid alone or
    together, values of equal effect.
    """
    axes = read_space(sweep.search, grid=sweep.sweep.strategy == "grid")
    useless = _without_effect(axes)
    others = [axis for axis in axes if axis.key not in useless]
    config_errors = [*useless.values(), *_invalid(sweep, one_by_one(others))]
    if not config_errors:
        combinations = _planned(sweep, axes)
        extremes = [{axis.key: axis.examples()[end] for axis in axes} for end in (0, -1)]
        config_errors = _invalid(sweep, combinations or extremes) or _redundant(sweep, axes)
    if config_errors:
        raise UserError(report(SOURCE, config_errors))
    return axes, combinations


def _planned(sweep: SweepConfig, axes: Sequence[Axis]) -> list[Values]:
    if sweep.sweep.strategy == "grid":
        found = grid(axes)
        if sweep.sweep.early_stopping == "none":
            return found
        # A grid in order may improve from trial to trial, and ASHA would then stop none of them.
        return [found[index] for index in generator(sweep.seed, "order").permutation(len(found))]
    return draw(axes, sweep.sweep.trials or 0, sweep.seed) if sweep.sweep.strategy == "random" else []


def _without_effect(axes: Iterable[Axis]) -> dict[str, str]:
    """{key: why searching it is pointless}."""
    return {
        axis.key: f"search.{axis.key}: {reason}"
        for axis in axes
        for key, reason in WITHOUT_EFFECT.items()
        if axis.key == key or axis.key.startswith(f"{key}.")
    }


def _invalid(sweep: SweepConfig, combinations: Iterable[Values]) -> list[str]:
    """The distinct errors of the combinations as settings of a run."""
    found: dict[str, None] = {}
    for values in combinations:
        try:
            make_trial(sweep, 0, values, sweep.seed)
        except UserError as error:
            found |= dict.fromkeys(line.strip() for line in str(error).splitlines()[1:])
    return list(found)


def _redundant(sweep: SweepConfig, axes: Sequence[Axis]) -> list[str]:
    """Errors for values of one key that lead to the same run."""
    found = []
    first = {axis.key: axis.examples()[0] for axis in axes}
    for axis in axes:
        seen: dict[str, Any] = {}
        for value in axis.examples():
            behaviour = _behaviour(make_trial(sweep, 0, {**first, axis.key: value}, sweep.seed).config)
            if behaviour in seen:
                pair = f"{format_value(seen[behaviour])} and {format_value(value)}"
                found.append(f"search.{axis.key}: {pair} have the same effect; remove one")
            seen[behaviour] = value
    return found


def _behaviour(config: Config) -> str:
    """The settings of a run as text, with the epochs of reassignments in place of their schedule."""
    tree = plain(config)
    for key in SCHEDULE_KEYS:
        tree["method"].pop(key, None)
    tree["method"]["reassigned at"] = config.method.reassign_steps(config.training.epochs, 1000)
    return repr(tree)


def manifest_uri(sweep: SweepConfig, data: DataSettings) -> str:
    """The manifest shared by all trials on `data`; that of evaluation.test_uri lies in the same folder."""
    digest = sha256(dump(data).encode()).hexdigest()[:8]
    return RunPaths(sweep.run.dir).trial_data(digest).manifest


def ensure_prepared(sweep: SweepConfig, trial: Trial) -> None:
    """Create the run directory of a trial, with copies of the manifests of its data, unless it exists."""
    if storage.exists(RunPaths(trial.run_dir).config):
        return
    folder = storage.parent(manifest_uri(sweep, trial.config.data))
    for uri in storage.list_files(folder) if storage.exists(folder) else []:
        name = storage.without_options(uri)[0].rpartition("/")[2]
        storage.write_bytes(storage.join(trial.run_dir, name), storage.read_bytes(uri))
    write_config(trial.run_dir, trial.config)


def read_history(trial: Trial) -> History:
    """The progress of a trial by its run directory. A failed trial may be tried again."""
    uri = RunPaths(trial.run_dir).metrics
    text = storage.read_bytes(uri).decode(errors="replace") if storage.exists(uri) else ""
    lines = [line for line in text.split("\n") if line.strip()]
    records = [record for record in map(_record, lines) if record is not None]
    return History(
        {record["round"]: record for record in records},
        "finished" if read_report(trial.run_dir) is not None else "",
        skipped_lines=len(lines) - len(records),
    )


def _record(line: str) -> dict[str, Any] | None:
    """The record of a round, None if the line holds none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or type(record.get("round")) is not int or number(record, "epoch") is None:
        return None
    return record


def number(record: dict[str, Any], name: str) -> float | None:
    """A finite number of a record, None if it is missing or anything else."""
    value = record.get(name)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf
    return value if is_number else None


def ready_to_run(trial: Trial, run_dir: str, head: str) -> str:
    """The complete configuration of a trial as YAML, with another run directory. head: comment lines at the top."""
    tree = yaml.safe_load(dump(trial.config))
    tree["run"]["dir"] = run_dir
    return head + yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=120)
