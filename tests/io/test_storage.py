from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from raycluster.io import storage
from raycluster.types import UserError


@pytest.mark.parametrize(
    ("uri", "parts", "whole"),
    [
        ("/a/b", ("c", "d.x"), "/a/b/c/d.x"),
        ("/a/b/", ("c/",), "/a/b/c"),
        ("/", ("c",), "/c"),
        ("a", ("b",), "a/b"),
        ("s3://b", ("k",), "s3://b/k"),
        ("s3://b/x?endpoint_override=h:1&scheme=http", ("y", "z"), "s3://b/x/y/z?endpoint_override=h:1&scheme=http"),
        ("s3://b/what?", ("y",), "s3://b/what?/y"),
        ("file:///tmp/a%20b", ("c d",), "file:///tmp/a%20b/c%20d"),
    ],
)
def test_join_appends_before_options(uri: str, parts: tuple[str, ...], whole: str) -> None:
    assert storage.join(uri, *parts) == whole


@pytest.mark.parametrize(
    ("uri", "folder"),
    [("/a/b/c", "/a/b"), ("/a", "/"), ("s3://b/x/y?region=r", "s3://b/x?region=r"), ("s3://b/x", "s3://b")],
)
def test_parent_keeps_options(uri: str, folder: str) -> None:
    assert storage.parent(uri) == folder


@pytest.fixture(params=["path", "file", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    folder = tmp_path / "a folder %20 #1"
    return {"path": str(folder), "file": folder.as_uri(), "memory": f"memory://{tmp_path.name}/x"}[request.param]


def test_what_is_written_can_be_listed_read_and_deleted(root: str) -> None:
    names = ["b.bin", "a b.bin", "deep/er/c.bin", "perc%20ent"]
    for name in names:
        storage.write_bytes(storage.join(root, *name.split("/")), name.encode())
    assert storage.list_files(root) == [storage.join(root, name) for name in ("a b.bin", "b.bin", "perc%20ent")]
    everything = storage.list_files(root, recursive=True)
    assert [storage.read_bytes(uri).decode() for uri in everything] == sorted(names)
    storage.write_bytes(everything[0], b"new")
    assert storage.read_bytes(everything[0]) == b"new"
    storage.delete(everything[0])
    storage.delete(everything[0])
    assert not storage.exists(everything[0])
    assert storage.exists(root)
    storage.delete(root)
    assert not storage.exists(root)


def test_a_path_and_its_file_uri_are_the_same_place(tmp_path: Path) -> None:
    path = tmp_path / "x y.bin"
    storage.write_bytes(path.as_uri(), b"1")
    assert path.read_bytes() == b"1"
    assert storage.read_bytes(str(path)) == b"1"


def test_relative_paths_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("x/y") == str(tmp_path / "x/y")
    assert storage.absolute("s3://b/x") == "s3://b/x"


def test_a_failed_write_leaves_what_was_there_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = str(tmp_path / "x.bin")
    storage.write_bytes(uri, b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*x\.bin.*No space left.*full: make room"):
        storage.write_bytes(uri, b"new")
    assert os.listdir(tmp_path) == ["x.bin"]
    assert storage.read_bytes(uri) == b"old"


def test_written_files_follow_the_umask(tmp_path: Path) -> None:
    storage.write_bytes(str(tmp_path / "x"), b"")
    (tmp_path / "y").touch()
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "y").stat().st_mode


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*gone\.bin.*check the spelling"):
        storage.read_bytes(str(tmp_path / "gone.bin"))
    with pytest.raises(UserError, match=r"cannot list .*nowhere.*check the spelling"):
        storage.list_files(str(tmp_path / "nowhere"))


def test_failures_that_may_pass_are_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    calls = []

    def flaky() -> str:
        calls.append(1)
        if len(calls) < 3:
            raise OSError("AWS Error NETWORK_CONNECTION during GetObject")
        return "done"

    assert storage.attempt("read", "s3://b/k", flaky) == "done"
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("uri", "error", "says"),
    [
        ("s3://b/k", OSError("AWS Error ACCESS_DENIED during HeadObject"), "credentials in the environment"),
        ("s3://b/k", OSError("AWS Error NO_SUCH_BUCKET during GetObject"), "spelling of bucket"),
        ("/a", PermissionError(errno.EACCES, "Permission denied"), "owner and permissions"),
        ("/a", OSError(errno.EDQUOT, "Disk quota exceeded"), "quota is full"),
    ],
)
def test_failures_that_stay_are_told_at_once(uri: str, error: OSError, says: str) -> None:
    calls = []

    def failing() -> None:
        calls.append(1)
        raise error

    with pytest.raises(UserError, match=says) as caught:
        storage.attempt("read", uri, failing)
    assert uri in str(caught.value)
    assert len(calls) == 1


def test_credentials_in_a_uri_are_refused_and_not_repeated() -> None:
    with pytest.raises(UserError, match="environment") as caught:
        storage.read_bytes("s3://key:secret@bucket/x")
    assert "secret@" not in str(caught.value)


def test_an_unknown_scheme_says_what_to_install() -> None:
    with pytest.raises(UserError, match=r"nosuch://x/y.*install the fsspec package"):
        storage.read_bytes("nosuch://x/y")


def test_an_unreachable_endpoint_is_told_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "y")
    started = time.monotonic()
    with pytest.raises(UserError, match=r"127\.0\.0\.1:9.*Tried 3 times.*endpoint"):
        storage.read_bytes("s3://bucket/x?endpoint_override=127.0.0.1:9&scheme=http")
    assert time.monotonic() - started < 10


