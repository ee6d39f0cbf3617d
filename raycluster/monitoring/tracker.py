"""Turns the events of a run into its status.json."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from dataclasses import replace
from typing import Any

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
from raycluster.monitoring.status import Loss, Status, read_status, write_status
from raycluster.types import RunStopped, UserError

SECONDS_BETWEEN_WRITES = 5.0  # a change of phase is written at once
OVER = ("finished", "stopped", "failed")
_KEPT_LOSSES = 1000


class StatusTracker:
    """The status after each event. It reads no clock: every `now` is seconds since 1970.

    before: the last status of an earlier job of the same run, whose failures and cost are carried over.
    """

    def __init__(self, now: float, before: Status | None = None) -> None:
        before = before or Status(started_at=now)
        died = before.phase not in (*OVER, "starting") and before.updated_at > 0
        lost = before.lost + ((Loss(before.updated_at, "the job died"),) if died else ())
        self.status = replace(
            before, phase="starting", workers=0, processes={"job": [this_process()]}, note="", saved=None, lost=lost
        )
        self._open = len(lost) - 1 if died else None  # index of the failure that is not recovered yet
        self._worked_at = before.updated_at if died else now  # time of the last progress
        self._rounds: list[tuple[int, int]] = []
        self._epochs = 0
        self._position = -1  # optimiser steps of the run, -1 if unknown
        self._pace = 0.0  # seconds per step
        self._stepped_at = 0.0
        self._reassigning = 0.0  # seconds per reassignment
        self._phase_began = self._paid_until = now
        self._before = before

    def handle(self, event: Event, now: float) -> None:
        """Update the status."""
        self._pay(now)
        if isinstance(event, Started):
            self._started(event, now)
        elif isinstance(event, Progress):
            self._progress(event, now)
        elif isinstance(event, Round):
            self._round(event, now)
        elif isinstance(event, FailureEvent):
            self._lost(event, now)
        elif isinstance(event, Saved):
            self.status = replace(self.status, saved={"round": event.round, "step": event.step, "at": now})
        elif isinstance(event, StatusNote):
            self.status = replace(self.status, note=event.text)
        elif isinstance(event, Processes):
            self.status = replace(self.status, processes={**self.status.processes, event.part: list(event.names)})
        elif isinstance(event, Finished):
            self._phase("finished", now)

    def end(self, phase: str, note: str, now: float) -> None:
        """The job ends; phase: finished, stopped or failed."""
        self._pay(now)
        self._phase(phase, now)
        self.status = replace(self.status, note=note, workers=0, processes={}, seconds_left=None)

    def at(self, now: float) -> Status:
        """The status, with cost and estimates as of `now`."""
        self._pay(now)
        return replace(self.status, updated_at=now, seconds_left=self._seconds_left())

    def _pay(self, now: float) -> None:
        spent = self.status.worker_seconds + self.status.workers * max(0.0, now - self._paid_until)
        self._paid_until = now
        epochs = self._position * self._epochs / self._rounds[-1][1] if self._rounds and self._position > 0 else 0.0
        per_epoch = spent / epochs if epochs >= 1 else None
        self.status = replace(self.status, worker_seconds=spent, worker_seconds_per_epoch=per_epoch)

    def _started(self, event: Started, now: float) -> None:
        if self._rounds and self._open is None:  # a restart without a known reason
            self._lost(FailureEvent("the training workers were restarted"), now)
        self._rounds, self._epochs = event.rounds, event.epochs
        position = event.rounds[event.round][0] + event.step
        reached = self._position if self._position >= 0 else self._reached_before()
        if self._open is not None:
            self._amend(steps_repeated=max(0, reached - position), seconds_repeated=self._repeated(reached - position))
        self._position = position
        self.status = replace(
            self.status,
            workers=event.num_workers,
            processes={**self.status.processes, "train": list(event.processes)},
            note="",
            **self._place(event.round, event.step),
        )

    def _reached_before(self) -> int:
        before = self._before
        return self._rounds[before.round][0] + before.step if before.round < len(self._rounds) else 0

    def _repeated(self, steps: int) -> float:
        """Seconds of repeated work: of the steps, or of the reassignment that was interrupted."""
        if steps > 0:
            return steps * (self._pace or 0.0)
        return self._worked_at - self._phase_began if self.status.phase == "clustering" else 0.0

    def _place(self, number: int, step: int) -> dict[str, Any]:
        if number >= len(self._rounds):
            return {"round": number, "rounds": len(self._rounds), "step": 0, "steps": 0}
        first, last = self._rounds[number]
        return {"round": number, "rounds": len(self._rounds), "step": step, "steps": last - first}

    def _progress(self, event: Progress, now: float) -> None:
        if event.phase != self.status.phase:
            self._leave(now)
            self._phase(event.phase, now)
        if self._open is not None and not self.status.lost[self._open].shards_repeated:
            self._amend(recovery_seconds=max(0.0, now - self._worked_at))
            self._open = None
        self._worked_at = now
        if event.phase == "training" and self._rounds:  # unless the event of the start was lost with a machine
            first = self._rounds[self.status.round][0]
            steps = first + event.done - self._position
            if steps > 0:
                pace = (now - max(self._phase_began, self._stepped_at)) / steps
                self._pace = pace if not self._pace else 0.9 * self._pace + 0.1 * pace
                self._position, self._stepped_at = first + event.done, now
            self.status = replace(self.status, step=event.done)
        self.status = replace(self.status, done=event.done, total=event.total)

    def _leave(self, now: float) -> None:
        """End the phase: lost shards are restored, and the reassignment time grows."""
        if (
            self.status.phase == "extracting"
            and self._open is not None
            and self.status.lost[self._open].shards_repeated
        ):
            self._amend(seconds_repeated=now - self.status.lost[self._open].at, recovery_seconds=now - self._worked_at)
            self._open = None
        if self.status.phase in ("extracting", "clustering"):
            self._reassigning += now - self._phase_began

    def _phase(self, phase: str, now: float) -> None:
        if phase == "extracting" and self.status.phase != "clustering":
            self._reassigning = 0.0
        self.status = replace(self.status, phase=phase, done=0, total=0)
        self._phase_began = now

    def _round(self, event: Round, now: float) -> None:
        self._position, number = int(event.record["step"]), event.record["round"] + 1
        self._phase("extracting" if number < len(self._rounds) else "evaluating", now)
        self.status = replace(self.status, skipped=int(event.record["num_skipped"]), **self._place(number, 0))

    def _lost(self, event: FailureEvent, now: float) -> None:
        if self._open is not None and not event.shards:
            return  # a consequence of the failure being recovered from
        losses = (*self.status.lost, Loss(now, event.what, shards_repeated=event.shards))[-_KEPT_LOSSES:]
        workers = self.status.workers if event.shards else 0
        self.status = replace(self.status, lost=losses, workers=workers, note=event.what)
        self._open = len(losses) - 1

    def _amend(self, **changes: Any) -> None:
        assert self._open is not None
        losses = list(self.status.lost)
        losses[self._open] = replace(losses[self._open], **changes)
        self.status = replace(self.status, lost=tuple(losses))

    def _seconds_left(self) -> float | None:
        if not self._rounds or not self._pace or self.status.phase in OVER:
            return None
        rounds = len(self._rounds) - 1 - self.status.round
        return (self._rounds[-1][1] - self._position) * self._pace + max(0, rounds) * self._reassigning


class StatusWriter:
    """Keeps status.json up to date from a background thread, so that slow storage does not delay training."""

    def __init__(self, run_dir: str) -> None:
        self._run_dir = run_dir
        try:
            before = read_status(run_dir)
        except UserError:  # damaged: it only informs
            before = None
        self._tracker = StatusTracker(time.time(), before)
        self._lock, self._wake, self._over = threading.Lock(), threading.Event(), False
        self._thread = threading.Thread(target=self._write, name="status", daemon=True)
        self._thread.start()

    def handle(self, event: Event) -> None:
        """Update the status; a change of phase is written at once."""
        with self._lock:
            phase = self._tracker.status.phase
            self._tracker.handle(event, time.time())
            urgent = phase != self._tracker.status.phase or not isinstance(event, (Progress, Saved))
        if urgent:
            self._wake.set()

    def __enter__(self) -> StatusWriter:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        """Write the final status."""
        ended = (
            "finished"
            if error is None
            else "stopped"
            if isinstance(error, (RunStopped, KeyboardInterrupt))
            else "failed"
        )
        with self._lock:
            self._tracker.end(ended, str(error or ""), time.time())
        self._over = True
        self._wake.set()
        self._thread.join(timeout=30)

    def _write(self) -> None:
        while True:
            over = self._over
            self._wake.clear()
            with self._lock:
                status = self._tracker.at(time.time())
            with suppress(UserError):  # the checkpointer reports storage that fails
                write_status(self._run_dir, status)
            if over:
                return
            self._wake.wait(SECONDS_BETWEEN_WRITES)
