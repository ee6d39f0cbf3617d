"""Reads and writes the files of a run directory that describe the run, local or in an object store."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import Any

import yaml
from pydantic import TypeAdapter
from typing_extensions import NotRequired, TypedDict

from raycluster.config import dump
from raycluster.data.dataset import ImageDataset
from raycluster.data.manifest import read_manifest
from raycluster.features.extraction import SkippedImage
from raycluster.io import storage
from raycluster.io.run_paths import RunPaths
from raycluster.run.checkpoint import list_checkpoints
from raycluster.types import UserError

log = logging.getLogger(__name__)


class _LastRound(TypedDict, total=False):
    loss: float
    nmi_labels: float


class _Report(TypedDict):
    """The part of report.json that is printed."""

    images: int
    skipped: int
    rounds: int
    last_round: _LastRound
    accuracies: NotRequired[dict[str, dict[str, float]]]


_REPORT: TypeAdapter[_Report] = TypeAdapter(_Report)


def read_config_text(run_dir: str) -> str:
    """Content of config.yaml. Raises UserError if there is none or it is not UTF-8."""
    uri = RunPaths(run_dir).config
    try:
        return storage.read_bytes(uri).decode()
    except UnicodeDecodeError as error:
        raise UserError(_damaged_config(uri, error)) from None


def _damaged_config(uri: str, cause: object) -> str:
    return (
        f"{uri} is damaged ({cause}), so the settings of that run are unknown; restore the file from a copy, or choose "
        "another run.dir"
    )


def differences(run_dir: str, config: Any) -> list[str] | None:
    """Settings that differ from config.yaml of the run directory, except the section `run`; None if it has none.

    Raises UserError if config.yaml is damaged.
    """
    uri = RunPaths(run_dir).config
    if not storage.exists(uri):
        return None
    try:
        saved = yaml.safe_load(read_config_text(run_dir))
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(_damaged_config(uri, " ".join(str(error).split()))) from None
    if not isinstance(saved, dict):
        raise UserError(_damaged_config(uri, f"it holds {str(saved)[:80]!r}, not sections"))
    return _differences(saved, yaml.safe_load(dump(config)))


def holds_run(run_dir: str) -> bool:
    """Whether the directory holds results: a run that failed before its first checkpoint may start again."""
    return bool(list_checkpoints(run_dir)) or storage.exists(RunPaths(run_dir).report)


def check_directory(run_dir: str, config: Any, resume: str) -> None:
    """Raise UserError if the directory holds a run that must not or cannot be resumed."""
    if not holds_run(run_dir):
        return
    if resume == "never":
        raise UserError(f"{run_dir} already holds a run; choose another run.dir, or run.resume=auto to resume that one")
    different = differences(run_dir, config)
    if different:
        raise UserError(
            f"{run_dir} holds a run with other settings:\n  "
            + "\n  ".join(different)
            + "\nchoose another run.dir for this run, or repeat the settings of that one to resume it"
        )


def check_same_images(run_dir: str, dataset: ImageDataset) -> None:
    """UserError unless the run in `run_dir` numbers the same images in the same way."""
    theirs, ours = read_manifest(RunPaths(run_dir).manifest), dataset.manifest
    if ours.fingerprint != theirs.fingerprint:
        raise UserError(
            f"{dataset.settings.uri} holds {ours.num_samples} images, but {run_dir} belongs to {theirs.num_samples} "
            f"others, those of {theirs.source['uri']}; use the same files, in the same folders, and the same "
            "data.shard_size"
        )


def write_config(run_dir: str, config: Any) -> None:
    """config.yaml: every setting, defaults included."""
    storage.write_bytes(RunPaths(run_dir).config, dump(config).encode())


def _differences(there: Any, here: Any, path: str = "") -> list[str]:
    if path == "run":
        return []
    if isinstance(there, dict) and isinstance(here, dict):
        keys = sorted(there.keys() | here.keys(), key=str)
        return [
            line for key in keys for line in _differences(there.get(key), here.get(key), f"{path}.{key}".strip("."))
        ]
    return [] if there == here else [f"{path}: {there} there, {here} here"]


def write_lines(uri: str, records: Sequence[dict[str, Any]]) -> None:
    """Replace a JSON-lines file; written whole, so that a repeated round never appears twice."""
    text = "".join(json.dumps(record) + "\n" for record in records)
    storage.write_bytes(uri, text.encode())


def write_skipped(run_dir: str, dataset: ImageDataset, skipped: Sequence[SkippedImage]) -> None:
    """skipped.jsonl: every image that could not be used, by name, and why."""
    lines = [{"sample": s.sample, "path": dataset.path(s.sample), "reason": s.reason} for s in skipped]
    write_lines(RunPaths(run_dir).skipped, lines)


def read_report(run_dir: str) -> dict[str, Any] | None:
    """Results of a finished run; None if it is not finished, or its report is damaged and has to be written again."""
    uri = RunPaths(run_dir).report
    if not storage.exists(uri):
        return None
    data = storage.read_bytes(uri)
    try:
        _REPORT.validate_json(data)
        report: dict[str, Any] = json.loads(data)
    except ValueError:
        log.warning("%s is damaged; the run writes it again", uri)
        return None
    return report


def write_report(run_dir: str, report: dict[str, Any]) -> None:
    """report.json: results of a finished run."""
    storage.write_bytes(RunPaths(run_dir).report, json.dumps(report, indent=2).encode())
