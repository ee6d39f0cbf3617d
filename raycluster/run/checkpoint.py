"""Checkpoints independent of the number of workers: one file each, written atomically, its checksum in its name."""

from __future__ import annotations

import io
import logging
import re
import time
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import sha256
from typing import Any

import torch

from raycluster.io import storage
from raycluster.io.run_paths import RunPaths
from raycluster.types import UserError

log = logging.getLogger(__name__)
# `begin`: the round has no labels yet; it sorts before `step`.
_NAME = re.compile(r"round-(\d{5})-(?:begin|step-(\d{7}))-([0-9a-f]{16})\.pt$")
_PART = re.compile(r"\.round-\d{5}-.*\.part$")
_FORMAT, _VERSION = "raycluster checkpoint", 1


def list_checkpoints(run_dir: str) -> list[str]:
    """URIs of the checkpoints of a run, oldest first; some may be damaged."""
    folder = RunPaths(run_dir).checkpoints
    files = storage.list_files(folder) if storage.exists(folder) else []
    return sorted(uri for uri in files if _NAME.search(uri.split("?")[0]))


def list_places(run_dir: str) -> list[tuple[int, int]]:
    """(round, step) of each checkpoint, oldest first."""
    matches = (_NAME.search(uri.split("?")[0]) for uri in list_checkpoints(run_dir))
    return [(int(match[1]), int(match[2] or 0)) for match in matches if match]


def save_checkpoint(run_dir: str, state: dict[str, Any], *, keep: int) -> str:
    """Write `state` (tensors, numbers, strings, lists and dicts of these) and delete all but the newest `keep` ones.

    state["round"], state["step"] and state["assigned"] name it. Damaged checkpoints are deleted and do not count as
    kept. Nothing is deleted before the new one is complete, so a failed write (a full disk raises UserError) loses
    nothing.
    """
    buffer = io.BytesIO()
    torch.save({"format": _FORMAT, "version": _VERSION, "state": state}, buffer)
    data = buffer.getvalue()
    step = f"step-{state['step']:07d}" if state["assigned"] == state["round"] else "begin"
    name = f"round-{state['round']:05d}-{step}-{sha256(data).hexdigest()[:16]}.pt"
    folder = RunPaths(run_dir).checkpoints
    uri = storage.join(folder, name)
    storage.write_bytes(uri, data)
    _prune(run_dir, name, keep)
    for file in storage.list_files(folder):
        if _PART.search(file.split("?")[0]):  # of a process that was killed while it wrote: only one writes at a time
            storage.delete(file)
    return uri


def _prune(run_dir: str, written: str, keep: int) -> None:
    """Delete all but the newest `keep` intact checkpoints; the one called `written` always stays."""
    others = [uri for uri in list_checkpoints(run_dir) if not uri.split("?")[0].endswith(written)]
    kept = 1
    for uri in reversed(others):
        # Reading one older checkpoint per save is the price of never deleting the last intact one.
        if kept < keep and _read(uri, torch.device("meta")) is not None:
            kept += 1
        else:
            storage.delete(uri)


def load_newest(run_dir: str, device: torch.device) -> dict[str, Any] | None:
    """State in the newest intact checkpoint, on `device`; None if there is no checkpoint.

    Damaged checkpoints are skipped with a warning; the next save deletes them. Raises UserError if all are damaged.
    """
    uris = list_checkpoints(run_dir)
    for uri in reversed(uris):
        state = _read(uri, device)
        if state is not None:
            return state
        log.warning("checkpoint %s is damaged; trying the one before", uri)
    if uris:
        folder, names = RunPaths(run_dir).checkpoints, [uri.split("?")[0].rpartition("/")[2] for uri in uris]
        raise UserError(
            f"none of the {len(uris)} checkpoints in {folder} is intact: {', '.join(names)}; restore one from a copy, "
            f"or delete the folder {folder} to start again from the beginning"
        )
    return None


def _read(uri: str, device: torch.device) -> dict[str, Any] | None:
    """State in a checkpoint, or None if the file is damaged or of another program."""
    data, match = storage.read_bytes(uri), _NAME.search(uri.split("?")[0])
    if match is None or not sha256(data).hexdigest().startswith(match[3]):
        return None
    try:
        found = torch.load(io.BytesIO(data), map_location=device, weights_only=True)
    except Exception:  # of a foreign file: unpickling arbitrary bytes raises any type
        return None
    if not isinstance(found, dict) or found.get("format") != _FORMAT:
        return None
    if found.get("version") != _VERSION:
        raise UserError(
            f"checkpoint {uri} has format version {found.get('version')}; wanted {_VERSION}. Resume with the version "
            "of raycluster that wrote it, or choose another run.dir"
        )
    state: dict[str, Any] = found["state"]
    return state


class AsyncCheckpointer:
    """Writes checkpoints in a background thread, one at a time, while training continues.

    An error there is raised by the next call of any method. begun_at: time.monotonic() when the last write started, or
    this object was created. seconds: duration of the last write.
    """

    def __init__(self, run_dir: str, *, keep: int) -> None:
        self._run_dir, self._keep = run_dir, keep
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self.begun_at, self.seconds = time.monotonic(), 0.0

    def save(self, state: dict[str, Any]) -> None:
        """Copy `state`, see `save_checkpoint`, and start to write it once the previous write is complete."""
        self.wait()
        self.begun_at = time.monotonic()
        self._writing = self._thread.submit(self._write, _copied(state))

    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        if self._writing is not None and self._writing.done():
            self.wait()
        return self._writing is not None

    def wait(self) -> None:
        """Block until everything is written."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Wait for the write in progress, ignore its errors, and end the thread."""
        self._thread.shutdown(wait=True)

    def _write(self, state: dict[str, Any]) -> None:
        began = time.monotonic()
        save_checkpoint(self._run_dir, state, keep=self._keep)
        self.seconds = time.monotonic() - began


def _copied(value: Any) -> Any:
    """A copy on the CPU that shares no memory with `value`."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(item) for item in value)
    return value
