"""Between two steps: look around, agree with the other workers on what to do, and do it."""

from __future__ import annotations

import time
from collections.abc import Iterator

from raycluster.events import Saved, StatusNote
from raycluster.features.extraction import SkippedImage
from raycluster.features.online import prune
from raycluster.io import storage
from raycluster.run.checkpoint import list_places
from raycluster.run.policy import ClusterObservation, Move, decide_checkpoint, steps_until_poll
from raycluster.run.state import Run, State, save
from raycluster.runtime.workers import PendingChange
from raycluster.types import RunStopped

WAIT_SECONDS = 60.0  # for the end of a group that is ready for it; then it goes on


class CheckpointPolicy:
    """Saves, stops and lets go in time. Every worker calls it after each of its steps."""

    def __init__(self, run: Run, state: State) -> None:
        self._run, self._state = run, state
        self._steps = 1  # until the next look: the first is taken at once
        self._noticed_at: float | None = None

    def after_step(self) -> Iterator[Saved | StatusNote]:
        """Look around if it is time to. Collective. Raises Stopped, with everything saved."""
        self._steps -= 1
        if self._steps > 0:
            return
        workers, state = self._run.workers, self._state
        move, self._steps = workers.run_on_rank_zero(self._decide, workers.pending_change())
        if move.save != "no":
            yield from self._save(first=move.save == "first")
        if move.then == "stop":
            raise RunStopped(f"stopped in round {state.round + 1}; the same command goes on from there")
        if move.then == "wait":
            yield StatusNote(f"{move.why}: saved, waiting for another group of workers")
            workers.wait_for_restart(WAIT_SECONDS)
            yield StatusNote("")
        elif move.save == "first":
            yield StatusNote(f"{move.why}: saved")

    def _decide(self, pending_change: PendingChange) -> tuple[Move, int]:
        """The move, and the number of steps until the next look; on the first worker."""
        now, checkpointer, settings = time.monotonic(), self._run.checkpointer, self._run.config.run
        if pending_change.notice_seconds is None:
            self._noticed_at = None
        elif self._noticed_at is None:
            self._noticed_at = now
        sight = ClusterObservation(
            stop=self._run.workers.stopping(),
            resize=pending_change.resize,
            notice_seconds=pending_change.notice_seconds,
            unsaved_seconds=now - checkpointer.begun_at,
            saved_since_notice=self._noticed_at is not None and checkpointer.begun_at >= self._noticed_at,
            saving=checkpointer.busy(),
            saving_seconds=checkpointer.seconds,
            checkpoint_seconds=60 * settings.checkpoint_minutes,
        )
        running_sums = self._state.running_sums
        return decide_checkpoint(sight), steps_until_poll(
            running_sums["seconds_training"] / max(1.0, running_sums["steps"])
        )

    def _save(self, *, first: bool) -> Iterator[Saved]:
        run, state = self._run, self._state
        checkpoint(run, state)
        if first:
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
    """Delete what none of the kept checkpoints needs: all was visited since."""
    kept = [run.position(*place) for place in list_places(run.config.run.dir)]
    prune(storage.join(run.config.run.dir, "online-features"), 0, min(kept, default=0) - 2 * run.steps_per_epoch)


def sync_skipped(run: Run, state: State) -> list[SkippedImage]:
    """The skipped images of all workers, each of which knows those of its own streams. Collective."""
    return sorted({SkippedImage(*item) for item in run.workers.all_gather(state.skipped)})
