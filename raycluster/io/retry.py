"""Waiting for a full disk or a bucket out of reach, instead of losing a run to it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from raycluster.run.policy import next_pause

_SECONDS_BETWEEN_LOOKS = 0.5  # for the wish to stop


@dataclass(frozen=True)
class Patience:
    """limit_seconds: of trouble with one file. tell: hears what is wrong, and "" when it is over.

    stopping: whether somebody asked to stop, which ends the waiting.
    """

    limit_seconds: float
    tell: Callable[[str], None]
    stopping: Callable[[], bool]


_patience: Patience | None = None


@contextmanager
def patient(
    limit_seconds: float,
    *,
    tell: Callable[[str], None] = lambda text: None,
    stopping: Callable[[], bool] = lambda: False,
) -> Iterator[None]:
    """Meanwhile this process, all of its threads, tries storage again that fails for a reason that may pass."""
    global _patience
    before, _patience = _patience, Patience(limit_seconds, tell, stopping)
    try:
        yield
    finally:
        _patience = before


class Waiting:
    """The attempts at one operation."""

    def __init__(self) -> None:
        self._attempt, self._began, self._told = 0, time.monotonic(), False

    def again(self, trouble: str) -> bool:
        """Wait before another attempt; False if it is time to give up. trouble: what is wrong, for people."""
        patience = _patience
        waited = time.monotonic() - self._began
        pause = next_pause(self._attempt, waited, patience.limit_seconds) if patience else None
        if patience is None or pause is None:
            return False
        if not self._told:
            patience.tell(f"{trouble}. Waiting; trying again for {patience.limit_seconds / 60:.3g} minutes")
        self._attempt, self._told = self._attempt + 1, True
        until = time.monotonic() + pause
        while time.monotonic() < until:
            if patience.stopping():
                return False
            time.sleep(min(_SECONDS_BETWEEN_LOOKS, max(0.0, until - time.monotonic())))
        return True

    def over(self) -> None:
        """The operation has succeeded."""
        if self._told and _patience is not None:
            _patience.tell("")
