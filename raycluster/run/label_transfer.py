"""Label transfer: the configuration of a run that learns the labels of another one, which may use any network."""

from __future__ import annotations

from collections.abc import Sequence

import yaml

from raycluster.config import parse
from raycluster.data.manifest import read_manifest
from raycluster.io import storage
from raycluster.io.assignments import read_label_sets
from raycluster.run.state import Config, validate_and_initialize
from raycluster.types import UserError


def transfer_config(words: Sequence[str]) -> Config:
    """The configuration of the run `labels=RUN`, changed to learn from scratch what RUN found, with the other words as
    overrides; begun, so that fit(config) can go on.

    run.dir is RUN-on-MODEL unless given. Raises UserError if RUN has no labels, or other images than are asked for.
    """
    found = [word.removeprefix("labels=") for word in words if word.startswith("labels=")]
    if len(found) != 1 or not storage.exists(storage.join(found[0], "config.yaml")):
        raise UserError(
            f"labels: seen {', '.join(found) or 'nothing'}; wanted labels=RUN, the directory of a finished run"
        )
    labels, source = storage.absolute(found[0]), storage.join(found[0], "config.yaml")
    text = storage.read_bytes(source).decode()
    original, tree = parse(Config, text, source=source), yaml.safe_load(text)
    tree["method"] = {
        "name": "transfer",
        "labels": labels,
        "num_clusters": [one.num_classes for one in read_label_sets(storage.join(labels, "assignments"))],
    }
    overrides = [word for word in words if not word.startswith("labels=")]
    model = parse(Config, yaml.safe_dump(tree), overrides, source=source).model.name
    tree["run"]["dir"] = f"{found[0].rstrip('/')}-on-{model}"
    config = parse(Config, yaml.safe_dump(tree), overrides, source=source)
    _check(labels, original, config)
    return config


def _check(labels: str, original: Config, config: Config) -> None:
    validate_and_initialize(config)
    theirs = read_manifest(storage.join(labels, "manifest.parquet"))
    ours = read_manifest(storage.join(config.run.dir, "manifest.parquet"))
    if ours.fingerprint != theirs.fingerprint:
        raise UserError(
            f"{config.data.uri} holds {ours.num_samples} images, but the labels belong to {theirs.num_samples} others, "
            f"those of {original.data.uri}; take the same files, in the same folders, and the same data.shard_size"
        )
