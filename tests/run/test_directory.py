"""Files of a run directory with 200 seeded damages each: read, or refused with a UserError."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from raycluster.io.run_paths import RunPaths
from raycluster.monitoring.console import summary
from raycluster.monitoring.status import Loss, Status, read_status, write_status
from raycluster.monitoring.summary import overview
from raycluster.monitoring.tracker import StatusTracker, StatusWriter
from raycluster.run.config import Config
from raycluster.run.directory import check_directory, differences, holds_run, read_report, write_config, write_report
from raycluster.run.lease import Lease, acquire_lease, read_lease
from raycluster.types import UserError
from tests.damage import damages, json_damages

NOW = 2_000_000_000.0
STATUS = Status(
    phase="training",
    round=2,
    rounds=12,
    steps=391,
    workers=4,
    processes={"job": ["head:17"]},
    started_at=NOW - 7800,
    updated_at=NOW - 3,
    seconds_left=3900.5,
    worker_seconds=7200,
    saved={"round": 2, "step": 100, "at": NOW - 130},
    lost=(Loss(at=NOW - 600, what="node 10.0.0.7 was lost", steps_repeated=40, recovery_seconds=43),),
)
REPORT = {
    "images": 300,
    "skipped": 2,
    "rounds": 12,
    "last_round": {"round": 11, "loss": 1.5, "nmi_labels": 0.5},
    "accuracies": {"untrained": {"knn_accuracy": 0.5}, "pre-trained": {"knn_accuracy": 0.75}},
}


def variants(content: bytes) -> list[bytes]:
    return [*damages(content, 200), *json_damages(content, 200)]


def test_status(tmp_path: Path) -> None:
    write_status(str(tmp_path), STATUS)
    file, refused = tmp_path / "status.json", 0
    for data in variants(file.read_bytes()):
        file.write_bytes(data)
        try:
            found = read_status(str(tmp_path))
        except UserError as error:
            refused += 1
            assert "status.json is damaged" in str(error)
            continue
        overview(str(tmp_path), now=NOW, price=0.5)
        StatusTracker(NOW, found).at(NOW + 5)
    assert refused > 200


@pytest.mark.parametrize("content", [b"[]", b"null", b"", b'{"lost": [1]}', b'{"round": "a"}'])
def test_a_damaged_status_stops_no_job(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "status.json").write_bytes(content)
    with StatusWriter(str(tmp_path)):
        pass
    status = read_status(str(tmp_path))
    assert status is not None and status.phase == "finished"


def test_lease(tmp_path: Path) -> None:
    lease = Lease("token", "host", 17, "machine", "12345", "", NOW, NOW)
    file = tmp_path / "lease.json"
    read = 0
    for data in variants(json.dumps(asdict(lease)).encode()):
        file.write_bytes(data)
        found = read_lease(str(tmp_path))
        read += found is not None
        assert found is None or (0 < found.pid < 2**31 and found.heartbeat_at >= 0)
    assert read > 10
    for changes in ({"pid": []}, {"pid": 0}, {"since": "x"}, {"heartbeat_at": float("nan")}):
        file.write_text(json.dumps({**asdict(lease), **changes}))
        with acquire_lease(str(tmp_path), lost=print):
            pass


def test_report(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    write_report(str(tmp_path), REPORT)
    assert read_report(str(tmp_path)) == REPORT
    file, read = tmp_path / "report.json", 0
    for data in variants(file.read_bytes()):
        file.write_bytes(data)
        found = read_report(str(tmp_path))
        assert holds_run(str(tmp_path)), "results are never overwritten by a new run"
        if found is not None:
            read += 1
            summary(found, str(tmp_path))
    assert read > 10


def test_config(tmp_path: Path, tiny: Callable[..., Config]) -> None:
    config = tiny(tmp_path)
    write_config(str(tmp_path), config)
    assert differences(str(tmp_path), config) == []
    file, refused = Path(RunPaths(str(tmp_path)).config), 0
    for data in damages(file.read_bytes(), 200):
        file.write_bytes(data)
        try:
            differences(str(tmp_path), config)
        except UserError as error:
            refused += 1
            assert "config.yaml is damaged" in str(error)
    assert refused > 50


def test_a_config_that_is_not_utf8_is_named(tmp_path: Path, tiny: Callable[..., Config]) -> None:
    (tmp_path / "config.yaml").write_bytes("seed: 0 # Größe".encode("latin-1"))
    write_report(str(tmp_path), REPORT)
    with pytest.raises(UserError, match=r"config\.yaml is damaged \('utf-8' codec"):
        check_directory(str(tmp_path), tiny(tmp_path), "auto")
