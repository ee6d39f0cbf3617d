"""A Ray session: the running cluster or one of this machine; and requests to stop the run."""

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

from raycluster.distributed.ray_internals import temp_dir_option

TRAIN_SLOT = "train_slot"  # requested by training workers only: elastic scheduling live-locks on a shared resource

_DATA_THREADS = ("StreamingExecutor", "iter_threaded", "ray-data")
_DATA_THREADS_SECONDS = 10.0

_stop_requested = False
_stop_reason = ""


def stop_requested() -> bool:
    """Whether this process received SIGINT or SIGTERM, or `request_stop` was called."""
    return _stop_requested


def request_stop(reason: str) -> None:
    """Ask the run of this process to save and stop. reason: shown to the user as an error, "" for none."""
    global _stop_requested, _stop_reason
    _stop_requested, _stop_reason = True, reason


def stop_reason() -> str:
    """The reason given to `request_stop`, "" if there is none."""
    return _stop_reason


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """The first Ctrl-C or SIGTERM asks the run to save and stop; the second interrupts it at once.

    A request, also one by `request_stop`, ends with the context: what this process does next is not stopped.
    """
    global _stop_requested, _stop_reason
    _stop_requested, _stop_reason = False, ""
    try:
        with _signal_handlers():
            yield
    finally:
        _stop_requested, _stop_reason = False, ""


@contextmanager
def _signal_handlers() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # where Python allows no handlers
        yield
        return

    def ask(number: int, frame: FrameType | None) -> None:
        global _stop_requested
        if _stop_requested:
            raise KeyboardInterrupt
        _stop_requested = True
        # Not print, which the signal may have interrupted.
        os.write(2, b"\nsaving a checkpoint, then stopping (again: stop at once)\n")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def ray_session(*, train_slots: int = 0, num_cpus: int | None = None, dashboard: bool = False) -> Iterator[None]:
    """A Ray cluster: the running one if this process already has one or RAY_ADDRESS names one, else one of its own.

    train_slots, num_cpus, dashboard: of a cluster of its own; num_cpus None for all CPUs of this machine.
    """
    if ray.is_initialized():
        yield
        return
    # Ray's logs stay in its log files: what the user needs reaches the job as events and errors.
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        own = {} if os.environ.get("RAY_ADDRESS") else _own_cluster(folder, train_slots, num_cpus, dashboard)
        ray.init(**quiet, **own)
        try:
            yield
        finally:
            _join_data_threads()
            ray.shutdown()


def _join_data_threads() -> None:
    """Wait for the threads of Ray Data: one that calls Ray during its shutdown ends this process with exit code 1.

    They end soon after their reader stopped, also in the middle of a dataset.
    """
    until = time.monotonic() + _DATA_THREADS_SECONDS
    for thread in threading.enumerate():
        if thread.name.startswith(_DATA_THREADS):
            thread.join(max(0.0, until - time.monotonic()))


def _own_cluster(folder: str, train_slots: int, num_cpus: int | None, dashboard: bool) -> dict[str, Any]:
    print("starting Ray on this machine", file=sys.stderr, flush=True)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # On the user's own machine no other Ray job needs the CPUs; at Ray's default niceness decoding would starve.
    os.environ.setdefault("RAY_worker_niceness", "0")
    return {
        "address": "local",
        "num_cpus": num_cpus,
        "resources": {TRAIN_SLOT: max(1, train_slots)},
        "include_dashboard": dashboard,
        **temp_dir_option(folder),
    }
