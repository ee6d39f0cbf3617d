"""status.json: progress, workers and failures of a run; written by the job, for any reader."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from raycluster.io import storage
from raycluster.io.run_paths import RunPaths
from raycluster.types import UserError

Count = Annotated[int, Field(ge=0, lt=2**62)]
Seconds = Annotated[float, Field(allow_inf_nan=False)]
Time = Annotated[float, Field(ge=0, le=1e11, allow_inf_nan=False)]  # datetime.fromtimestamp takes no more


@dataclass(frozen=True)
class Loss:
    """A failure during the run, and its cost.

    at: seconds since 1970. what: shown to the user. steps_repeated, seconds_repeated: training done twice.
    shards_repeated: extracted twice. recovery_seconds: between the last progress before and the first after; None until
    then.
    """

    at: Time
    what: str
    steps_repeated: Count = 0
    shards_repeated: Count = 0
    seconds_repeated: Seconds = 0.0
    recovery_seconds: Seconds | None = None


class SavedAt(TypedDict):
    """A checkpoint. at: seconds since 1970."""

    round: Count
    step: Count
    at: Time


@dataclass(frozen=True)
class Status:
    """A snapshot of a run.

    phase: starting, extracting, clustering, training, evaluating, finished, stopped or failed. round: the current one,
    counted from 0, of `rounds`. step: completed ones of the `steps` of this round. done, total: images of the phase.
    workers: size of the worker group. processes: {"job", "train" or "features": ["host:pid", ...]}. started_at,
    updated_at: seconds since 1970, of the whole run and of this file. seconds_left: estimate, None before there is one.
    worker_seconds: paid so far. worker_seconds_per_epoch: None before the first epoch is complete. skipped: images.
    note: what the run waits for or recovers from, "" if nothing. saved: the newest checkpoint of this job. lost:
    failures in order.
    """

    phase: str = "starting"
    round: Count = 0
    rounds: Count = 0
    step: Count = 0
    steps: Count = 0
    done: Count = 0
    total: Count = 0
    workers: Count = 0
    processes: dict[str, list[str]] = field(default_factory=dict)
    started_at: Time = 0.0
    updated_at: Time = 0.0
    seconds_left: Seconds | None = None
    worker_seconds: Seconds = 0.0
    worker_seconds_per_epoch: Seconds | None = None
    skipped: Count = 0
    note: str = ""
    saved: SavedAt | None = None
    lost: tuple[Loss, ...] = ()


_STATUS = TypeAdapter(Status)


def read_status(run_dir: str) -> Status | None:
    """The status of a run, or None if it has none. Unknown fields (of a later version) are ignored.

    Raises UserError if status.json is damaged.
    """
    uri = RunPaths(run_dir).status
    if not storage.exists(uri):
        return None
    try:
        return _STATUS.validate_json(storage.read_bytes(uri))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{uri} is damaged: {f'{place}: ' if place else ''}{first['msg']}; a running job replaces it within "
            "seconds, else delete it"
        ) from None


def write_status(run_dir: str, status: Status) -> None:
    """Replace the status of a run atomically."""
    storage.write_bytes(RunPaths(run_dir).status, json.dumps(asdict(status), indent=1).encode())
