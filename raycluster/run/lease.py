"""One job at a time on a run directory: a lease with a heartbeat, on any file system.

What is guaranteed: a job refuses while another one's heart beats, and takes over at once from a dead process of its own
machine, after a minute without heartbeat from one elsewhere. Where two jobs take a free directory within the same
second (no bucket offers an atomic "create if absent" through every client), both may begin; the one that finds the
other's name at its next heartbeat stops within seconds, and as checkpoints are named after their content and written
whole, none of them can be damaged by it.
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

from raycluster.io import storage
from raycluster.run.policy import LEASE_EXPIRY_SECONDS, LEASE_HEARTBEAT_SECONDS, LeaseObservation, decide_lease
from raycluster.types import UserError

_SETTLE_SECONDS = 0.3  # between writing a lease and believing it
_LOOK_SECONDS = 2.0  # between looks at another job's lease


@dataclass(frozen=True)
class Lease:
    """Who works on a run directory.

    token: of the job. machine: boot and process namespace of its process, the same for two processes that can see
    each other. process_start_time: when the process started, in the machine's ticks, for a number may be given to another process.
    heartbeat_at: seconds since 1970 by the clock of the holder.
    """

    token: str
    host: str
    pid: int
    machine: str
    process_start_time: str
    job: str
    since: float
    heartbeat_at: float


def lease_uri(run_dir: str) -> str:
    """Where the lease on a run directory lies."""
    return storage.join(run_dir, "lease.json")


def read_lease(run_dir: str) -> Lease | None:
    """The lease on a run directory, or None if it is free (or was left unreadable)."""
    uri = lease_uri(run_dir)
    if not storage.exists(uri):
        return None
    try:
        return Lease(**json.loads(storage.read_bytes(uri)))
    except (ValueError, TypeError):
        return None


@contextmanager
def acquire_lease(
    run_dir: str, *, lost: Callable[[str], None], notify: Callable[[str], None] = print
) -> Iterator[None]:
    """Hold the lease on a run directory meanwhile.

    lost: called from another thread if another job has taken it nevertheless. notify: hears that this one has to wait.
    Raises UserError if another job holds it.
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
                storage.delete(lease_uri(run_dir))


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
    first, began, told = read_lease(run_dir), time.monotonic(), False
    found = first
    while first is not None and found is not None:
        claim = LeaseObservation(
            alive=_lives(found) if found.machine == _machine() else None,
            age_seconds=time.time() - found.heartbeat_at,
            watched_seconds=time.monotonic() - began,
            beats=found != first,
        )
        move = decide_lease(claim)
        if move == "take":
            return
        if move == "refuse":
            raise UserError(_in_use(run_dir, found))
        if not told:
            told = True
            notify(
                f"{run_dir} was used by process {found.pid} on {found.host}, which may be dead; waiting up to "
                f"{LEASE_EXPIRY_SECONDS:.0f} s for its lease to expire"
            )
        time.sleep(_LOOK_SECONDS)
        found = read_lease(run_dir)


def _in_use(run_dir: str, lease: Lease) -> str:
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(lease.since))
    job = f", Ray job {lease.job}" if lease.job else ""
    return (
        f"{run_dir} is in use since {since} by process {lease.pid} on {lease.host}{job}; wait for it, stop it, or "
        "choose another run.dir"
    )


def _write(run_dir: str, lease: Lease) -> None:
    storage.write_bytes(lease_uri(run_dir), json.dumps(asdict(lease)).encode())


def _heartbeat(run_dir: str, mine: Lease, over: threading.Event, lost: Callable[[str], None]) -> None:
    while not over.wait(LEASE_HEARTBEAT_SECONDS):
        try:
            found = read_lease(run_dir)
            if found is not None and found.token != mine.token:
                lost(_in_use(run_dir, found))
                return
            _write(run_dir, replace(mine, heartbeat_at=time.time()))
        except UserError:
            continue  # whoever writes the checkpoints says what is wrong with the storage


def _machine() -> str:
    """The same for two processes only if one can ask whether the other lives."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def _process_start_time(pid: int) -> str:
    return _stat(pid, 19)


def _stat(pid: int, place: int) -> str:
    """What the system says of a process behind its name: 0 is its state, 19 when it started; "" if it says nothing."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[place]
    return ""


def _lives(lease: Lease) -> bool:
    try:
        os.kill(lease.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return _stat(lease.pid, 0) != "Z" and _process_start_time(lease.pid) == lease.process_start_time
