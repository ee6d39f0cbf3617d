"""status.json: how far a run is, who works on it, what was lost on the way; written by the job, read by anybody."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from raycluster.io import storage


@dataclass(frozen=True)
class Loss:
    """Something that disturbed the run, and what it cost.

    at: seconds since 1970. what: for people. steps_repeated, seconds_repeated: training done twice. shards_repeated:
    extracted twice. recovery_seconds: from the last sign of work to the next; None while it has not come.
    """

    at: float
    what: str
    steps_repeated: int = 0
    shards_repeated: int = 0
    seconds_repeated: float = 0.0
    recovery_seconds: float | None = None


@dataclass(frozen=True)
class Status:
    """One look at a run.

    phase: starting, extracting, clustering, training, evaluating, finished, stopped or failed. round: the current one,
    counted from 0, of `rounds`. step: done of the `steps` of this round. done, total: images of the phase. workers: how
    many share the work. processes: {"job", "train" or "features": ["host:pid", ...]}. started_at, updated_at: seconds
    since 1970, of the whole run and of this file. seconds_left: estimate, None before there is anything to go by.
    worker_seconds: paid so far. worker_seconds_per_epoch: None before the first epoch is done. skipped: images. note:
    what the run waits for or struggles with, "" if all is well. saved: {"round", "step", "at"} of the newest checkpoint
    of this job.
    """

    phase: str = "starting"
    round: int = 0
    rounds: int = 0
    step: int = 0
    steps: int = 0
    done: int = 0
    total: int = 0
    workers: int = 0
    processes: dict[str, list[str]] = field(default_factory=dict)
    started_at: float = 0.0
    updated_at: float = 0.0
    seconds_left: float | None = None
    worker_seconds: float = 0.0
    worker_seconds_per_epoch: float | None = None
    skipped: int = 0
    note: str = ""
    saved: dict[str, float] | None = None
    lost: tuple[Loss, ...] = ()


def status_uri(run_dir: str) -> str:
    """Where the status of a run lies."""
    return storage.join(run_dir, "status.json")


def read_status(run_dir: str) -> Status | None:
    """The status of a run, or None if it never had one. Unknown fields (of a later version) are ignored."""
    uri = status_uri(run_dir)
    if not storage.exists(uri):
        return None
    found: dict[str, Any] = json.loads(storage.read_bytes(uri))
    known = {name: found[name] for name in _names(Status) if name in found}
    known["lost"] = tuple(
        Loss(**{name: item[name] for name in _names(Loss) if name in item}) for item in found.get("lost", [])
    )
    return Status(**known)


def write_status(run_dir: str, status: Status) -> None:
    """Replace the status of a run, in one step."""
    storage.write_bytes(status_uri(run_dir), json.dumps(asdict(status), indent=1).encode())


def _names(cls: type[Any]) -> list[str]:
    return [item.name for item in fields(cls)]
