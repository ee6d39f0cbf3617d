"""What a run tells of itself while it goes on; whoever listens needs neither torch nor Ray."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from typing import Any, NamedTuple


class Progress(NamedTuple):
    """How far a phase is: `done` of `total` images, and what the phase has to say."""

    phase: str
    done: int
    total: int
    note: str = ""


class FailureEvent(NamedTuple):
    """Something went away that is being made good. shards: of features that are extracted again."""

    what: str
    shards: int = 0


@dataclass(frozen=True)
class Started:
    """The run begins or goes on: `step` steps of its round are done.

    rounds: (first step, step after the last) of every round; the last ends with epoch `epochs`. processes: of those
    that share the work now.
    """

    num_samples: int
    rounds: list[tuple[int, int]]
    round: int
    step: int
    epochs: int
    processes: tuple[str, ...]

    @property
    def num_workers(self) -> int:
        """How many share the work now."""
        return len(self.processes)


@dataclass(frozen=True)
class Saved:
    """A checkpoint of this place was begun."""

    round: int
    step: int


@dataclass(frozen=True)
class StatusNote:
    """What the run waits for, struggles with or expects, for people; "" when that is over."""

    text: str


@dataclass(frozen=True)
class Processes:
    """Which processes ("host:pid") play a part of the run: `job`, `train` or `features`."""

    part: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Round:
    """A round is over: its line of metrics.jsonl."""

    record: dict[str, Any]


@dataclass(frozen=True)
class Finished:
    """The run is over: what it learned."""

    report: dict[str, Any]


Event = Started | Progress | Round | Finished | Saved | StatusNote | FailureEvent | Processes


def this_process() -> str:
    """What a process is called in a status: "host:pid"."""
    return f"{socket.gethostname()}:{os.getpid()}"
