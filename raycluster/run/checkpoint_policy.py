"""Between two steps: poll the cluster, agree on a decision with all workers, and carry it out."""

from __future__ import annotations

import time
from collections.abc import Iterator

from raycluster.events import Saved, StatusNote
from raycluster.features.extraction import SkippedImage
from raycluster.features.online import KEPT_EPOCHS, prune
from raycluster.io.run_paths import RunPaths
from raycluster.run.checkpoint import list_places
from raycluster.run.policy import CheckpointDecision, ClusterObservation, decide_checkpoint, steps_until_poll
from raycluster.run.state import Run, State, save
from raycluster.runtime.workers import PendingChange
from raycluster.types import RunStopped

RESTART_SECONDS = 60.0  # to wait for the restart of a worker group before training continues


class CheckpointPolicy:
    """Saves, stops and allows restarts in time. Every worker calls it after each of its steps."""

    def __init__(self, run: Run, state: State) -> None:
        self._run, self._state = run, state
        self._steps = 1  # until the next poll
        self._noticed_at: float | None = None

    def after_step(self) -> Iterator[Saved | StatusNote]:
        """Poll if it is time to. Collective. Raises RunStopped once everything is saved."""
        self._steps -= 1
        if self._steps > 0:
            return
        workers, state = self._run.workers, self._state
        decision, self._steps = workers.run_on_rank_zero(self._decide, workers.pending_change())
        if decision.save != "no":
            yield from self._save(blocking=decision.save == "blocking")
        if decision.then == "stop":
            raise RunStopped(f"stopped in round {state.round + 1}; the same command resumes from there")
        if decision.then == "wait_for_restart":
            yield StatusNote(f"{decision.why}: saved, waiting for the worker group to restart")
            workers.wait_for_restart(RESTART_SECONDS)
            yield StatusNote("")
        elif decision.save == "blocking":
            yield StatusNote(f"{decision.why}: saved")

    def _decide(self, pending_change: PendingChange) -> tuple[CheckpointDecision, int]:
        """(decision, steps until the next poll); on rank 0."""
        now, checkpointer = time.monotonic(), self._run.checkpointer
        if pending_change.notice_seconds is None:
            self._noticed_at = None
        elif self._noticed_at is None:
            self._noticed_at = now
        observation = ClusterObservation(
            stop=self._run.workers.stopping(),
            resize=pending_change.resize,
            notice_seconds=pending_change.notice_seconds,
            unsaved_seconds=now - checkpointer.begun_at,
            saved_since_notice=self._noticed_at is not None and checkpointer.begun_at >= self._noticed_at,
            saving=checkpointer.busy(),
            saving_seconds=checkpointer.seconds,
            checkpoint_seconds=60 * self._run.config.run.checkpoint_minutes,
        )
        sums = self._state.running_sums
        return decide_checkpoint(observation), steps_until_poll(sums["seconds_training"] / max(1.0, sums["steps"]))

    def _save(self, *, blocking: bool) -> Iterator[Saved]:
        run, state = self._run, self._state
        checkpoint(run, state)
        if blocking:
            run.workers.run_on_rank_zero(run.checkpointer.wait)
        yield Saved(state.round, state.step)


def checkpoint(run: Run, state: State) -> None:
    """Begin to write all that it takes to resume from here. Collective."""
    skipped = sync_skipped(run, state)
    if state.online_features is not None:
        state.online_features.write(run.position(state.round, state.step))
        run.workers.run_on_rank_zero(_prune_online_features, run)
    run.workers.run_on_rank_zero(save, run, state, skipped)


def _prune_online_features(run: Run) -> None:
    """Delete features that no kept checkpoint needs."""
    kept = [run.position(*place) for place in list_places(run.config.run.dir)]
    stop = min(kept, default=0) - KEPT_EPOCHS * run.steps_per_epoch
    prune(RunPaths(run.config.run.dir).online_features, 0, stop)


def sync_skipped(run: Run, state: State) -> list[SkippedImage]:
    """The skipped images of all workers, each of which knows those of its own streams. Collective."""
    return sorted({SkippedImage(*item) for item in run.workers.all_gather(state.skipped)})
