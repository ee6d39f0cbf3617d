"""Between two steps: look around, agree with the other workers on what to do, and do it."""

from __future__ import annotations

import time
from collections.abc import Iterator

from raycluster.events import Noted, Saved
from raycluster.features.extraction import Skipped
from raycluster.features.online import forget
from raycluster.io import storage
from raycluster.run.checkpoint import list_places
from raycluster.run.policy import Move, Sight, next_move, steps_until_look
from raycluster.run.state import Run, State, save
from raycluster.runtime.workers import Coming
from raycluster.types import Stopped

WAIT_SECONDS = 60.0  # for the end of a group that is ready for it; then it goes on


class Lookout:
    """Saves, stops and lets go in time. Every worker calls it after each of its steps."""

    def __init__(self, run: Run, state: State) -> None:
        self._run, self._state = run, state
        self._steps = 1  # until the next look: the first is taken at once
        self._noticed_at: float | None = None

    def after_step(self) -> Iterator[Saved | Noted]:
        """Look around if it is time to. Collective. Raises Stopped, with everything saved."""
        self._steps -= 1
        if self._steps > 0:
            return
        workers, state = self._run.workers, self._state
        move, self._steps = workers.once(self._decide, workers.coming())
        if move.save != "no":
            yield from self._save(first=move.save == "first")
        if move.then == "stop":
            raise Stopped(f"stopped in round {state.round + 1}; the same command goes on from there")
        if move.then == "wait":
            yield Noted(f"{move.why}: saved, waiting for another group of workers")
            workers.let_go(WAIT_SECONDS)
            yield Noted("")
        elif move.save == "first":
            yield Noted(f"{move.why}: saved")

    def _decide(self, coming: Coming) -> tuple[Move, int]:
        """The move, and the number of steps until the next look; on the first worker."""
        now, saver, settings = time.monotonic(), self._run.saver, self._run.config.run
        if coming.notice_seconds is None:
            self._noticed_at = None
        elif self._noticed_at is None:
            self._noticed_at = now
        sight = Sight(
            stop=self._run.workers.stopping(),
            resize=coming.resize,
            notice_seconds=coming.notice_seconds,
            unsaved_seconds=now - saver.begun_at,
            saved_since_notice=self._noticed_at is not None and saver.begun_at >= self._noticed_at,
            saving=saver.busy(),
            saving_seconds=saver.seconds,
            checkpoint_seconds=60 * settings.checkpoint_minutes,
        )
        tally = self._state.tally
        return next_move(sight), steps_until_look(tally["seconds_training"] / max(1.0, tally["steps"]))

    def _save(self, *, first: bool) -> Iterator[Saved]:
        run, state = self._run, self._state
        checkpoint(run, state)
        if first:
            run.workers.once(run.saver.wait)
        yield Saved(state.round, state.step)


def checkpoint(run: Run, state: State) -> None:
    """Begin to write all that it takes to go on from here. Collective."""
    gather_skipped(run, state)
    if state.harvest is not None:
        state.harvest.write(run.position(state.round, state.step))
        run.workers.once(_forget_harvest, run)
    run.workers.once(save, run, state)


def _forget_harvest(run: Run) -> None:
    """Delete what none of the kept checkpoints needs: all was visited since."""
    kept = [run.position(*place) for place in list_places(run.config.run.dir)]
    forget(storage.join(run.config.run.dir, "harvest"), 0, min(kept, default=0) - 2 * run.steps_per_epoch)


def gather_skipped(run: Run, state: State) -> None:
    """Every worker meets the broken images of its own lanes; from here on all know all of them."""
    state.skipped = sorted({Skipped(*item) for item in run.workers.gather(state.skipped)})
