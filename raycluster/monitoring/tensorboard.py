"""TensorBoard event files of a run, local or in an object store."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from raycluster.io import storage
from raycluster.types import UserError

WRITE_SECONDS = 30.0  # a round may take to be written


class TensorBoard:
    """Writes scalars per round; for an object store to a local folder, copied after each round.

    uri: of the folder of event files. The writer waits for its own thread, which dies when the disk is full. It gets
    `WRITE_SECONDS`; after that no more is written.
    """

    def __init__(self, uri: str) -> None:
        filesystem, path = storage.filesystem(uri)
        self._target = None if filesystem.type_name == "local" else uri
        self._folder = Path(path if self._target is None else tempfile.mkdtemp(prefix="tensorboard-"))
        self._writer: SummaryWriter | None = None
        self._works = True

    def write(self, record: dict[str, Any]) -> None:
        """Add the numbers of a round."""
        self._run_with_timeout(lambda: self._write(record))

    def _run_with_timeout(self, task: Callable[[], None]) -> None:
        done = threading.Event()

        def attempt() -> None:
            with suppress(OSError):
                task()
                done.set()

        if self._works:
            threading.Thread(target=attempt, name="tensorboard", daemon=True).start()
            self._works = done.wait(WRITE_SECONDS)

    def _write(self, record: dict[str, Any]) -> None:
        if self._writer is None:
            self._writer = SummaryWriter(str(self._folder), purge_step=record["step"])
        for name, value in record.items():
            if isinstance(value, (int, float)):
                self._writer.add_scalar(name, value, record["step"])
        self._writer.flush()
        self._copy()

    def _copy(self) -> None:
        if self._target is not None:
            with suppress(UserError):  # the next round copies everything again
                for file in self._folder.iterdir():
                    storage.write_bytes(storage.join(self._target, file.name), file.read_bytes())

    def close(self) -> None:
        """Flush and close the event files."""
        if self._writer is not None:
            self._run_with_timeout(self._writer.close)
