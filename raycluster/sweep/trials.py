"""A trial: an ordinary run whose settings are those of the sweep, changed in the searched keys."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import yaml

from raycluster.config import dump, from_tree
from raycluster.config.errors import format_value, plain
from raycluster.data.manifest import DataSettings
from raycluster.io import storage
from raycluster.io.run_paths import RunPaths
from raycluster.run.directory import read_report, write_config
from raycluster.run.state import Config
from raycluster.seeding import generator
from raycluster.sweep.config import SweepConfig
from raycluster.sweep.space import Axis, Values, draw, grid, one_by_one, read_space, told
from raycluster.types import UserError

WITHOUT_EFFECT = {
    "run": "nothing in `run` changes a result; set it for all trials",
    "evaluation": "it changes how trials are judged, not what they learn; set it for all trials",
    "data.labels": "labels are used to judge trials only; set it for all trials",
    "method.engine": "every engine finds the same clusters; leave it out",
    "seed": "set sweep.seeds to repeat every combination with other seeds",
    "search": "it is no setting of a run",
    "sweep": "it is no setting of a run",
}
ONLY_WHEN = ("reassign_every_epochs", "num_reassignments", "every", "max_per_epoch")  # settings of methods


@dataclass(frozen=True)
class Trial:
    """One combination under one seed. number: of the combination, from 0. values: what differs from other trials."""

    number: int
    values: Values
    seed: int
    config: Config

    @property
    def run_dir(self) -> str:
        """Its run directory."""
        return self.config.run.dir

    @property
    def name(self) -> str:
        """The name of its run directory."""
        return storage.without_options(self.run_dir)[0].rpartition("/")[2]


@dataclass
class History:
    """What is known of a trial so far. outcome: empty while it may go on, else `finished` or `failed` (and why)."""

    records: dict[int, dict[str, Any]] = field(default_factory=dict)
    outcome: str = ""
    reason: str = ""


def make_trial(sweep: SweepConfig, number: int, values: Values, seed: int) -> Trial:
    """The trial that tries `values`. Raises UserError if they are no valid settings of a run."""
    tree = plain(sweep.run_fields())
    for key, value in values.items():
        _set(tree, key.split("."), plain(value))
    repeated = f"-seed{seed}" if sweep.sweep.seeds > 1 else ""
    tree["run"]["dir"] = RunPaths(sweep.run.dir).trial(f"{number:03d}{repeated}").directory
    tree["seed"] = seed
    tree["evaluation"]["every_rounds"] = max(1, sweep.evaluation.every_rounds)
    told_as = ", ".join(f"{key}={format_value(value)}" for key, value in values.items())
    return Trial(number, values, seed, from_tree(Config, tree, source=told_as))


def _set(tree: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    for key in keys[:-1]:
        if not isinstance(tree.get(key), dict):
            tree[key] = {}
        tree = tree[key]
    tree[keys[-1]] = value


def check_space(sweep: SweepConfig) -> tuple[list[Axis], list[Values]]:
    """The axes, and the combinations to try (none for bayesian, which finds them as it goes).

    Raises UserError with everything that is wrong: keys that do not exist or have no effect, values that no run accepts
    alone or together, combinations that mean the same.
    """
    axes = read_space(sweep.search, grid=sweep.sweep.strategy == "grid")
    useless = _without_effect(axes)
    others = [axis for axis in axes if axis.key not in useless]
    config_errors = [*useless.values(), *_invalid(sweep, one_by_one(others))]
    if not config_errors:
        combinations = _planned(sweep, axes)
        stop_requests = [{axis.key: axis.examples()[end] for axis in axes} for end in (0, -1)]
        config_errors = _invalid(sweep, combinations or stop_requests) or _alike(sweep, axes)
    if config_errors:
        raise UserError(told(config_errors))
    return axes, combinations


def _planned(sweep: SweepConfig, axes: Sequence[Axis]) -> list[Values]:
    if sweep.sweep.strategy == "grid":
        found = grid(axes)
        if sweep.sweep.early_stopping == "none":
            return found
        # In their own order, good ones might come last, and each go on for being better than those before it.
        return [found[index] for index in generator(sweep.seed, "order").permutation(len(found))]
    return draw(axes, sweep.sweep.trials or 0, sweep.seed) if sweep.sweep.strategy == "random" else []


def _without_effect(axes: Iterable[Axis]) -> dict[str, str]:
    """{key: why it is not worth searching}."""
    return {
        axis.key: f"search.{axis.key}: {reason}"
        for axis in axes
        for key, reason in WITHOUT_EFFECT.items()
        if axis.key == key or axis.key.startswith(f"{key}.")
    }


def _invalid(sweep: SweepConfig, combinations: Iterable[Values]) -> list[str]:
    """What a run says to these settings, each complaint once."""
    found: dict[str, None] = {}
    for values in combinations:
        try:
            make_trial(sweep, 0, values, sweep.seed)
        except UserError as error:
            found |= dict.fromkeys(line.strip() for line in str(error).splitlines()[1:])
    return list(found)


def _alike(sweep: SweepConfig, axes: Sequence[Axis]) -> list[str]:
    """Values of one key that make the same run, the others being equal."""
    found = []
    first = {axis.key: axis.examples()[0] for axis in axes}
    for axis in axes:
        seen: dict[str, Any] = {}
        for value in axis.examples():
            behaviour = _behaviour(make_trial(sweep, 0, {**first, axis.key: value}, sweep.seed).config)
            if behaviour in seen:
                told_as = f"{format_value(seen[behaviour])} and {format_value(value)} have the same effect; drop one"
                found.append(f"search.{axis.key}: {told_as}")
            seen[behaviour] = value
    return found


def _behaviour(config: Config) -> str:
    """What a run does, as text: of settings that only say when labels are reassigned, the epochs that come of them."""
    tree = plain(config)
    for key in ONLY_WHEN:
        tree["method"].pop(key, None)
    tree["method"]["reassigned at"] = config.method.reassignments(config.training.epochs, 1000)
    return repr(tree)


def manifest_uri(sweep: SweepConfig, data: DataSettings) -> str:
    """Where the images of `data` are listed for all trials that have them; those of evaluation.test_uri lie beside."""
    digest = sha256(dump(data).encode()).hexdigest()[:8]
    return RunPaths(sweep.run.dir).trial_data(digest).manifest


def ensure_prepared(sweep: SweepConfig, trial: Trial) -> None:
    """Make its run directory ready to start, with copies of the manifests of its data; one that is ready stays."""
    if storage.exists(RunPaths(trial.run_dir).config):
        return
    folder = storage.parent(manifest_uri(sweep, trial.config.data))
    for uri in storage.list_files(folder) if storage.exists(folder) else []:
        name = storage.without_options(uri)[0].rpartition("/")[2]
        storage.write_bytes(storage.join(trial.run_dir, name), storage.read_bytes(uri))
    write_config(trial.run_dir, trial.config)


def read_history(trial: Trial) -> History:
    """What its run directory tells."""
    uri = RunPaths(trial.run_dir).metrics
    lines = storage.read_bytes(uri).decode().splitlines() if storage.exists(uri) else []
    outcome = "finished" if read_report(trial.run_dir) is not None else ""  # what failed may be tried again
    return History({record["round"]: record for record in map(json.loads, lines)}, outcome)


def ready_to_run(trial: Trial, run_dir: str, head: str) -> str:
    """The complete configuration of a trial as a YAML file that runs it again in `run_dir`."""
    tree = yaml.safe_load(dump(trial.config))
    tree["run"]["dir"] = run_dir
    return head + yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=120)
