"""A lease with a heartbeat: one job at a time on a run directory, on any file system.

A job refuses a directory while another job sends heartbeats. It takes over at once from a dead process of its own
machine, and after 60 s without a heartbeat from another machine. Two jobs that take a free directory within the same
second may both start, since no bucket offers an atomic "create if absent" through every client. The one that finds the
other's lease at its next heartbeat stops within seconds. Checkpoints are named after their content and written whole,
so neither can damage those of the other.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from secrets import token_hex
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from raycluster.io import storage
from raycluster.io.run_paths import RunPaths
from raycluster.run.policy import LEASE_EXPIRY_SECONDS, LEASE_HEARTBEAT_SECONDS, LeaseObservation, decide_lease
from raycluster.types import UserError

_SETTLE_SECONDS = 0.3  # between writing a lease and reading it back
_POLL_SECONDS = 2.0  # between reads of another job's lease

Time = Annotated[float, Field(ge=0, le=1e11, allow_inf_nan=False)]  # since 1970; time.localtime takes no more


@dataclass(frozen=True)
class Lease:
    """Which job works on a run directory.

    token: of the job. machine: boot and process namespace of its process, equal for two processes that can see each
    other. process_start_time: in clock ticks since boot, as a pid may be reused. job: Ray job id, "" outside one.
    since, heartbeat_at: seconds since 1970 by the clock of the holder.
    """

    token: str
    host: str
    pid: Annotated[int, Field(gt=0, lt=2**31)]
    machine: str
    process_start_time: str
    job: str
    since: Time
    heartbeat_at: Time


_LEASE = TypeAdapter(Lease)


def read_lease(run_dir: str) -> Lease | None:
    """The lease on a run directory, or None if there is none or it is damaged."""
    uri = RunPaths(run_dir).lease
    if not storage.exists(uri):
        return None
    try:
        return _LEASE.validate_json(storage.read_bytes(uri))
    except ValidationError:
        return None


@contextmanager
def acquire_lease(
    run_dir: str, *, lost: Callable[[str], None], notify: Callable[[str], None] = print
) -> Iterator[None]:
    """Hold the lease on a run directory within a `with` block.

    lost: called from another thread with a message if another job has taken the lease. notify: called with a message if
    this job has to wait. Raises UserError if another job holds the lease.
    """
    mine = _acquire(run_dir, notify)
    over = threading.Event()
    thread = threading.Thread(target=_heartbeat, args=(run_dir, mine, over, lost), name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(timeout=LEASE_HEARTBEAT_SECONDS)
        with suppress(UserError):
            found = read_lease(run_dir)
            if found is not None and found.token == mine.token:
                storage.delete(RunPaths(run_dir).lease)


def _acquire(run_dir: str, notify: Callable[[str], None]) -> Lease:
    _wait_until_free(run_dir, notify)
    now = time.time()
    mine = Lease(
        token=token_hex(8),
        host=socket.gethostname(),
        pid=os.getpid(),
        machine=_machine(),
        process_start_time=_process_start_time(os.getpid()),
        job=os.environ.get("RAY_JOB_ID", ""),
        since=now,
        heartbeat_at=now,
    )
    _write(run_dir, mine)
    time.sleep(_SETTLE_SECONDS)
    found = read_lease(run_dir)
    if found is not None and found.token != mine.token:
        raise UserError(_in_use(run_dir, found))
    return mine


def _wait_until_free(run_dir: str, notify: Callable[[str], None]) -> None:
    first, began, notified = read_lease(run_dir), time.monotonic(), False
    found = first
    while first is not None and found is not None:
        observation = LeaseObservation(
            alive=_lives(found) if found.machine == _machine() else None,
            age_seconds=time.time() - found.heartbeat_at,
            watched_seconds=time.monotonic() - began,
            heartbeat_seen=found != first,
        )
        decision = decide_lease(observation)
        if decision == "take":
            return
        if decision == "refuse":
            raise UserError(_in_use(run_dir, found))
        if not notified:
            notified = True
            notify(
                f"{run_dir} was used by process {found.pid} on {found.host}, which may be dead; waiting up to "
                f"{LEASE_EXPIRY_SECONDS:.0f} s for its lease to expire"
            )
        time.sleep(_POLL_SECONDS)
        found = read_lease(run_dir)


def _in_use(run_dir: str, lease: Lease) -> str:
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(lease.since))
    job = f", Ray job {lease.job}" if lease.job else ""
    return (
        f"{run_dir} is in use since {since} by process {lease.pid} on {lease.host}{job}; wait for it, stop it, or "
        "choose another run.dir"
    )


def _write(run_dir: str, lease: Lease) -> None:
    storage.write_bytes(RunPaths(run_dir).lease, json.dumps(asdict(lease)).encode())


def _heartbeat(run_dir: str, mine: Lease, over: threading.Event, lost: Callable[[str], None]) -> None:
    while not over.wait(LEASE_HEARTBEAT_SECONDS):
        try:
            found = read_lease(run_dir)
            if found is not None and found.token != mine.token:
                lost(_in_use(run_dir, found))
                return
            _write(run_dir, replace(mine, heartbeat_at=time.time()))
        except UserError:
            continue  # the checkpointer reports storage that fails


def _machine() -> str:
    """Equal for two processes only if one can check whether the other lives."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def _process_start_time(pid: int) -> str:
    return _stat(pid, 19)


def _stat(pid: int, index: int) -> str:
    """Field of /proc/PID/stat, counted from the one after the name: 0 is the state, 19 the start time; or ""."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[index]
    return ""


def _lives(lease: Lease) -> bool:
    try:
        os.kill(lease.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return _stat(lease.pid, 0) != "Z" and _process_start_time(lease.pid) == lease.process_start_time
