"""Decisions about a run: pure functions from an observation to a decision, without Ray, clock or files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

NOTICE_SAVE_SECONDS = 15.0  # between checkpoints after a preemption notice: the deadline may come early
LAST_SAVE_SECONDS = 5.0  # before the deadline the last checkpoint starts at the latest, however fast it is written
POLL_SECONDS = 1.0  # between two polls, unless a step takes longer
MAX_STEPS_BETWEEN_POLLS = 8
REQUEST_SECONDS = 15.0  # an autoscaler polls every 5 seconds, and refuses infeasible requests within this time
LEASE_HEARTBEAT_SECONDS = 10.0
LEASE_EXPIRY_SECONDS = 60.0  # six heartbeats: a bucket that is slow for half a minute must not cost the lease
LEASE_STALE_SECONDS = 600.0  # compares the clocks of two machines, which may differ by minutes


# ---------------------------------------------------------------------------------------------------------- checkpoints


@dataclass(frozen=True)
class ClusterObservation:
    """What rank 0 observes between two steps.

    stop: the job was asked to stop. resize: Ray waits for permission to restart with another number of workers.
    notice_seconds: until a node of the worker group is taken away, None if no node will be. unsaved_seconds: since the
    last checkpoint was begun. saved_since_notice: a checkpoint was begun after the notice. saving: one is being
    written. saving_seconds: duration of the last write. checkpoint_seconds: configured interval.
    """

    stop: bool = False
    resize: bool = False
    notice_seconds: float | None = None
    unsaved_seconds: float = 0.0
    saved_since_notice: bool = False
    saving: bool = False
    saving_seconds: float = 0.0
    checkpoint_seconds: float = 600.0


@dataclass(frozen=True)
class CheckpointDecision:
    """What all workers do next.

    save: `no`, `async` (training continues during the write) or `blocking` (nothing continues before the write is
    complete). then: `continue`, `stop`, or `wait_for_restart` of the worker group. why: shown to the user.
    """

    save: Literal["no", "async", "blocking"] = "no"
    then: Literal["continue", "stop", "wait_for_restart"] = "continue"
    why: str = ""


def decide_checkpoint(observation: ClusterObservation) -> CheckpointDecision:
    """Save before every announced interruption, and at the configured interval."""
    if observation.stop:
        return CheckpointDecision("blocking", "stop", "asked to stop")
    if observation.resize:
        return CheckpointDecision("blocking", "wait_for_restart", "the cluster offers another number of workers")
    interval = observation.checkpoint_seconds
    if observation.notice_seconds is not None:
        if observation.notice_seconds <= max(LAST_SAVE_SECONDS, 3 * observation.saving_seconds):
            return CheckpointDecision("blocking", "wait_for_restart", "a node is about to be taken away")
        if not observation.saved_since_notice:
            why = f"a node is taken away in {observation.notice_seconds:.0f} s"
            return CheckpointDecision("blocking", "continue", why)
        interval = min(interval, NOTICE_SAVE_SECONDS)
    if observation.unsaved_seconds >= interval and not observation.saving:
        return CheckpointDecision("async", "continue", "checkpoint interval")
    return CheckpointDecision()


def steps_until_poll(seconds_per_step: float) -> int:
    """Steps until the next poll: a poll costs a message, and a notice may be as short as 30 s."""
    return max(1, min(MAX_STEPS_BETWEEN_POLLS, int(POLL_SECONDS / max(seconds_per_step, 1e-9))))


# ------------------------------------------------------------------------------------------------------------- failures


@dataclass(frozen=True)
class Failure:
    """The group of training workers ended before its work was complete.

    kind: `worker` (a process or its node died, or raised), `preemption` (announced), `start` (the group could not be
    placed in time). failures: worker failures so far, this one included. forgiven: the configured limit.
    """

    kind: Literal["worker", "preemption", "start"]
    failures: int = 0
    forgiven: int = 0


@dataclass(frozen=True)
class RestartDecision:
    """Whether to restart the group. why: shown to the user, "" for nothing."""

    restart: bool
    why: str = ""


def after_failure(failure: Failure) -> RestartDecision:
    """Worker failures are limited; announced preemptions and waiting for nodes are not."""
    if failure.kind == "preemption":
        return RestartDecision(True, "a node was preempted as announced")
    if failure.kind == "start":
        return RestartDecision(True)
    if failure.failures <= failure.forgiven:
        return RestartDecision(True, "a training worker was lost")
    return RestartDecision(
        False, f"training workers were lost {failure.failures} times; {failure.forgiven} times are allowed"
    )


# ---------------------------------------------------------------------------------------------------- resource requests


@dataclass(frozen=True)
class ResourceRequest:
    """How many workers an autoscaler is asked for. Infeasible requests bring nothing, so we bisect.

    asked: now. possible: the largest request not refused. refused: the smallest one refused. since: seconds, when this
    request was first made.
    """

    asked: int
    possible: int
    refused: int
    since: float


def initial_request(most: int, now: float) -> ResourceRequest:
    """Request the configured maximum."""
    return ResourceRequest(most, 0, most + 1, now)


def next_request(
    request: ResourceRequest, most: int, *, refused: bool, now: float, retry_seconds: float
) -> ResourceRequest:
    """Bisect between refused and feasible requests; after `retry_seconds` start again, as clusters are reconfigured.

    refused: whether the current request is infeasible now.
    """
    asked = request.asked
    if refused:
        request = ResourceRequest(asked, min(request.possible, asked - 1), asked, request.since)
    elif now - request.since < REQUEST_SECONDS:
        return request
    elif request.refused <= most and now - request.since >= retry_seconds and asked + 1 >= request.refused:
        return initial_request(most, now)
    else:
        request = ResourceRequest(asked, max(request.possible, asked), max(request.refused, asked + 1), request.since)
    middle = max(1, (request.possible + request.refused) // 2)
    return request if middle == asked else ResourceRequest(middle, request.possible, request.refused, now)


# ---------------------------------------------------------------------------------------------------------------- lease


@dataclass(frozen=True)
class LeaseObservation:
    """The lease of another job on the run directory, as seen by the job that wants it.

    alive: whether the other process lives, None if it is on another machine. age_seconds: since its last heartbeat, by
    the clocks of both machines. watched_seconds: for how long this job has watched. heartbeat_seen: in that time.
    """

    alive: bool | None
    age_seconds: float
    watched_seconds: float = 0.0
    heartbeat_seen: bool = False


def decide_lease(observation: LeaseObservation) -> Literal["take", "wait", "refuse"]:
    """Whether a job may take the run directory over from the last holder of its lease."""
    if observation.alive is not None:
        return "refuse" if observation.alive else "take"
    if observation.heartbeat_seen:
        return "refuse"
    if observation.age_seconds > LEASE_STALE_SECONDS or observation.watched_seconds > LEASE_EXPIRY_SECONDS:
        return "take"
    return "wait"
