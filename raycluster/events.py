"""Events that a run emits. Listeners need neither torch nor Ray."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from typing import Any, NamedTuple


class Progress(NamedTuple):
    """Progress of a phase: `done` of `total` images, and a note on it."""

    phase: str
    done: int
    total: int
    note: str = ""


class FailureEvent(NamedTuple):
    """Lost work that is being recovered. shards: of features that are extracted again."""

    what: str
    shards: int = 0


@dataclass(frozen=True)
class Started:
    """The run starts or resumes after `step` steps of round `round`.

    rounds: (first step, step after the last) of every round; the last ends with epoch `epochs`. processes: of the
    training workers.
    """

    num_samples: int
    rounds: list[tuple[int, int]]
    round: int
    step: int
    epochs: int
    processes: tuple[str, ...]

    @property
    def num_workers(self) -> int:
        """Number of training workers."""
        return len(self.processes)


@dataclass(frozen=True)
class Saved:
    """A checkpoint of this round and step is being written."""

    round: int
    step: int


@dataclass(frozen=True)
class StatusNote:
    """A message on what the run waits for or recovers from; "" clears it."""

    text: str


@dataclass(frozen=True)
class Processes:
    """The processes ("host:pid") of one part of the run: `job`, `train` or `features`."""

    part: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Round:
    """End of a round, with its line of metrics.jsonl."""

    record: dict[str, Any]


@dataclass(frozen=True)
class Finished:
    """End of the run, with its report."""

    report: dict[str, Any]


Event = Started | Progress | Round | Finished | Saved | StatusNote | FailureEvent | Processes


def this_process() -> str:
    """The name of this process in a status: "host:pid"."""
    return f"{socket.gethostname()}:{os.getpid()}"