@pytest.fixture
def odd_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What cannot be read as a file, by kind."""
    monkeypatch.chdir(tmp_path)  # the path of a socket may have 107 characters
    os.mkfifo("fifo")
    os.symlink("loop", "loop")
    os.mkdir("folder")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
    return {
        **{name: str(tmp_path / name) for name in ("fifo", "loop", "folder", "socket", "gone")},
        "device": "/dev/zero",
        "long": str(tmp_path / ("x" * 300)),
        "below a file": "/dev/null/x",
        "nul": str(tmp_path / "a\0b"),
        "surrogate": str(tmp_path / "a\udcff"),
    }


@pytest.mark.parametrize(
    "kind", ["fifo", "loop", "folder", "socket", "gone", "device", "long", "below a file", "nul", "surrogate"]
)
def test_reading_what_is_no_file_fails_at_once_and_concerns_one_file(odd_files: dict[str, str], kind: str) -> None:
    with pytest.raises(UserError) as caught:
        storage.read_bytes(odd_files[kind])
    assert storage.concerns_one_file(caught.value.__cause__)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, "Input/output error"),
        OSError(errno.ENOTCONN, "Transport endpoint is not connected"),
        OSError(errno.EMFILE, "Too many open files"),
        OSError("AWS Error NETWORK_CONNECTION during GetObject"),
        OSError("AWS Error INVALID_ACCESS_KEY_ID during HeadObject"),
        None,
    ],
)
def test_an_outage_does_not_concern_one_file(error: OSError | None) -> None:
    assert not storage.concerns_one_file(error)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_a_file_without_permission_concerns_one_file() -> None:
    program = (
        "import os, tempfile\n"
        "from raycluster.io import storage\n"
        "from raycluster.types import UserError\n"
        "name = tempfile.mkstemp()[1]\n"
        "os.chmod(name, 0)\n"
        "os.setuid(65534)\n"
        "try:\n"
        "    storage.read_bytes(name)\n"
        "except UserError as error:\n"
        "    print(storage.concerns_one_file(error.__cause__), error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("True ") and "Permission denied" in done.stdout


def test_abandoned_temporary_files_are_deleted_by_the_next_writer(tmp_path: Path) -> None:
    abandoned, recent, other = (tmp_path / name for name in (f".x.{'0a' * 8}.part", f".y.{'1b' * 8}.part", ".z.part"))
    for file in (abandoned, recent, other):
        file.write_bytes(b"half")
    for file in (abandoned, other):
        os.utime(file, (time.time() - 7200,) * 2)
    storage.write_bytes(str(tmp_path / "new.bin"), b"1")
    assert sorted(os.listdir(tmp_path)) == sorted([recent.name, other.name, "new.bin"])


def test_the_folder_is_synced_after_the_file_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[tuple[str, bool]] = []
    fsync = os.fsync

    def recorded(descriptor: int) -> None:
        synced.append((os.readlink(f"/proc/self/fd/{descriptor}"), (tmp_path / "x.bin").exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded)
    storage.write_bytes(str(tmp_path / "x.bin"), b"1")
    assert synced[0][0].endswith(".part") and not synced[0][1]
    assert synced[1:] == [(str(tmp_path), True)]
