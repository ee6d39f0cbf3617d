"""Checkpoints that know nothing of workers: one file each, written atomically, named after place and checksum."""

from __future__ import annotations

import io
import logging
import re
from hashlib import sha256
from typing import Any

import torch

from raycluster import storage

log = logging.getLogger(__name__)
_NAME = re.compile(r"round-(\d{5})-step-(\d{7})-([0-9a-f]{16})\.pt$")


def _folder(run_dir: str) -> str:
    return storage.join(run_dir, "checkpoints")


def list_checkpoints(run_dir: str) -> list[str]:
    """URIs of the checkpoints of a run, oldest first."""
    files = storage.list_files(_folder(run_dir)) if storage.exists(_folder(run_dir)) else []
    return sorted(uri for uri in files if _NAME.search(uri.split("?")[0]))


def list_places(run_dir: str) -> list[tuple[int, int]]:
    """(round, step) of each checkpoint, oldest first."""
    matches = (_NAME.search(uri.split("?")[0]) for uri in list_checkpoints(run_dir))
    return [(int(match[1]), int(match[2])) for match in matches if match]


def save_checkpoint(run_dir: str, state: dict[str, Any], *, keep: int) -> str:
    """Write `state` (tensors, numbers, strings, lists and dicts of these) and drop all but the newest `keep` ones.

    state["round"] and state["step"] name it. Nothing is dropped before the new one is complete, so a failed write (a
    full disk raises UserError) loses nothing.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getvalue()
    name = f"round-{state['round']:05d}-step-{state['step']:07d}-{sha256(data).hexdigest()[:16]}.pt"
    uri = storage.join(_folder(run_dir), name)
    storage.write_bytes(uri, data)
    for old in list_checkpoints(run_dir)[:-keep]:
        if not old.split("?")[0].endswith(name):
            storage.delete(old)
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
