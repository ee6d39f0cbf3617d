"""Checkpoints between two steps, with workers that announce changes of the cluster."""

from __future__ import annotations

from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import ClassVar

import pytest

from raycluster.events import Event, FailureEvent, Progress, Saved, StatusNote
from raycluster.run.checkpoint import list_checkpoints
from raycluster.run.config import Config
from raycluster.run.local_workers import LocalWorkers
from raycluster.run.loop import pretrain
from raycluster.runtime.workers import PendingChange
from raycluster.types import Block, ChunkFailed, RunStopped, UserError

Tiny = Callable[..., Config]


class Announcing(LocalWorkers):
    """Announces `pending_change` from the second poll on, until a restart is allowed."""

    def __init__(self, pending_change: PendingChange) -> None:
        super().__init__()
        self._announced, self._polls, self.restart_allowed_after = pending_change, 0, 0.0

    def pending_change(self) -> PendingChange:
        self._polls += 1
        return self._announced if self._polls > 1 and not self.restart_allowed_after else PendingChange()

    def wait_for_restart(self, seconds: float) -> None:
        self.restart_allowed_after = seconds


def events_of(config: Config, workers: LocalWorkers) -> list[Event]:
    return list(pretrain(config, workers))


def saved_within_rounds(events: list[Event]) -> list[Saved]:
    return [event for event in events if isinstance(event, Saved) and event.step > 0]


def test_a_preemption_notice_causes_a_checkpoint_and_training_continues(tiny: Tiny, tmp_path: Path) -> None:
    workers = Announcing(PendingChange(notice_seconds=100.0))
    events = events_of(tiny(tmp_path, "training.epochs=1"), workers)
    (saved,) = saved_within_rounds(events)
    assert 1 < saved.step <= 1 + 8
    assert workers.restart_allowed_after == 0
    notes = [event.text for event in events if isinstance(event, StatusNote)]
    assert "a node is taken away in 100 s: saved" in notes


def test_before_a_node_is_taken_away_everything_is_saved_and_training_pauses(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(tmp_path, "training.epochs=1")
    workers = Announcing(PendingChange(notice_seconds=3.0))
    events = []
    for event in pretrain(config, workers):
        events.append(event)
        if workers.restart_allowed_after:
            break  # here the group ends
    steps = [event.done for event in events if isinstance(event, Progress) and event.phase == "training"]
    (saved,) = saved_within_rounds(events)
    assert saved.step == steps[-1]
    assert f"step-{saved.step:07d}" in list_checkpoints(config.run.dir)[-1], (
        "it is written before the restart is allowed"
    )


def test_a_resize_waits_for_a_checkpoint(tiny: Tiny, tmp_path: Path) -> None:
    workers = Announcing(PendingChange(resize=True))
    (saved,) = saved_within_rounds(events_of(tiny(tmp_path, "training.epochs=1"), workers))
    assert workers.restart_allowed_after > 0 and saved.step > 1


def test_an_undisturbed_run_saves_at_the_rounds_only(tiny: Tiny, tmp_path: Path) -> None:
    events = events_of(tiny(tmp_path), LocalWorkers())
    assert saved_within_rounds(events) == []
    assert [event.round for event in events if isinstance(event, Saved)] == [0, 1], "after each reassignment"


def test_a_stop_request_while_clustering_takes_effect_between_two_iterations(tiny: Tiny, tmp_path: Path) -> None:
    clustering: list[Event] = []
    workers = LocalWorkers(stopping=lambda: bool(clustering))
    with pytest.raises(RunStopped, match="stopped while clustering"):
        for event in pretrain(tiny(tmp_path), workers):
            if isinstance(event, Progress) and event.phase == "clustering":
                clustering.append(event)


class Failing(LocalWorkers):
    """Loading the second shard fails `failures` times."""

    def __init__(self, failures: int) -> None:
        super().__init__()
        self.failures = failures

    def stream(self, chunks, load):  # type: ignore[no-untyped-def]
        for chunk in chunks:
            if chunk.stream == 1 and self.failures:
                self.failures -= 1
                raise ChunkFailed(1, "MemoryError: no room")
            yield from load(chunk)


def test_a_shard_that_fails_is_tried_again(tiny: Tiny, tmp_path: Path) -> None:
    events = events_of(tiny(tmp_path / "1", "training.epochs=1"), Failing(1))
    (lost,) = [event for event in events if isinstance(event, FailureEvent)]
    assert lost.shards == 6, "whether the first is complete shows when the second begins"
    with pytest.raises(
        UserError, match=r"shard 1, the 300 images from digits/\S+ to \S+, failed twice: MemoryError: no room"
    ):
        events_of(tiny(tmp_path / "2", "training.epochs=1"), Failing(2))


def test_images_that_a_lost_worker_group_skipped_are_named_again(
    tiny: Tiny, tmp_path: Path, digits_folder: Path
) -> None:
    (digits_folder / "150.png").write_bytes(b"")
    options = [f"data.uri={digits_folder}", "data.shard_size=100", "data.max_broken_fraction=0.02", "training.epochs=1"]
    config = tiny(tmp_path / "run", *options)

    class Holding(LocalWorkers):
        """Starts with the features of a worker group that ended."""

        held: ClassVar[dict[int, Block]] = {}

        def missing(self, version, shards):  # type: ignore[no-untyped-def]
            self._version, self._blocks = version, self.held
            return [shard for shard in shards if shard not in self.held]

    first = Holding()
    list(
        takewhile(
            lambda event: not (isinstance(event, Progress) and event.phase == "clustering"), pretrain(config, first)
        )
    )
    Holding.held = first._blocks
    list(pretrain(config, Holding()))
    (line,) = (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()
    assert "150.png" in line and "it had no features" in line
