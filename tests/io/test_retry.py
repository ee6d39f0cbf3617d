"""Storage that fails for a while: real full disks where the system lets a test have one, else a file in the way."""

from __future__ import annotations

import errno
import threading
import time
from pathlib import Path

import pytest

from raycluster.io import retry, storage
from raycluster.io.retry import retry_context
from raycluster.types import UserError


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_PAUSE_SECONDS", 0.05)
    monkeypatch.setattr(storage, "_PAUSES_SECONDS", ())


class Disk:
    """A write that finds the disk full until it has room."""

    def __init__(self) -> None:
        self.full, self.attempts = True, 0

    def write(self) -> str:
        self.attempts += 1
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return "written"


def test_waits_until_there_is_room_and_says_so() -> None:
    disk, told = Disk(), []
    threading.Timer(0.3, lambda: setattr(disk, "full", False)).start()
    with retry_context(60, notify=told.append):
        assert storage.attempt("write", "/disk/file", disk.write) == "written"
    assert disk.attempts > 2
    assert len(told) == 2 and told[1] == ""
    assert "cannot write /disk/file" in told[0] and "make room" in told[0]
    assert "trying again for 1 minutes" in told[0]


def test_has_a_limit() -> None:
    disk = Disk()
    with pytest.raises(UserError, match="The disk or quota is full"), retry_context(0.2):
        storage.attempt("write", "/disk/file", disk.write)
    assert disk.attempts >= 2


def test_nobody_waits_unasked() -> None:
    disk = Disk()
    with pytest.raises(UserError, match="The disk or quota is full"):
        storage.attempt("write", "/disk/file", disk.write)
    assert disk.attempts == 1


def test_the_process_that_is_asked_to_stop_does_not_wait() -> None:
    disk, began = Disk(), time.monotonic()
    with pytest.raises(UserError), retry_context(600, stopping=lambda: True):
        storage.attempt("write", "/disk/file", disk.write)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("content", ["missing", "a folder"])
def test_what_cannot_pass_is_not_waited_for(tmp_path: Path, content: str) -> None:
    if content == "a folder":
        (tmp_path / "file").mkdir()
    told: list[str] = []
    with pytest.raises(UserError), retry_context(600, notify=told.append):
        storage.read_bytes(str(tmp_path / "file"))
    assert told == []
