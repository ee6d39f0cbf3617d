"""Decisions from observations: tables, without Ray, clock or files."""

from __future__ import annotations

from dataclasses import replace

import pytest

from raycluster.io.retry import next_pause
from raycluster.run.policy import (
    ClusterObservation,
    Failure,
    LeaseObservation,
    RestartDecision,
    after_failure,
    decide_checkpoint,
    decide_lease,
    initial_request,
    next_request,
    steps_until_poll,
)

CALM = ClusterObservation(unsaved_seconds=100, checkpoint_seconds=600, saving_seconds=1)


@pytest.mark.parametrize(
    ("changes", "save", "then"),
    [
        ({}, "no", "continue"),
        ({"unsaved_seconds": 600}, "async", "continue"),
        ({"unsaved_seconds": 600, "saving": True}, "no", "continue"),
        ({"stop": True}, "blocking", "stop"),
        ({"stop": True, "saving": True}, "blocking", "stop"),
        ({"resize": True}, "blocking", "wait_for_restart"),
        ({"stop": True, "resize": True, "notice_seconds": 60.0}, "blocking", "stop"),
        ({"notice_seconds": 60.0}, "blocking", "continue"),
        ({"notice_seconds": 60.0, "saved_since_notice": True, "unsaved_seconds": 3}, "no", "continue"),
        ({"notice_seconds": 60.0, "saved_since_notice": True, "unsaved_seconds": 15}, "async", "continue"),
        ({"notice_seconds": 60.0, "saved_since_notice": True, "unsaved_seconds": 15, "saving": True}, "no", "continue"),
        ({"notice_seconds": 5.0, "saved_since_notice": True, "unsaved_seconds": 1}, "blocking", "wait_for_restart"),
        ({"notice_seconds": 5.0}, "blocking", "wait_for_restart"),
        ({"notice_seconds": 25.0, "saving_seconds": 10.0, "saved_since_notice": True}, "blocking", "wait_for_restart"),
        ({"notice_seconds": 0.0, "resize": True}, "blocking", "wait_for_restart"),
    ],
)
def test_between_two_steps(changes: dict, save: str, then: str) -> None:
    decision = decide_checkpoint(replace(CALM, **changes))
    assert (decision.save, decision.then) == (save, then)
    assert bool(decision.why) == (save != "no")


@pytest.mark.parametrize(("seconds_per_step", "steps"), [(0.0, 8), (0.01, 8), (0.125, 8), (0.3, 3), (0.9, 1), (5.0, 1)])
def test_slow_steps_are_polled_more_often(seconds_per_step: float, steps: int) -> None:
    assert steps_until_poll(seconds_per_step) == steps


@pytest.mark.parametrize(
    ("failure", "restart"),
    [
        (Failure("worker", failures=1, forgiven=0), False),
        (Failure("worker", failures=1, forgiven=1), True),
        (Failure("worker", failures=2, forgiven=1), False),
        (Failure("preemption", failures=5, forgiven=0), True),
        (Failure("start", failures=5, forgiven=0), True),
    ],
)
def test_after_a_failure(failure: Failure, restart: bool) -> None:
    assert after_failure(failure).restart == restart


def test_a_limit_that_is_reached_is_named() -> None:
    assert after_failure(Failure("worker", 3, 2)) == RestartDecision(
        False, "training workers were lost 3 times; 2 times are allowed"
    )


def test_pauses_grow_until_the_limit() -> None:
    waited, pauses = 0.0, []
    while (pause := next_pause(len(pauses), waited, 120.0)) is not None:
        pauses.append(pause)
        waited += pause
    assert pauses == [1, 2, 4, 8, 16, 30, 30, 29]
    assert next_pause(0, 0.0, 0.0) is None


@pytest.mark.parametrize(
    ("observation", "decision"),
    [
        (LeaseObservation(alive=True, age_seconds=0), "refuse"),
        (LeaseObservation(alive=True, age_seconds=10_000), "refuse"),
        (LeaseObservation(alive=False, age_seconds=0), "take"),
        (LeaseObservation(alive=None, age_seconds=5), "wait"),
        (LeaseObservation(alive=None, age_seconds=-300), "wait"),
        (LeaseObservation(alive=None, age_seconds=5, watched_seconds=11, heartbeat_seen=True), "refuse"),
        (LeaseObservation(alive=None, age_seconds=65, watched_seconds=59), "wait"),
        (LeaseObservation(alive=None, age_seconds=65, watched_seconds=61), "take"),
        (LeaseObservation(alive=None, age_seconds=601), "take"),
    ],
)
def test_whether_a_run_directory_may_be_taken(observation: LeaseObservation, decision: str) -> None:
    assert decide_lease(observation) == decision


@pytest.mark.parametrize(("most", "limit"), [(64, 10), (64, 1), (64, 63), (2, 1), (3, 0), (8, 8), (5, 100), (1, 1)])
def test_bisection_finds_the_largest_feasible_request(most: int, limit: int) -> None:
    """A refusal shows at the next poll, feasibility only after `REQUEST_SECONDS`."""
    request = initial_request(most, 0.0)
    for now in range(2, 200, 2):
        request = next_request(request, most, refused=request.asked > limit, now=now, retry_seconds=1e9)
    assert request.asked == max(1, min(most, limit))


def test_the_maximum_is_requested_again_after_a_while() -> None:
    request = initial_request(8, 0.0)
    for now in range(0, 200, 2):
        request = next_request(request, 8, refused=request.asked > 3, now=now, retry_seconds=1e9)
    assert request.asked == 3
    assert next_request(request, 8, refused=False, now=request.since + 500, retry_seconds=600).asked == 3
    again = next_request(request, 8, refused=False, now=request.since + 600, retry_seconds=600)
    assert (again.asked, again.possible) == (8, 0)
