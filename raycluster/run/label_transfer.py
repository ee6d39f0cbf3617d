"""Label transfer: the configuration of a run that learns the labels of another run, with any network.

Asano et al., "Self-labelling via simultaneous clustering and representation learning", ICLR 2020, section 4.3.
"""

from __future__ import annotations

from collections.abc import Sequence

import yaml

from raycluster.config import parse
from raycluster.data.dataset import open_dataset
from raycluster.io import storage
from raycluster.io.assignments import read_label_sets
from raycluster.io.run_paths import RunPaths
from raycluster.run.config import Config
from raycluster.run.directory import check_same_images, read_config_text
from raycluster.run.local_workers import LocalWorkers
from raycluster.run.validation import validate_and_initialize
from raycluster.types import UserError


def transfer_config(words: Sequence[str]) -> Config:
    """The configuration of the run RUN in the word `labels=RUN`, changed to learn its labels from scratch.

    words: `labels=RUN` and overrides. run.dir is RUN-on-MODEL unless given. The run directory is validated and
    initialized, so that fit(config) can follow. Raises UserError if RUN has no labels or other images than the new run.
    """
    found = [word.removeprefix("labels=") for word in words if word.startswith("labels=")]
    if len(found) != 1 or not storage.exists(RunPaths(found[0]).config):
        raise UserError(
            f"labels: seen {', '.join(found) or 'nothing'}; wanted labels=RUN, the directory of a finished run"
        )
    labels, source = storage.absolute(found[0]), RunPaths(found[0]).config
    text = read_config_text(found[0])
    tree = yaml.safe_load(text)
    if not storage.exists(RunPaths(labels).assignments):
        raise UserError(f"{labels} has no assignments; let that run finish a round, or choose a run that has clusters")
    sizes = [one.num_classes for one in read_label_sets(RunPaths(labels).assignments)]
    tree["method"] = {"name": "transfer", "labels": labels, "num_clusters": sizes}
    overrides = [word for word in words if not word.startswith("labels=")]
    model = parse(Config, yaml.safe_dump(tree), overrides, source=source).model.name
    tree["model"]["weights"] = None
    tree["run"]["dir"] = f"{found[0].rstrip('/')}-on-{model}"
    config = parse(Config, yaml.safe_dump(tree), overrides, source=source)
    validate_and_initialize(config)
    check_same_images(labels, open_dataset(config.data, RunPaths(config.run.dir).manifest, LocalWorkers(), config.seed))
    return config
