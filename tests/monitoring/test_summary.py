"""The summary of a run's status: alive, dead, ended, or absent."""

from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path

import pytest

from raycluster.monitoring.status import Loss, Status, write_status
from raycluster.monitoring.summary import duration, overview
from raycluster.types import UserError

NOW = 2_000_000_000.0
TRAINING = Status(
    phase="training",
    round=2,
    rounds=12,
    step=120,
    steps=391,
    workers=4,
    processes={"job": ["head:17"]},
    started_at=NOW - 7800,
    updated_at=NOW - 3,
    seconds_left=3900,
    worker_seconds=7200,
    worker_seconds_per_epoch=1800,
    skipped=3,
    saved={"round": 2, "step": 100, "at": NOW - 130},
    lost=(
        Loss(at=NOW - 600, what="node 10.0.0.7 was taken", steps_repeated=40, seconds_repeated=34, recovery_seconds=43),
        Loss(at=NOW - 20, what="a pool actor died", shards_repeated=2),
    ),
)


def summary_lines(folder: Path, status: Status, price: float | None = None) -> list[str]:
    write_status(str(folder), status)
    return overview(str(folder), now=NOW, price=price).splitlines()


def test_in_the_middle(tmp_path: Path) -> None:
    lines = summary_lines(tmp_path, TRAINING, price=0.8)
    assert lines[0] == f"{tmp_path}: training, with 4 workers"
    assert lines[1] == "round 3 of 12, step 120 of 391"
    assert lines[2].endswith("2 h 10 min ago; about 1 h 5 min left; newest checkpoint 2 min 10 s old")
    assert lines[3] == "cost 2 worker-hours (1.60), 0.5 worker-hours (0.40) per epoch"
    assert lines[4] == "3 images skipped, named in skipped.jsonl"
    assert lines[5:] == [
        "2 failures, 34 s of work repeated:",
        "  10 min ago: node 10.0.0.7 was taken; 40 steps repeated; recovered after 43 s",
        "  20 s ago: a pool actor died; 2 shards extracted again; not yet recovered",
    ]


def test_without_anything_to_tell(tmp_path: Path) -> None:
    lines = summary_lines(tmp_path, Status(started_at=NOW - 5, updated_at=NOW))
    assert lines[0] == f"{tmp_path}: starting, with 0 workers"
    assert lines[2:] == ["cost 0 worker-hours", "no failures"]


def test_other_phases(tmp_path: Path) -> None:
    extracting = replace(TRAINING, phase="extracting", done=3000, total=9000, note="the bucket does not answer")
    lines = summary_lines(tmp_path, extracting)
    assert lines[0].endswith("extracting 3000 of 9000, with 4 workers")
    assert "note: the bucket does not answer" in lines


def test_dead(tmp_path: Path) -> None:
    lines = summary_lines(tmp_path, replace(TRAINING, updated_at=NOW - 700))
    assert lines[0].endswith(
        "DEAD: no heartbeat of head:17 for 11 min 40 s, while training; run the same command again to resume"
    )


@pytest.mark.parametrize(("phase", "words"), [("finished", "finished"), ("stopped", "the same command resumes it")])
def test_over_is_not_dead(tmp_path: Path, phase: str, words: str) -> None:
    lines = summary_lines(tmp_path, replace(TRAINING, phase=phase, round=12, updated_at=NOW - 700))
    assert words in lines[0] and lines[0].endswith("11 min 40 s ago")
    assert lines[1] == "all 12 rounds are complete"


def test_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="that folder holds no run"):
        overview(str(tmp_path), now=NOW)
    with pytest.raises(UserError, match="there is no such folder"):
        overview(str(tmp_path / "nothing"), now=NOW)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_status(str(tmp_path), TRAINING)
    runpy.run_path(str(Path(__file__).parents[2] / "jobs" / "status.py"))["main"](str(tmp_path), "price=2")
    printed = capsys.readouterr().out
    assert "training, with 4 workers" in printed and "(4.00)" in printed


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (45, "45 s"), (60, "1 min"), (3700, "1 h 1 min"), (190000, "2 d 4 h")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
