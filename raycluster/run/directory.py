"""The run directory: everything a user may want to look at, in one place, local or in a bucket."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import yaml

from raycluster.config import dump
from raycluster.data.dataset import ImageDataset
from raycluster.features.extraction import SkippedImage
from raycluster.io import storage
from raycluster.run.checkpoint import list_checkpoints
from raycluster.types import UserError


def differences(run_dir: str, config: Any) -> list[str] | None:
    """What the config in a run directory has otherwise, its `run` section aside; None if there is none."""
    uri = storage.join(run_dir, "config.yaml")
    if not storage.exists(uri):
        return None
    return _differences(yaml.safe_load(storage.read_bytes(uri)), yaml.safe_load(dump(config)))


def holds_run(run_dir: str) -> bool:
    """Whether there is anything to lose: a run that failed before its first checkpoint may be begun anew."""
    return bool(list_checkpoints(run_dir)) or read_report(run_dir) is not None


def check_directory(run_dir: str, config: Any, resume: str) -> None:
    """UserError if a run lives there that must not or cannot be continued."""
    if not holds_run(run_dir):
        return
    if resume == "never":
        raise UserError(
            f"{run_dir} already holds a run; choose another run.dir, or run.resume=auto to continue that one"
        )
    different = differences(run_dir, config)
    if different:
        raise UserError(
            f"{run_dir} holds a run with other settings:\n  "
            + "\n  ".join(different)
            + "\nchoose another run.dir for this run, or repeat the settings of that one to continue it"
        )


def write_config(run_dir: str, config: Any) -> None:
    """config.yaml: every setting, defaults included."""
    storage.write_bytes(storage.join(run_dir, "config.yaml"), dump(config).encode())


def _differences(there: Any, here: Any, path: str = "") -> list[str]:
    if path == "run":
        return []
    if isinstance(there, dict) and isinstance(here, dict):
        keys = sorted(there.keys() | here.keys())
        return [
            line for key in keys for line in _differences(there.get(key), here.get(key), f"{path}.{key}".strip("."))
        ]
    return [] if there == here else [f"{path}: {there} there, {here} here"]


def write_lines(run_dir: str, name: str, records: Sequence[dict[str, Any]]) -> None:
    """Replace a JSON-lines file; written whole, so that a repeated round can never appear twice."""
    text = "".join(json.dumps(record) + "\n" for record in records)
    storage.write_bytes(storage.join(run_dir, name), text.encode())


def write_skipped(run_dir: str, dataset: ImageDataset, skipped: Sequence[SkippedImage]) -> None:
    """skipped.jsonl: every image that could not be used, by name, and why."""
    lines = [{"sample": s.sample, "path": dataset.path(s.sample), "reason": s.reason} for s in skipped]
    write_lines(run_dir, "skipped.jsonl", lines)


def read_report(run_dir: str) -> dict[str, Any] | None:
    """What a finished run found, or None."""
    uri = storage.join(run_dir, "report.json")
    if not storage.exists(uri):
        return None
    report: dict[str, Any] = json.loads(storage.read_bytes(uri))
    return report


def write_report(run_dir: str, report: dict[str, Any]) -> None:
    """report.json: what a finished run found."""
    storage.write_bytes(storage.join(run_dir, "report.json"), json.dumps(report, indent=2).encode())
