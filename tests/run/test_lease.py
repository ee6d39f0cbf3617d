"""One job at a time: real processes, real files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from raycluster.io.run_paths import RunPaths
from raycluster.run import lease, policy
from raycluster.run.lease import Lease, acquire_lease, read_lease
from raycluster.types import UserError

HOLDER = """
import sys, time
from raycluster.run.lease import acquire_lease
with acquire_lease(sys.argv[1], lost=print):
    print("held", flush=True)
    time.sleep(60)
"""


def never(text: str) -> None:
    raise AssertionError(text)


@pytest.fixture
def holder(tmp_path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def elsewhere(run_dir: Path, age_seconds: float = 0.0) -> Lease:
    """The lease of a job on another machine."""
    with acquire_lease(str(run_dir), lost=never):
        mine = read_lease(str(run_dir))
    assert mine is not None
    other = replace(mine, token="other", machine="another", host="far", heartbeat_at=mine.heartbeat_at - age_seconds)
    Path(RunPaths(str(run_dir)).lease).write_text(json.dumps(asdict(other)))
    return other


def test_second_job_is_refused_until_the_first_dies(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    with pytest.raises(UserError, match=rf"in use since .* by process {holder.pid} on .*choose another run\.dir"):
        acquire_lease(str(tmp_path), lost=never).__enter__()
    os.kill(holder.pid, signal.SIGKILL)
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
    with acquire_lease(str(tmp_path), lost=never, notify=never):  # not reaped yet: a zombie is dead
        found = read_lease(str(tmp_path))
        assert found is not None and found.pid == os.getpid()
        holder.wait()
    assert read_lease(str(tmp_path)) is None


def test_a_pid_may_be_reused(tmp_path: Path) -> None:
    with acquire_lease(str(tmp_path), lost=never):
        mine = read_lease(str(tmp_path))
    assert mine is not None
    other = replace(mine, token="other", process_start_time="1")
    Path(RunPaths(str(tmp_path)).lease).write_text(json.dumps(asdict(other)))
    with acquire_lease(str(tmp_path), lost=never, notify=never):
        pass


def test_job_on_another_machine_is_waited_for_then_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "LEASE_EXPIRY_SECONDS", 0.3)
    monkeypatch.setattr(lease, "_POLL_SECONDS", 0.1)
    elsewhere(tmp_path)
    messages: list[str] = []
    with acquire_lease(str(tmp_path), lost=never, notify=messages.append):
        assert len(messages) == 1 and "on far, which may be dead; waiting up to" in messages[0]


def test_job_on_another_machine_with_a_heartbeat_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "_POLL_SECONDS", 0.1)
    other = elsewhere(tmp_path)

    def heartbeat(text: str) -> None:
        Path(RunPaths(str(tmp_path)).lease).write_text(
            json.dumps(asdict(replace(other, heartbeat_at=other.heartbeat_at + 10)))
        )

    with pytest.raises(UserError, match=r"in use since .* on far"):
        acquire_lease(str(tmp_path), lost=never, notify=heartbeat).__enter__()


def test_long_dead_job_is_not_waited_for(tmp_path: Path) -> None:
    elsewhere(tmp_path, age_seconds=3600)
    with acquire_lease(str(tmp_path), lost=never, notify=never):
        pass


def test_a_job_that_lost_its_lease_is_notified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "LEASE_HEARTBEAT_SECONDS", 0.05)
    messages: list[str] = []
    with acquire_lease(str(tmp_path), lost=messages.append):
        mine = read_lease(str(tmp_path))
        assert mine is not None
        other = replace(mine, token="other", host="far")
        while not messages:
            Path(RunPaths(str(tmp_path)).lease).write_text(json.dumps(asdict(other)))
    assert "on far" in messages[0]
    found = read_lease(str(tmp_path))
    assert found is not None and found.token == "other", "the lease of another is left where it is"


def test_unreadable_lease_is_none(tmp_path: Path) -> None:
    Path(RunPaths(str(tmp_path)).lease).write_text("{")
    with acquire_lease(str(tmp_path), lost=never, notify=never):
        pass
