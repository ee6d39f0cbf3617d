"""What to do when something happens to a run: plain functions from what is seen to what is done; no Ray, no clock."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

NOTICE_SAVE_SECONDS = 15.0  # between checkpoints once a machine is known to go: its deadline may come early
LAST_SAVE_SECONDS = 5.0  # before the deadline the last checkpoint must have begun, however quickly it can be written
POLL_SECONDS = 1.0  # between two looks around, if the steps are not longer
MAX_STEPS_BETWEEN_POLLS = 8  # at most between two looks around
REQUEST_SECONDS = 15.0  # in which an autoscaler, which looks every 5 seconds, refuses what it can never bring
LEASE_HEARTBEAT_SECONDS = 10.0
LEASE_EXPIRY_SECONDS = 60.0  # six beats: a bucket that is slow for half a minute must not cost the lease
LEASE_STALE_SECONDS = 600.0  # by the clocks of two machines, which may disagree by minutes


# ---------------------------------------------------------------------------------------------------- between two steps


@dataclass(frozen=True)
class ClusterObservation:
    """What the first worker sees between two steps.

    stop: somebody asked the job to stop. resize: Ray waits for our leave to restart the workers in another number.
    notice_seconds: until a machine of the group goes away, None if none will. unsaved_seconds: of work since the last
    checkpoint was begun. saved_since_notice: a checkpoint was taken since then. saving: one is being written.
    saving_seconds: what the last one took to write. checkpoint_seconds: what the settings want between two.
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
class Move:
    """What all workers do next.

    save: `no`, `meanwhile` (the steps go on while it is written) or `first` (nothing goes on before it is written).
    then: `go on`, `stop`, or `wait` for the end of this group of workers. why: for people.
    """

    save: Literal["no", "meanwhile", "first"] = "no"
    then: Literal["go on", "stop", "wait"] = "go on"
    why: str = ""


def decide_checkpoint(sight: ClusterObservation) -> Move:
    """Save in time for whatever is coming, and do nothing that would be lost."""
    if sight.stop:
        return Move("first", "stop", "asked to stop")
    if sight.resize:
        return Move("first", "wait", "the cluster offers another number of workers")
    often = sight.checkpoint_seconds
    if sight.notice_seconds is not None:
        if sight.notice_seconds <= max(LAST_SAVE_SECONDS, 3 * sight.saving_seconds):
            return Move("first", "wait", "a machine is about to go away")
        if not sight.saved_since_notice:
            return Move("first", "go on", f"a machine goes away in {sight.notice_seconds:.0f} s")
        often = min(often, NOTICE_SAVE_SECONDS)
    if sight.unsaved_seconds >= often and not sight.saving:
        return Move("meanwhile", "go on", "it is time")
    return Move()


def steps_until_poll(seconds_per_step: float) -> int:
    """How many steps to make before looking around again: looking costs a message, a notice may be half a minute."""
    return max(1, min(MAX_STEPS_BETWEEN_POLLS, int(POLL_SECONDS / max(seconds_per_step, 1e-9))))


# --------------------------------------------------------------------------------------------------------------- losses


@dataclass(frozen=True)
class Failure:
    """The group of training workers ended before its work was done.

    kind: `worker` (a process or its machine died, or an exception came out), `preemption` (announced), `start` (no
    place for the group in time). failures: of workers so far, this one included. forgiven: how many the settings
    forgive.
    """

    kind: Literal["worker", "preemption", "start"]
    failures: int = 0
    forgiven: int = 0


@dataclass(frozen=True)
class RestartDecision:
    """Whether to start the group again, and what to tell people ("": nothing)."""

    restart: bool
    why: str = ""


def after_failure(failure: Failure) -> RestartDecision:
    """Machines may come and go as announced, and be waited for, as often as they like; losses have a limit."""
    if failure.kind == "preemption":
        return RestartDecision(True, "a machine went away as announced")
    if failure.kind == "start":
        return RestartDecision(True)
    if failure.failures <= failure.forgiven:
        return RestartDecision(True, "a training worker was lost")
    return RestartDecision(
        False, f"training workers were lost {failure.failures} times; {failure.forgiven} are forgiven"
    )


def pool_size(wanted: int, nodes: int) -> int:
    """Actors of the feature pool. wanted: what the settings say, 0 for one on every node."""
    return wanted or max(1, nodes)


# --------------------------------------------------------------------------------------------------------------- demand


@dataclass(frozen=True)
class ResourceRequest:
    """How many workers an autoscaler is asked for. It brings all or none of what could never be, so it is searched out.

    asked: now. possible: the most that was not refused. refused: the fewest that was. since: seconds, when first asked.
    """

    asked: int
    possible: int
    refused: int
    since: float


def initial_request(most: int, now: float) -> ResourceRequest:
    """Ask for all that the settings allow."""
    return ResourceRequest(most, 0, most + 1, now)


def next_request(
    wish: ResourceRequest, most: int, *, refused: bool, now: float, retry_seconds: float
) -> ResourceRequest:
    """Halve the gap between what is refused and what is not; later ask for all again, for clusters are reconfigured."""
    if refused:
        wish = ResourceRequest(wish.asked, min(wish.possible, wish.asked - 1), wish.asked, wish.since)
    elif now - wish.since < REQUEST_SECONDS:
        return wish
    elif wish.refused <= most and now - wish.since >= retry_seconds and wish.asked + 1 >= wish.refused:
        return initial_request(most, now)
    else:
        wish = ResourceRequest(
            wish.asked, max(wish.possible, wish.asked), max(wish.refused, wish.asked + 1), wish.since
        )
    asked = max(1, (wish.possible + wish.refused) // 2)
    return wish if asked == wish.asked else ResourceRequest(asked, wish.possible, wish.refused, now)


# ---------------------------------------------------------------------------------------------------------------- lease


@dataclass(frozen=True)
class LeaseObservation:
    """The lease of another job on the run directory, as the claimant sees it.

    alive: whether its process lives, None if it is on another machine. age_seconds: since its last heartbeat, by the
    clocks of both machines. watched_seconds: for how long the claimant has seen no heartbeat.
    """

    alive: bool | None
    age_seconds: float
    watched_seconds: float = 0.0
    beats: bool = False


def decide_lease(claim: LeaseObservation) -> Literal["take", "wait", "refuse"]:
    """Whether a claimant may take the run directory from the job that held it last."""
    if claim.alive is not None:
        return "refuse" if claim.alive else "take"
    if claim.beats:
        return "refuse"
    if claim.age_seconds > LEASE_STALE_SECONDS or claim.watched_seconds > LEASE_EXPIRY_SECONDS:
        return "take"
    return "wait"
