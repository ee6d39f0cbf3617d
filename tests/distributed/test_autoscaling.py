"""A real autoscaler on one machine: the run requests nodes, grows with them, survives the loss of one, releases all."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray._private.services
import torch

from raycluster.events import Round
from raycluster.monitoring.status import Status, read_status
from raycluster.run.checkpoint import load_newest
from raycluster.run.config import Config
from raycluster.run.local_workers import LocalWorkers
from raycluster.run.loop import pretrain

pytestmark = [pytest.mark.ray, pytest.mark.slow]

Tiny = Callable[..., Config]
ROOT = Path(__file__).parent.parent.parent
PATIENCE_SECONDS = 240
EPOCHS = 10_000  # more than the test lasts
STOPPED = 130  # the exit code of a job that was asked to stop
HEAD_TYPE = "ray.head.default"  # the name that the provider expects
HEAD_ID = "fffffffffffffffffffffffffffffffffffffffffffffffffff00000"  # the provider's first


class AutoscalingCluster:
    """A head whose autoscaler starts raylets on this machine as its nodes, all in one session of processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        ports = free_ports(4)
        self.address = f"{ray._private.services.get_node_ip_address()}:{ports[0]}"
        self.config = folder / "cluster.json"
        self.allow(1)
        names = ("port", "dashboard-port", "ray-client-server-port", "dashboard-agent-listen-port")
        words = [f"--{name}={port}" for name, port in zip(names, ports, strict=True)]
        words += ["--num-cpus=1", "--object-store-memory=100000000", "--disable-usage-stats"]
        words += [f"--autoscaling-config={self.config}", f"--temp-dir={folder / 'r'}"]
        with (folder / "head.log").open("w") as log:
            self.head = subprocess.Popen(
                [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", *words],
                env={**os.environ, **self._environment()},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _environment(self) -> dict[str, str]:
        return {
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_FAKE_CLUSTER": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
            "RAY_health_check_initial_delay_ms": "0",
            "RAY_health_check_period_ms": "500",
            "RAY_health_check_failure_threshold": "3",
            "HOME": str(self.folder),
        }

    def allow(self, num_nodes: int) -> None:
        """From now on the provider has so many nodes to give; the autoscaler reads it again before every decision."""
        node = {"resources": {"CPU": 1, "train_slot": 1}, "node_config": {}, "min_workers": 0, "max_workers": num_nodes}
        provider = {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": self.address,
            "head_node_id": HEAD_ID,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "launch_multiple": True,
        }
        setup = [f"{kind}setup_commands" for kind in ("", "head_", "worker_")]
        start = ["head_start_ray_commands", "worker_start_ray_commands"]
        config = {
            "cluster_name": "fake",
            "provider": provider,
            "max_workers": num_nodes,
            "idle_timeout_minutes": 0.05,
            "upscaling_speed": 1.0,
            "available_node_types": {
                HEAD_TYPE: {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
                "worker": node,
            },
            "head_node_type": HEAD_TYPE,
            **{name: [] for name in ("initialization_commands", *setup, *start, "cluster_synced_files")},
            **{name: {} for name in ("auth", "docker", "file_mounts")},
        }
        fresh = self.config.with_suffix(".new")
        fresh.write_text(json.dumps(config))
        fresh.replace(self.config)

    def nodes(self) -> list[psutil.Process]:
        """The raylets that the autoscaler started and that live."""
        return [one for one in self._processes() if is_raylet(one)]

    def _processes(self) -> list[psutil.Process]:
        return [one for one in psutil.process_iter() if session_of(one.pid) == self.head.pid]

    def stop(self) -> None:
        self.head.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.head.wait(timeout=15)
        for process in self._processes():
            with suppress(psutil.NoSuchProcess):  # gone between the listing and the kill
                process.kill()


def session_of(pid: int) -> int:
    try:
        return os.getsid(pid)
    except OSError:
        return -1


def is_raylet(process: psutil.Process) -> bool:
    try:
        words = process.cmdline()
    except psutil.Error:
        return False
    return bool(words) and words[0].endswith("/raylet") and "--head" not in words


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [int(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture
def cluster() -> Iterator[AutoscalingCluster]:
    folder = Path(tempfile.mkdtemp(prefix="ra-", dir="/tmp"))  # sockets lie below: their paths may have 107 characters
    found = AutoscalingCluster(folder)
    try:
        until = time.monotonic() + PATIENCE_SECONDS
        while "Ray runtime started" not in (told := (folder / "head.log").read_text()):
            assert found.head.poll() is None and time.monotonic() < until, told
            time.sleep(0.1)
        yield found
    finally:
        found.stop()
        shutil.rmtree(folder, ignore_errors=True)


def test_grows_with_nodes_survives_a_loss_and_releases_them(
    cluster: AutoscalingCluster, tiny: Tiny, tiny_yaml: str, tmp_path: Path
) -> None:
    run, path, log = tmp_path / "run", tmp_path / "tiny.yaml", tmp_path / "log"
    path.write_text(tiny_yaml)
    words = [f"run.dir={run}", f"training.epochs={EPOCHS}", "run.checkpoint_minutes=1e-9", "run.resize_seconds=0.5"]
    words += ["run.workers={min: 1, max: 2}", "run.device=cpu"]  # there is no node yet to detect it from
    with log.open("w") as out:
        job = subprocess.Popen(
            [sys.executable, "jobs/pretrain.py", str(path), *words],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": cluster.address},
            stdout=out,
            stderr=out,
        )

    def reach(what: str, happened: Callable[[], object]) -> None:
        began = time.monotonic()
        while not happened():
            assert job.poll() in (None, STOPPED), log.read_text()
            assert time.monotonic() < began + PATIENCE_SECONDS, f"waited in vain for {what}: {log.read_text()}"
            time.sleep(0.1)
        print(f"{time.monotonic() - began:5.1f} s until {what}", flush=True)

    def status() -> Status:
        return read_status(str(run)) or Status()

    def trains(workers: int) -> bool:
        return (status().phase, status().workers) == ("training", workers)

    try:
        reach("a node comes", cluster.nodes)
        reach("it trains", lambda: trains(1))
        cluster.allow(2)
        reach("another comes", lambda: len(cluster.nodes()) == 2)
        reach("both train", lambda: trains(2))
        began, told = status().round, len(status().lost)
        reach("they have finished a round", lambda: status().round > began)  # the restart is recovered from
        os.kill(cluster.nodes()[0].pid, signal.SIGKILL)
        reach("its loss is told", lambda: len(status().lost) > told)
        reach("another takes its place", lambda: len(cluster.nodes()) == 2)
        reach("both train again", lambda: trains(2))
        job.terminate()
        assert job.wait(timeout=PATIENCE_SECONDS) == STOPPED, log.read_text()
        reach("idle nodes go", lambda: not cluster.nodes())
    finally:
        job.kill()
        job.wait()

    overrides = words[1:4]
    through_round(tiny(run, *overrides), (state := newest(run))["round"])
    through_round(tiny(tmp_path / "undisturbed", *overrides), state["round"])
    assert_same(newest(run), newest(tmp_path / "undisturbed"))


def through_round(config: Config, last: int) -> None:
    """Resume in this process to the end of a round; the whole run would outlast the test."""
    for event in (events := pretrain(config, LocalWorkers())):
        if isinstance(event, Round) and event.record["round"] == last:
            break
    events.close()


def newest(run: Path) -> dict[str, Any]:
    found = load_newest(str(run), torch.device("cpu"))
    assert found is not None
    return found


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert (one["round"], one["step"]) == (other["round"], other["step"])
    records, others = ([record["assignments"] for record in found["records"]] for found in (one, other))
    assert records == others
    assert all(torch.equal(tensor, other["network"][name]) for name, tensor in one["network"].items())
