"""Jobs as a user runs them: submitted to a cluster or started in a shell, killed, stopped, and run again."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from raycluster.run.checkpoint import load_newest
from raycluster.run.config import Config
from raycluster.run.local_workers import LocalWorkers
from raycluster.run.loop import pretrain

pytestmark = [pytest.mark.ray, pytest.mark.slow]

Tiny = Callable[..., Config]
ROOT = Path(__file__).parent.parent.parent
BIN = Path(sys.executable).parent
PATIENCE_SECONDS = 150
OFTEN = "run.checkpoint_minutes=1e-9"


@pytest.fixture(scope="module")
def yaml_file(tmp_path_factory: pytest.TempPathFactory, tiny_yaml: str) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(tiny_yaml.replace("epochs: 2", "epochs: 12"))
    return path


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny: Tiny) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    list(pretrain(tiny(folder, "training.epochs=12"), LocalWorkers()))
    return folder


def assert_same(run: Path, other: Path) -> None:
    assignments, others = (
        [json.loads(line)["assignments"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (run, other)
    )
    assert assignments == others
    one, two = (load_newest(str(folder), torch.device("cpu")) for folder in (run, other))
    assert one is not None and two is not None
    assert all(torch.equal(tensor, two["network"][name]) for name, tensor in one["network"].items())


def wait_for(what: Callable[[], object]) -> None:
    until = time.monotonic() + PATIENCE_SECONDS
    while not what():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.05)


def within_rounds(run: Path) -> set[str]:
    """The checkpoints taken in the middle of a round, after which step depends on the speed of the machine."""
    return {path.name for path in (run / "checkpoints").glob("*-step-*.pt") if "-step-0000000-" not in path.name}


# ---------------------------------------------------------------------------------------------------------- in a shell


def start_job(*words: object) -> subprocess.Popen[str]:
    command = [sys.executable, "jobs/pretrain.py", *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": "."}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_interrupted_in_every_way_and_run_again_equals_undisturbed(
    undisturbed: Path, yaml_file: Path, tmp_path: Path
) -> None:
    words = [yaml_file, f"run.dir={tmp_path}", OFTEN]
    for number, workers in ((signal.SIGKILL, 0), (signal.SIGTERM, 0), (signal.SIGINT, 2)):
        before = within_rounds(tmp_path)
        job = start_job(*words, f"run.workers={workers}")
        wait_for(lambda job=job, before=before: within_rounds(tmp_path) - before or job.poll() is not None)  # type: ignore[misc]
        job.send_signal(number)
        out, _ = job.communicate(timeout=PATIENCE_SECONDS)
        assert not (tmp_path / "report.json").exists(), out
        assert ("resuming in round" in out) == bool(before)
        if number == signal.SIGKILL:
            assert job.returncode == -signal.SIGKILL
        else:
            assert job.returncode == 130, out
            assert "Traceback" not in out
            assert re.search(r"\nstopped .*; the same command (goes on|resumes) .*\n$", out), out

    job = start_job(*words)
    out, _ = job.communicate(timeout=PATIENCE_SECONDS)
    assert job.returncode == 0, out
    assert_same(tmp_path, undisturbed)


# -------------------------------------------------------------------------------------------------------- on a cluster


class Cluster(NamedTuple):
    """A head that was started by hand, and what a client must have in its environment."""

    environment: dict[str, str]
    folder: Path

    def ray(self, *words: str) -> subprocess.CompletedProcess[str]:
        command = [str(BIN / "ray"), "job", *words]
        return subprocess.run(
            command, env=self.environment, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600
        )

    def submit(self, name: str, *words: object, wait: bool, job: str = "pretrain") -> subprocess.CompletedProcess[str]:
        options = ["submit", "--submission-id", name, "--working-dir", "."] + ["--no-wait"] * (not wait)
        for _ in range(5):
            done = self.ray(*options, "--", str(BIN / "python"), f"jobs/{job}.py", *map(str, words))
            if "No available agent" not in done.stdout + done.stderr:  # else the cluster has only just started
                break
        return done


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """`ray start --head` with token authentication, on ports of its own, in a session of its own."""
    folder = Path(tempfile.mkdtemp(prefix="rj-", dir="/tmp"))
    port, dashboard, client, agent = free_ports(4)
    environment = {
        **os.environ,
        "HOME": str(folder),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_ADDRESS": f"http://127.0.0.1:{dashboard}",
    }
    words = f"start --head --block --port={port} --dashboard-port={dashboard} --ray-client-server-port={client}".split()
    words.append('--resources={"train_slot": 1}')
    words.append(f"--dashboard-agent-listen-port={agent}")  # other clusters of this machine use the default
    head_environment = {key: value for key, value in environment.items() if key != "RAY_ADDRESS"}
    with (folder / "head.log").open("w") as log:
        head = subprocess.Popen(
            [str(BIN / "ray"), *words, "--num-cpus=2", "--object-store-memory=200000000", f"--temp-dir={folder / 'r'}"],
            env=head_environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    found = Cluster(environment, folder)
    try:
        wait_for(lambda: answers(dashboard))
        yield found
    finally:
        head.terminate()
        try:
            head.wait(timeout=15)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [int(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def driver(run: Path) -> int:
    """The process that trains: the one python whose command line names the run directory."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if f"run.dir={run}".encode() in words and words[0].endswith(b"python"):
                return int(entry.name)
    raise AssertionError("no driver")


