"""When nothing moves: what is wrong, and what to do. Ray itself waits in silence."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import ray
from ray.exceptions import RayError

SECONDS_UNTIL_NOTICE = 60.0  # without workers; an autoscaler may take minutes, but should be known to be waited for
SECONDS_STARTING = 240.0  # in which the workers themselves hold what they need, and import torch
SECONDS_STARVING = 120.0  # without an image, where images are waited for
SECONDS_SILENT = 600.0  # without any sign of work


@dataclass(frozen=True)
class RunObservation:
    """What the job sees of a run that does not move.

    phase: of the last event. seconds: since it. workers: at work, 0 while there is no group. slot: the resource a
    worker takes, `least` of which are wanted. total, free: resources of the cluster.
    """

    phase: str
    seconds: float
    workers: int
    slot: str
    least: int
    total: dict[str, float] = field(default_factory=dict)
    free: dict[str, float] = field(default_factory=dict)


def diagnose(observation: RunObservation) -> str:
    """What is wrong and what to do, in a sentence; "" while there is no reason to worry."""
    total, free = (resources.get(observation.slot, 0.0) for resources in (observation.total, observation.free))
    minutes = f"{observation.seconds / 60:.0f} min"
    if not observation.workers:
        if observation.seconds < SECONDS_UNTIL_NOTICE:
            return ""
        if total < observation.least:
            how = "GPUs" if observation.slot == "GPU" else f"--resources='{{\"{observation.slot}\": 1}}'"
            return (
                f"waiting for machines: run.workers wants at least {observation.least} {observation.slot}, the cluster has "
                f"{total:g}; start nodes with {how}, or stop and go on with fewer run.workers"
            )
        if free < observation.least and observation.seconds > SECONDS_STARTING:
            return (
                f"waiting for workers: of the {total:g} {observation.slot} of the cluster only {free:g} are free. Either the "
                "machines are very slow to start them, or others hold them, for which Ray waits for ever: end the "
                f"other actors and jobs that use {observation.slot}"
            )
        return "waiting for Ray to start the training workers"
    waits_for_images = observation.phase in ("extracting", "training", "evaluating")
    if waits_for_images and observation.seconds > SECONDS_STARVING and observation.free.get("CPU", 0.0) < 1:
        return (
            f"no image has come for {minutes}: none of the {observation.total.get('CPU', 0):g} CPU of the cluster is free "
            "for reading them; end the other actors and jobs that hold them, or add machines"
        )
    if waits_for_images and observation.seconds > SECONDS_SILENT:
        return (
            f"nothing has happened for {minutes} while {observation.phase}; see Ray's dashboard for what tasks wait for"
        )
    return ""


class StallDetector:
    """Remembers the last sign of work, and diagnoses when it is long ago."""

    def __init__(self, slot: str, least: int) -> None:
        self._slot, self._least = slot, least
        self._phase, self._workers, self._at = "starting", 0, time.monotonic()
        self._last = ""

    def record_activity(self, phase: str, workers: int) -> None:
        """There was a sign of work."""
        self._phase, self._workers, self._at = phase, workers, time.monotonic()

    def check(self) -> str | None:
        """A diagnosis that was not given before ("": all is well again), or None."""
        seconds = time.monotonic() - self._at
        total: dict[str, float] = {}
        free: dict[str, float] = {}
        if seconds > SECONDS_UNTIL_NOTICE:
            try:
                total, free = ray.cluster_resources(), ray.available_resources()
            except RayError:
                return None
        found = diagnose(RunObservation(self._phase, seconds, self._workers, self._slot, self._least, total, free))
        said = found.partition(":")[0]  # not again for another number
        if said == self._last:
            return None
        self._last = said
        return found
