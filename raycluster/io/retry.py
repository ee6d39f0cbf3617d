"""Retries with backoff while a disk is full or a bucket is unreachable."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 30.0
SECONDS_BETWEEN_POLLS = 0.5  # of RetryPolicy.stopping while waiting


@dataclass(frozen=True)
class RetryPolicy:
    """When to retry, and whom to inform.

    limit_seconds: for one operation. notify: receives what failed, and "" once it succeeds. stopping: whether a stop
    was requested, which ends the retries.
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
    """Retry transient storage errors in all threads of this process, see RetryPolicy."""
    global _policy
    before, _policy = _policy, RetryPolicy(limit_seconds, notify, stopping)
    try:
        yield
    finally:
        _policy = before


class RetryState:
    """The attempts of one operation."""

    def __init__(self) -> None:
        self._attempt, self._started_at, self._notified = 0, time.monotonic(), False

    def wait(self, failure: str) -> bool:
        """Sleep before the next attempt; False if there shall be none. failure: a message for the user."""
        policy = _policy
        waited = time.monotonic() - self._started_at
        pause = next_pause(self._attempt, waited, policy.limit_seconds) if policy else None
        if policy is None or pause is None:
            return False
        if not self._notified:
            policy.notify(f"{failure}. Waiting; trying again for {policy.limit_seconds / 60:.3g} minutes")
        self._attempt, self._notified = self._attempt + 1, True
        until = time.monotonic() + pause
        while time.monotonic() < until:
            if policy.stopping():
                return False
            time.sleep(min(SECONDS_BETWEEN_POLLS, max(0.0, until - time.monotonic())))
        return True

    def succeeded(self) -> None:
        """Report the end of a failure that was reported."""
        if self._notified and _policy is not None:
            _policy.notify("")


def next_pause(attempt: int, waited_seconds: float, limit_seconds: float) -> float | None:
    """Seconds to wait before the next attempt (attempt 0 has just failed), or None to give up."""
    if waited_seconds >= limit_seconds:
        return None
    pause = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2.0 ** min(attempt, 10))
    return min(pause, limit_seconds - waited_seconds)
