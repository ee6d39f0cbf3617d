"""Create or resume the directory of a sweep, after all checks that need no training."""

from __future__ import annotations

from raycluster.config.errors import report
from raycluster.data.dataset import open_dataset
from raycluster.evaluation.base import probe
from raycluster.io import storage
from raycluster.run.config import Config
from raycluster.run.directory import differences, holds_run, write_config
from raycluster.run.local_workers import LocalWorkers
from raycluster.run.validation import check_dataset, check_network
from raycluster.sweep.config import SweepConfig
from raycluster.sweep.plan import Sweep
from raycluster.sweep.space import SOURCE, one_by_one
from raycluster.sweep.trials import check_space, make_trial, manifest_uri
from raycluster.types import UserError

LABEL_FREE_OBJECTIVE = "effective_rank"


def open_sweep(config: SweepConfig) -> Sweep:
    """The sweep in the directory `run.dir`, new or resumed.

    Raises UserError with all errors of the search space, or if the directory holds another sweep or a run.
    """
    axes, combinations = check_space(config)
    _check_directory(config)
    _check_data(config, [make_trial(config, 0, values, config.seed).config for values in one_by_one(axes)])
    write_config(config.run.dir, config)
    dataset = open_dataset(config.data, manifest_uri(config, config.data), LocalWorkers(), config.seed)
    labelled = dataset.manifest.labels is not None
    automatic = probe(config.evaluation.probes[0]).DECLARATION.metrics[0].name if labelled else LABEL_FREE_OBJECTIVE
    return Sweep(config, axes, combinations, objective=config.sweep.objective or automatic)


def _check_directory(config: SweepConfig) -> None:
    run_dir = config.run.dir
    if holds_run(run_dir):
        raise UserError(f"{run_dir} holds a run, not a sweep; choose another run.dir")
    different = differences(run_dir, config)
    if different is None:
        return
    if config.run.resume == "never":
        raise UserError(f"{run_dir} already holds a sweep; choose another run.dir, or run.resume=auto to continue it")
    if different:
        raise UserError(
            f"{run_dir} holds a sweep with other settings:\n  "
            + "\n  ".join(different)
            + "\nchoose another run.dir for this one, or repeat the settings of that one to continue it"
        )


def _check_data(sweep: SweepConfig, configs: list[Config]) -> None:
    """Check the settings of every trial against its images; trials with the same images share a manifest."""
    config_errors: dict[str, None] = {}
    for config in configs:
        try:
            check_network(config)
            uri = manifest_uri(sweep, config.data)
            dataset = open_dataset(config.data, uri, LocalWorkers(), config.seed)
            check_dataset(config, dataset, storage.parent(uri))
        except UserError as error:
            config_errors[str(error)] = None
    if config_errors:
        raise UserError(report(SOURCE, list(config_errors)))
