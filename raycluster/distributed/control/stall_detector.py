"""Diagnoses a run that makes no progress. Ray itself waits without a message."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field

import ray
from ray.exceptions import RayError

SECONDS_WITHOUT_WORKERS = 60.0  # an autoscaler may take minutes, but the user should know what is waited for
SECONDS_STARTING = 240.0  # in which workers occupy their resources, but still import torch
SECONDS_WITHOUT_IMAGES = 120.0  # in a phase that reads images
SECONDS_WITHOUT_EVENTS = 600.0


@dataclass(frozen=True)
class RunObservation:
    """What the job observes of a run without events.

    phase: of the last event. seconds: since that event. workers: in the current group, 0 if there is none. slot: the
    resource of which every worker takes one. least: workers needed to start. total, free: resources of the cluster.
    """

    phase: str
    seconds: float
    workers: int
    slot: str
    least: int
    total: dict[str, float] = field(default_factory=dict)
    free: dict[str, float] = field(default_factory=dict)


def diagnose(observation: RunObservation) -> str:
    """The likely cause and its remedy, in a sentence; "" while the run may be healthy."""
    return _waiting_for_workers(observation) if not observation.workers else _waiting_for_events(observation)


def _waiting_for_workers(observation: RunObservation) -> str:
    slot, least = observation.slot, observation.least
    total, free = (resources.get(slot, 0.0) for resources in (observation.total, observation.free))
    if observation.seconds < SECONDS_WITHOUT_WORKERS:
        return ""
    if total < least:
        how = "GPUs" if slot == "GPU" else f"--resources='{{\"{slot}\": 1}}'"
        return (
            f"waiting for nodes: run.workers needs at least {least} {slot}, the cluster has {total:g}; "
            f"start nodes with {how}, or stop and resume with fewer run.workers"
        )
    if free < least and observation.seconds > SECONDS_STARTING:
        return (
            f"waiting for workers: of the {total:g} {slot} of the cluster only {free:g} are free. Either the nodes are "
            "very slow to start them, or other jobs hold the rest, and Ray waits without limit: end the other actors "
            f"and jobs that use {slot}"
        )
    return "waiting for Ray to start the training workers"


def _waiting_for_events(observation: RunObservation) -> str:
    if observation.phase not in ("extracting", "training", "evaluating"):
        return ""
    minutes = f"{observation.seconds / 60:.0f} min"
    if observation.seconds > SECONDS_WITHOUT_IMAGES and observation.free.get("CPU", 0.0) < 1:
        return (
            f"no image has been read for {minutes}: none of the {observation.total.get('CPU', 0):g} CPUs of the "
            "cluster is free to decode; end the other actors and jobs that hold them, or add nodes"
        )
    if observation.seconds > SECONDS_WITHOUT_EVENTS:
        return f"no progress for {minutes} while {observation.phase}; Ray's dashboard shows what the tasks wait for"
    return ""


class StallDetector:
    """Remembers when the run was last active, and diagnoses it when that is too long ago."""

    def __init__(self, slot: str, least: int) -> None:
        self._slot, self._least = slot, least
        self._phase, self._workers, self._active_at = "starting", 0, time.monotonic()
        self._last = ""

    def record_activity(self, phase: str, workers: int) -> None:
        """Call for every event of the run."""
        self._phase, self._workers, self._active_at = phase, workers, time.monotonic()

    def check(self) -> str | None:
        """A new diagnosis, "" when the run has recovered, None if nothing changed."""
        seconds = time.monotonic() - self._active_at
        total: dict[str, float] = {}
        free: dict[str, float] = {}
        if seconds > SECONDS_WITHOUT_WORKERS:
            try:
                total, free = ray.cluster_resources(), ray.available_resources()
            except RayError:
                return None
        found = diagnose(RunObservation(self._phase, seconds, self._workers, self._slot, self._least, total, free))
        cause = re.sub(r"\d+(\.\d+)?", "", found)  # not repeated when only numbers change
        if cause == self._last:
            return None
        self._last = cause
        return found
