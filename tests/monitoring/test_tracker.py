"""The status after each event of a run, worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from raycluster.events import (
    Event,
    FailureEvent,
    Finished,
    Processes,
    Progress,
    Round,
    Saved,
    Started,
    StatusNote,
    this_process,
)
from raycluster.monitoring.status import Status, read_status, write_status
from raycluster.monitoring.tracker import StatusTracker, StatusWriter
from raycluster.types import RunStopped

ROUNDS = [(0, 100), (100, 200)]


def started(number: int = 0, step: int = 0, workers: int = 2) -> Started:
    return Started(1000, ROUNDS, number, step, 4, tuple(f"host:{rank}" for rank in range(workers)))


def training(step: int) -> Progress:
    return Progress("training", step, 100)


def tracked(*events: tuple[float, Event], before: Status | None = None) -> tuple[StatusTracker, Status]:
    tracker = StatusTracker(0.0, before)
    for now, event in events:
        tracker.handle(event, now)
    return tracker, tracker.at(events[-1][0])


def test_an_undisturbed_run() -> None:
    first = [(10.0, started()), (10.0, Progress("extracting", 0, 500)), (20.0, Progress("clustering", 0, 1))]
    steps = [(30.0 + step, training(step)) for step in range(1, 51)]
    tracker, status = tracked(*first, *steps)
    assert (status.phase, status.round, status.rounds, status.step, status.steps) == ("training", 0, 2, 50, 100)
    assert status.workers == 2 and status.processes["train"] == ["host:0", "host:1"]
    assert status.lost == () and status.worker_seconds == 2 * (80 - 10)
    assert status.worker_seconds_per_epoch == 140, "50 of 100 steps are one of two epochs of the first round"
    assert status.seconds_left == pytest.approx(150 * 1.0 + 21, rel=0.05), "150 steps and one more reassignment"
    tracker.handle(Saved(0, 50), 80.0)
    tracker.handle(Round({"round": 0, "step": 100, "num_skipped": 3}), 130.0)
    status = tracker.at(130.0)
    assert (status.phase, status.round, status.step, status.skipped) == ("extracting", 1, 0, 3)
    assert status.saved == {"round": 0, "step": 50, "at": 80.0}
    tracker.handle(Finished({}), 200.0)
    tracker.end("finished", "", 200.0)
    assert (tracker.at(200.0).phase, tracker.at(300.0).worker_seconds) == ("finished", 2 * 190)


def test_a_lost_worker_costs_the_steps_since_the_checkpoint() -> None:
    steps = [(10.0 + step, training(step)) for step in range(1, 31)]
    tracker, status = tracked((10.0, started()), *steps, (42.0, FailureEvent("a training worker was lost")))
    assert status.workers == 0 and status.note == "a training worker was lost"
    tracker.handle(started(0, 24, workers=1), 55.0)
    tracker.handle(training(25), 58.0)
    status = tracker.at(58.0)
    (loss,) = status.lost
    assert (loss.at, loss.steps_repeated) == (42.0, 6)
    assert loss.seconds_repeated == pytest.approx(6.0)
    assert loss.recovery_seconds == 58.0 - 40.0, "from the last step before to the first one after"
    assert status.workers == 1 and status.note == "" and status.worker_seconds == 2 * 32 + 3


def test_consequences_of_a_loss_are_not_counted_again() -> None:
    _, status = tracked(
        (1.0, started()),
        (2.0, training(1)),
        (3.0, FailureEvent("a worker")),
        (4.0, FailureEvent("another")),
        (9.0, started()),
    )
    assert [loss.what for loss in status.lost] == ["a worker"]


def test_a_restart_that_nobody_announced_is_one() -> None:
    _, status = tracked((1.0, started()), (2.0, training(1)), (9.0, started()))
    assert [(loss.what, loss.steps_repeated) for loss in status.lost] == [("the training workers were restarted", 1)]


def test_lost_shards_are_repeated_until_all_are_there_again() -> None:
    events = [(1.0, started()), (2.0, Progress("extracting", 100, 100)), (3.0, Progress("clustering", 0, 1))]
    lost = [
        (5.0, FailureEvent("3 shards", 3)),
        (6.0, Progress("extracting", 30, 30)),
        (7.5, Progress("clustering", 0, 1)),
    ]
    _, status = tracked(*events, *lost)
    (loss,) = status.lost
    assert (loss.shards_repeated, loss.steps_repeated, loss.seconds_repeated) == (3, 0, 2.5)
    assert status.workers == 2, "the workers live"


def test_a_job_that_died_is_a_loss_of_the_next_one() -> None:
    steps = [(float(step), training(step)) for step in range(1, 31)]
    _, died = tracked((0.0, started()), *steps)
    tracker = StatusTracker(100.0, died)
    tracker.handle(started(0, 20), 120.0)
    tracker.handle(training(21), 121.0)
    status = tracker.at(121.0)
    (loss,) = status.lost
    assert (loss.what, loss.at, loss.steps_repeated, loss.recovery_seconds) == ("the job died", 30.0, 10, 91.0)
    assert status.started_at == died.started_at and status.worker_seconds > died.worker_seconds


def test_a_job_that_stopped_is_none() -> None:
    tracker, _ = tracked((0.0, started()), (1.0, training(1)))
    tracker.end("stopped", "asked to", 2.0)
    after = StatusTracker(10.0, tracker.at(2.0))
    after.handle(started(0, 1), 20.0)
    assert after.at(20.0).lost == ()


def test_progress_is_shown_if_the_start_was_lost() -> None:
    tracker = StatusTracker(0.0, Status())
    tracker.handle(Progress("training", 3, 10), 1.0)
    status = tracker.at(2.0)
    assert (status.phase, status.done, status.total) == ("training", 3, 10)


def test_notes_and_processes_come_through() -> None:
    tracker, status = tracked((0.0, StatusNote("the disk is full")), (1.0, Processes("features", ("host:7",))))
    assert status.note == "the disk is full"
    assert status.processes == {"job": [this_process()], "features": ["host:7"]}
    tracker.handle(StatusNote(""), 2.0)
    assert tracker.at(2.0).note == ""


def test_the_file_says_how_it_ended_and_is_read_by_later_versions(tmp_path: Path) -> None:
    with pytest.raises(RunStopped), StatusWriter(str(tmp_path)) as status_writer:
        status_writer.handle(started())
        raise RunStopped("stopped in round 1")
    status = read_status(str(tmp_path))
    assert status is not None and (status.phase, status.note) == ("stopped", "stopped in round 1")
    text = (tmp_path / "status.json").read_text()
    (tmp_path / "status.json").write_text(text.replace("{", '{"of_a_later_version": 1,', 1))
    assert read_status(str(tmp_path)) == status
    write_status(str(tmp_path / "other"), status)
    assert read_status(str(tmp_path / "other")) == status
    assert read_status(str(tmp_path / "nothing")) is None