def test_submitted_killed_and_submitted_again_equals_undisturbed(
    cluster: Cluster, undisturbed: Path, yaml_file: Path, tmp_path: Path
) -> None:
    words = [yaml_file, f"run.dir={tmp_path}", OFTEN]
    sent = cluster.submit("first", *words, wait=False)
    assert sent.returncode == 0, sent.stdout + sent.stderr
    wait_for(lambda: within_rounds(tmp_path))
    os.kill(driver(tmp_path), signal.SIGKILL)
    assert not (tmp_path / "report.json").exists()

    done = cluster.submit("second", *words, wait=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resuming in round" in done.stdout and "pre-trained" in done.stdout
    assert_same(tmp_path, undisturbed)
    assert "failed" in cluster.ray("status", "first").stdout.lower()
    packages = list((cluster.folder / "r").glob("session_*/runtime_resources/working_dir_files/*"))
    uploaded = sum(path.stat().st_size for folder in packages for path in folder.rglob("*") if path.is_file())
    assert packages and uploaded < 5_000_000, "something that .gitignore should name was uploaded"


def test_user_errors_are_printed_unchanged(cluster: Cluster, yaml_file: Path, tmp_path: Path) -> None:
    done = cluster.submit("wrong", yaml_file, f"run.dir={tmp_path}", "data.uri=/nowhere", wait=True)
    assert done.returncode != 0
    assert "error: data.uri = /nowhere: there is nothing at /nowhere" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_a_submitted_sweep_releases_the_workers_of_stopped_trials(
    cluster: Cluster, yaml_file: Path, tmp_path: Path
) -> None:
    """There is one training slot: a trial that starts after another was stopped shows that its worker was released."""
    search = ["search={method.num_clusters: [10, 20, 40]}", "run.workers=1", "training.epochs=2", "run.actors=1"]
    judged = ["sweep.objective=loss", "sweep.direction=min", "sweep.early_stopping=asha", "sweep.grace_epochs=1"]
    words = [yaml_file, f"run.dir={tmp_path}", *search, *judged, "sweep.reduction=2", "seed=1"]
    done = cluster.submit("sweep", *words, wait=True, job="tune")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "sweep.json").read_text())["trials"]
    assert [(row["values"]["method.num_clusters"], row["status"]) for row in rows] == [
        (20, "finished"),
        (40, "stopped"),
        (10, "finished"),
    ]
    assert (tmp_path / "best").resolve() == tmp_path / "trials" / "002"
    assert "page: " in done.stdout and (tmp_path / "sweep.html").exists()
