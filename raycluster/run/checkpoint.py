"""Checkpoints that know nothing of workers: one file each, written atomically, named after place and checksum."""

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

log = logging.getLogger(__name__)
# `begin`: the round has no labels yet; it sorts before `step`.
_NAME = re.compile(r"round-(\d{5})-(?:begin|step-(\d{7}))-([0-9a-f]{16})\.pt$")
_PART = re.compile(r"\.round-\d{5}-.*\.part$")


def _folder(run_dir: str) -> str:
    return storage.join(run_dir, "checkpoints")


def list_checkpoints(run_dir: str) -> list[str]:
    """URIs of the checkpoints of a run, oldest first."""
    files = storage.list_files(_folder(run_dir)) if storage.exists(_folder(run_dir)) else []
    return sorted(uri for uri in files if _NAME.search(uri.split("?")[0]))


def list_places(run_dir: str) -> list[tuple[int, int]]:
    """(round, step) of each checkpoint, oldest first."""
    matches = (_NAME.search(uri.split("?")[0]) for uri in list_checkpoints(run_dir))
    return [(int(match[1]), int(match[2] or 0)) for match in matches if match]


def save_checkpoint(run_dir: str, state: dict[str, Any], *, keep: int) -> str:
    """Write `state` (tensors, numbers, strings, lists and dicts of these) and drop all but the newest `keep` ones.

    state["round"], state["step"] and state["assigned"] name it. Nothing is dropped before the new one is complete, so a
    failed write (a full disk raises UserError) loses nothing.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getvalue()
    step = f"step-{state['step']:07d}" if state["assigned"] == state["round"] else "begin"
    name = f"round-{state['round']:05d}-{step}-{sha256(data).hexdigest()[:16]}.pt"
    uri = storage.join(_folder(run_dir), name)
    storage.write_bytes(uri, data)
    for old in list_checkpoints(run_dir)[:-keep]:
        if not old.split("?")[0].endswith(name):
            storage.delete(old)
    for file in storage.list_files(_folder(run_dir)):
        if _PART.search(file.split("?")[0]):  # of a process that was killed while it wrote: only one writes at a time
            storage.delete(file)
    return uri


def load_newest(run_dir: str, device: torch.device) -> dict[str, Any] | None:
    """The newest checkpoint whose content fits its checksum, or None; damaged ones are passed over with a warning."""
    for uri in reversed(list_checkpoints(run_dir)):
        data = storage.read_bytes(uri)
        match = _NAME.search(uri.split("?")[0])
        if match and sha256(data).hexdigest().startswith(match[3]):
            state: dict[str, Any] = torch.load(io.BytesIO(data), map_location=device, weights_only=True)
            return state
        log.warning("checkpoint %s is damaged (its content does not match its checksum); trying the one before", uri)
    return None


class AsyncCheckpointer:
    """Writes checkpoints in a thread, one at a time: training goes on while they are packed, hashed and sent.

    What goes wrong there is raised by the next call of any method. begun_at: time.monotonic() when the last one was
    begun, or this object made. seconds: what the last one took.
    """

    def __init__(self, run_dir: str, *, keep: int) -> None:
        self._run_dir, self._keep = run_dir, keep
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self.begun_at, self.seconds = time.monotonic(), 0.0

    def save(self, state: dict[str, Any]) -> None:
        """Take a copy of `state`, see `save_checkpoint`, and begin to write it when the one before is complete."""
        self.wait()
        self.begun_at = time.monotonic()
        self._writing = self._thread.submit(self._write, _copied(state))

    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        if self._writing is not None and self._writing.done():
            self.wait()
        return self._writing is not None

    def wait(self) -> None:
        """Return when everything is written."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Wait, whatever comes of it, and end the thread."""
        self._thread.shutdown(wait=True)

    def _write(self, state: dict[str, Any]) -> None:
        began = time.monotonic()
        save_checkpoint(self._run_dir, state, keep=self._keep)
        self.seconds = time.monotonic() - began


def _copied(value: Any) -> Any:
    """The same on the CPU, shared with nobody."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(item) for item in value)
    return value
