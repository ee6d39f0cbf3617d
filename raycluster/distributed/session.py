"""Joining the cluster that is there, or starting one on this machine; and being asked to stop."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import ray

TRAIN_SLOT = "train_slot"  # requested by training workers only: elastic scheduling live-locks on a shared resource

_READERS = ("StreamingExecutor", "iter_threaded", "ray-data")
_READERS_SECONDS = 10.0

_stop_requested = False
_stop_reason = ""


def stop_requested() -> bool:
    """Whether this process was sent SIGINT or SIGTERM, or has another reason to stop."""
    return _stop_requested


def request_stop(reason: str) -> None:
    """Ask the run of this process to save and stop. reason: why, for its user."""
    global _stop_requested, _stop_reason
    _stop_requested, _stop_reason = True, reason


def stop_reason() -> str:
    """What `request_stop` was told, "" if nobody called it."""
    return _stop_reason


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """The first Ctrl-C or SIGTERM asks the run to save and stop; the second interrupts it where it is."""
    global _stop_requested, _stop_reason
    _stop_requested, _stop_reason = False, ""
    if threading.current_thread() is not threading.main_thread():  # where Python allows no handlers
        yield
        return

    def ask(number: int, frame: FrameType | None) -> None:
        global _stop_requested
        if _stop_requested:
            raise KeyboardInterrupt
        _stop_requested = True
        os.write(
            2, b"\nstopping as soon as all is saved (once more: at once)\n"
        )  # print may be in the middle of a line

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def ray_session(*, train_slots: int = 0, num_cpus: int | None = None, dashboard: bool = False) -> Iterator[None]:
    """A Ray cluster: the running one if this process already has one or RAY_ADDRESS names one, else one of its own.

    train_slots, num_cpus: what a cluster of its own has of training workers and processors; None for all processors.
    dashboard: whether it has one.
    """
    if ray.is_initialized():
        yield
        return
    # Ray's own logs stay in Ray's log files: what concerns the user reaches the job as events and errors.
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        own = {} if os.environ.get("RAY_ADDRESS") else _own(folder, train_slots, num_cpus, dashboard)
        ray.init(**quiet, **own)
        try:
            yield
        finally:
            _let_readers_end()
            ray.shutdown()


def _let_readers_end() -> None:
    """Wait for the threads of Ray Data: one that is inside a call while Ray goes would end this process, exit code 1.

    They end soon after whoever read from them stopped in the middle.
    """
    until = time.monotonic() + _READERS_SECONDS
    for thread in threading.enumerate():
        if thread.name.startswith(_READERS):
            thread.join(max(0.0, until - time.monotonic()))


def _own(folder: str, train_slots: int, num_cpus: int | None, dashboard: bool) -> dict[str, Any]:
    print("starting Ray on this machine", file=sys.stderr, flush=True)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # On a machine of one's own nothing else waits for the processors; at Ray's default niceness decoding would starve.
    os.environ.setdefault("RAY_worker_niceness", "0")
    return {
        "address": "local",
        "num_cpus": num_cpus,
        "resources": {TRAIN_SLOT: max(1, train_slots)},
        "include_dashboard": dashboard,
        "_temp_dir": folder,
    }
