"""Waiting for a full disk or a bucket out of reach, instead of losing a run to it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 30.0
SECONDS_BETWEEN_POLLS = 0.5  # for the wish to stop


@dataclass(frozen=True)
class RetryPolicy:
    """limit_seconds: of trouble with one file. notify: hears what is wrong, and "" when it is over.

    stopping: whether somebody asked to stop, which ends the waiting.
    """

    limit_seconds: float
    notify: Callable[[str], None]
    stopping: Callable[[], bool]


_policy: RetryPolicy | None = None


@contextmanager
def retry_context(
    limit_seconds: float,
    *,
    notify: Callable[[str], None] = lambda text: None,
    stopping: Callable[[], bool] = lambda: False,
) -> Iterator[None]:
    """Meanwhile this process, all of its threads, tries storage again that fails for a reason that may pass."""
    global _policy
    before, _policy = _policy, RetryPolicy(limit_seconds, notify, stopping)
    try:
        yield
    finally:
        _policy = before


class RetryState:
    """The attempts at one operation."""

    def __init__(self) -> None:
        self._attempt, self._began, self._told = 0, time.monotonic(), False

    def again(self, trouble: str) -> bool:
        """Wait before another attempt; False if it is time to give up. trouble: what is wrong, for people."""
        policy = _policy
        waited = time.monotonic() - self._began
        pause = next_pause(self._attempt, waited, policy.limit_seconds) if policy else None
        if policy is None or pause is None:
            return False
        if not self._told:
            policy.notify(f"{trouble}. Waiting; trying again for {policy.limit_seconds / 60:.3g} minutes")
        self._attempt, self._told = self._attempt + 1, True
        until = time.monotonic() + pause
        while time.monotonic() < until:
            if policy.stopping():
                return False
            time.sleep(min(SECONDS_BETWEEN_POLLS, max(0.0, until - time.monotonic())))
        return True

    def over(self) -> None:
        """The operation has succeeded."""
        if self._told and _policy is not None:
            _policy.notify("")


def next_pause(attempt: int, waited_seconds: float, limit_seconds: float) -> float | None:
    """Seconds to wait before the next attempt (attempt 0 has just failed), or None to give up."""
    if waited_seconds >= limit_seconds:
        return None
    pause = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2.0 ** min(attempt, 10))
    return min(pause, limit_seconds - waited_seconds)
