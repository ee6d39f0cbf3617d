"""Nodes and processes are killed and added from outside; `jobs/chaos.py` injects the other faults."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from chaos.cluster import TestCluster, kill
from chaos.rig import Scenario, make_context, run_reference, run_scenario

from raycluster.distributed.train.trainer import fit
from raycluster.monitoring.status import Status, read_status
from raycluster.run.config import Config
from raycluster.types import UserError

pytestmark = [pytest.mark.ray, pytest.mark.slow]

Tiny = Callable[..., Config]
NO_CHECKPOINTS_WITHIN_ROUNDS = ("run.checkpoint_minutes=60",)


@pytest.fixture(scope="module")
def cluster() -> Iterator[TestCluster]:
    with TestCluster() as running:
        yield running


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> str:
    run_dir = str(tmp_path_factory.mktemp("reference"))
    run_reference(run_dir, ())
    return run_dir


def test_lost_and_added_nodes_and_workers(cluster: TestCluster, reference: str, tmp_path: Path) -> None:
    faults = ("training worker killed while clustering", "node removed while training", "node added")
    scenario = Scenario(faults, NO_CHECKPOINTS_WITHIN_ROUNDS)
    outcomes = run_scenario(scenario, make_context(scenario, cluster, tmp_path, seed=0), reference)
    assert {outcome.result for outcome in outcomes} == {"identical"}, outcomes
    assert outcomes[2].repeated == 0, "growth waits for a checkpoint"
    status = read_status(str(tmp_path / "run"))
    assert status is not None and status.phase == "finished"
    assert len(status.lost) == 3 and all(loss.recovery_seconds for loss in status.lost)


def test_more_losses_than_max_failures_end_the_run(ray_cluster: None, tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(tmp_path, "training.epochs=50", "run.workers=1", "run.max_failures=0")

    def kill_the_worker() -> None:
        while not (status := _status(tmp_path)).workers or status.phase != "training":
            time.sleep(0.05)
        kill(status.processes["train"][0], signal.SIGKILL)

    threading.Thread(target=kill_the_worker, daemon=True).start()
    with pytest.raises(UserError, match=r"lost more than run\.max_failures = 0 times, the last time \(rank 0: .*same"):
        fit(config)
    status = _status(tmp_path)
    assert status.phase == "failed" and "max_failures" in status.note
    assert json.loads((tmp_path / "status.json").read_text())["processes"] == {}
    assert os.path.exists(tmp_path / "checkpoints")


def _status(run_dir: Path) -> Status:
    return read_status(str(run_dir)) or Status()
