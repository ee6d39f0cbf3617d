"""Faults: each waits until the run reaches a phase, by the status of the run, and then injects a failure.

The phase is in a later round than the previous fault. The delay within the phase and the process to kill are random,
deterministic in the seed.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from chaos.cluster import TestCluster, kill, wait_until
from raycluster.monitoring.status import Status, read_status

OUTAGE_SECONDS = 30.0
NOTICE_SECONDS = 15


@dataclass
class FaultContext:
    """A run into which faults are injected one after the other.

    round: the first in which the next fault may occur. moment: phase and round of the last fault. num_losses: failures
    in the status of the run before the last fault. stopped_at: time when the job was last stopped on purpose.
    compare_with: directory of a run to compare with, if it is not the reference run. cleanups: called at the end.
    """

    test_cluster: TestCluster
    folder: Path
    rng: random.Random
    options: list[str] = field(default_factory=list)
    run_dir: str = ""
    job: subprocess.Popen[bytes] | None = None
    round: int = 1
    moment: str = ""
    num_losses: int = 0
    stopped_at: float = 0.0
    compare_with: str | None = None
    cleanups: list[Callable[[], None]] = field(default_factory=list)

    def start(self, *options: str) -> None:
        """Start or restart the job."""
        words = [f"run.dir={self.run_dir}", *self.options, *options]
        self.job = self.test_cluster.start_job(self.folder / "run.yaml", *words, log=self.log)

    @property
    def log(self) -> Path:
        """The output of all jobs of the run."""
        return self.folder / "job.log"

    def status(self) -> Status | None:
        """The status of the run, None if it cannot be read now."""
        with suppress(Exception):
            return read_status(self.run_dir)
        return None

    def wait_for(self, phase: str) -> Status:
        """Wait for a phase of a round without faults, and then for a random delay."""

        def reached() -> Status | None:
            found = self.status()
            now = found is not None and found.workers > 0 and found.phase == phase and found.round >= self.round
            return found if now else None

        status = wait_until(reached, job=self.job)
        assert status is not None
        time.sleep(self.rng.uniform(0.0, 0.25 if phase != "training" else 1.5))
        self.moment, self.round = f"{phase}, round {status.round + 1}", status.round + 1
        status = self.status() or status
        self.num_losses = len(status.lost)
        return status

    def random_process(self, role: str) -> str:
        """One of the processes of a role, `train` or `features`."""
        processes = wait_until(lambda: (self.status() or Status()).processes.get(role), job=self.job)
        return self.rng.choice(list(processes or ()))

    def end_job(self, number: int) -> None:
        """Send a signal to the job and wait for its end."""
        assert self.job is not None
        self.job.send_signal(number)
        self.stopped_at = time.time()
        self.job.wait(timeout=300)

    def checkpoints(self) -> list[Path]:
        """The checkpoints of the run, oldest first."""
        return sorted((Path(self.run_dir) / "checkpoints").glob("round-*.pt"))


Fault = Callable[[FaultContext], None]


# ----------------------------------------------------------------------------------------------------- killed processes


def training_worker(phase: str) -> Fault:
    """Kill one training worker."""

    def fault(context: FaultContext) -> None:
        context.wait_for(phase)
        kill(context.random_process("train"))

    return fault


def all_training_workers(context: FaultContext) -> None:
    """Kill all training workers."""
    for process in context.wait_for("training").processes["train"]:
        kill(process)


def worker_twice(context: FaultContext) -> None:
    """Kill a training worker, and another one soon after the run has recovered."""
    before = context.wait_for("training").processes["train"]
    kill(context.random_process("train"))
    wait_until(
        lambda: (status := context.status()) and status.workers and status.processes["train"] != before, job=context.job
    )
    time.sleep(context.rng.uniform(0, 2))
    kill(context.random_process("train"))


def worker_while_writing(context: FaultContext) -> None:
    """Kill the first training worker while a checkpoint is partly written."""
    status = context.wait_for("training")
    folder = os.path.join(context.run_dir, "checkpoints")
    first = status.processes["train"][0]
    until = time.monotonic() + 120
    while not any(entry.name.endswith(".part") for entry in os.scandir(folder)):
        assert time.monotonic() < until, "no checkpoint was written"
        time.sleep(0.0005)
    kill(first)
    context.moment = "in a checkpoint write" if any(Path(folder).glob(".*.part")) else "right after a checkpoint write"


def pool_actor(phase: str) -> Fault:
    """Kill one actor of the feature pool."""

    def fault(context: FaultContext) -> None:
        context.wait_for(phase)
        kill(context.random_process("features"))

    return fault


# -------------------------------------------------------------------------------------------- nodes that leave and join


def node_removed(phase: str) -> Fault:
    """Kill all processes of a node."""

    def fault(context: FaultContext) -> None:
        context.wait_for(phase)
        context.test_cluster.remove_node(context.rng.choice(context.test_cluster.nodes))

    return fault


def node_added(context: FaultContext) -> None:
    """Add a node to a run with one worker."""
    context.wait_for("training")
    context.test_cluster.add_node()
    wait_until(lambda: (status := context.status()) and status.workers == 2, job=context.job)


def drained(phase: str) -> Fault:
    """Announce the preemption of a node, and kill it at the deadline."""

    def fault(context: FaultContext) -> None:
        context.wait_for(phase)
        node = context.rng.choice(context.test_cluster.nodes)
        context.test_cluster.drain_node(node, NOTICE_SECONDS)
        time.sleep(NOTICE_SECONDS)
        context.test_cluster.remove_node(node)

    return fault


# --------------------------------------------------------------------------------------------------------- stopped jobs


def job_killed(phase: str) -> Fault:
    """Kill the job and restart it."""

    def fault(context: FaultContext) -> None:
        context.wait_for(phase)
        context.end_job(signal.SIGKILL)
        context.start()

    return fault


def job_stopped(number: int, phase: str, workers: str) -> Fault:
    """Stop the job by a signal and restart it with another number of workers."""

    def fault(context: FaultContext) -> None:
        context.wait_for(phase)
        context.end_job(number)
        assert context.job is not None and context.job.returncode == 130, context.job
        context.start(f"run.workers={workers}")

    return fault


def second_job(context: FaultContext) -> None:
    """Start a second job on the same run directory, which must be refused."""
    context.wait_for("training")
    log = context.folder / "second.log"
    second = context.test_cluster.start_job(context.folder / "run.yaml", f"run.dir={context.run_dir}", log=log)
    assert second.wait(timeout=300) == 2, log.read_text()
    assert "is in use since" in log.read_text()


# -------------------------------------------------------------------------------------------------------------- storage


def truncated(context: FaultContext) -> None:
    """Truncate the newest checkpoint while no job runs."""
    context.wait_for("training")
    wait_until(lambda: len(context.checkpoints()) > 1, job=context.job)
    context.end_job(signal.SIGKILL)
    newest = context.checkpoints()[-1]
    os.truncate(newest, newest.stat().st_size // 2)
    context.start()


def disk_full(context: FaultContext) -> None:
    """Fill the disk of the run for half a minute."""
    disk = context.folder / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)], check=True)
    context.cleanups.append(lambda: _unmount(disk))
    context.run_dir = str(disk / "run")
    context.start()
    context.wait_for("training")
    filler = disk / "filler"
    with suppress(OSError), filler.open("wb") as file:
        while True:
            file.write(bytes(4096))
            file.flush()
    time.sleep(OUTAGE_SECONDS)
    filler.unlink()
    assert "The disk or quota is full" in context.log.read_text(), context.log.read_text()[-1000:]


def _unmount(disk: Path) -> None:
    subprocess.run(["umount", "--lazy", str(disk)], check=False)


def bucket_unreachable(context: FaultContext) -> None:
    """Refuse connections to the S3 server of the run for half a minute."""
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(inner := _free_port())],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    context.cleanups.append(server.kill)
    wait_until(lambda: _is_listening(inner), seconds=60)
    outer = _free_port()
    bucket = f"s3://chaos/run?endpoint_override=127.0.0.1:{outer}&scheme=http&region=us-east-1"
    with _proxy(outer, inner) as proxy:
        context.cleanups.append(proxy.close)
        _make_bucket(inner)
        context.run_dir = bucket
        context.start()
        context.wait_for("training")
        proxy.refusing = True
        time.sleep(OUTAGE_SECONDS)
        proxy.refusing = False
        assert context.job is not None
        context.job.wait(timeout=900)
        shutil.rmtree(context.folder / "copy", ignore_errors=True)
        _download(bucket, context.folder / "copy")
    context.run_dir = str(context.folder / "copy")
    assert "Waiting; trying again" in context.log.read_text(), context.log.read_text()[-1000:]


class FlakyProxy:
    """Forwards TCP connections to a server; refuses them while `refusing` is set."""

    def __init__(self, port: int, inner: int) -> None:
        self.refusing, self._closed, self._inner, self._port = False, False, inner, port
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closed = True

    def _serve(self) -> None:
        while not self._closed:
            with socket.socket() as listener:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(("127.0.0.1", self._port))
                listener.listen(64)
                listener.settimeout(0.1)
                while not (self.refusing or self._closed):
                    with suppress(TimeoutError):
                        client, _ = listener.accept()
                        self._forward(client)
            while self.refusing and not self._closed:
                time.sleep(0.1)

    def _forward(self, client: socket.socket) -> None:
        server = socket.create_connection(("127.0.0.1", self._inner))
        for source, target in ((client, server), (server, client)):
            threading.Thread(target=self._pump, args=(source, target), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            source.settimeout(0.2)
            while not self.refusing:
                with suppress(TimeoutError):
                    data = source.recv(1 << 16)
                    if not data:
                        break
                    target.sendall(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@contextmanager
def _proxy(port: int, inner: int) -> Iterator[FlakyProxy]:
    proxy = FlakyProxy(port, inner)
    try:
        wait_until(lambda: _is_listening(port), seconds=30)
        yield proxy
    finally:
        proxy.close()


def _make_bucket(port: int) -> None:
    from pyarrow import fs

    s3 = fs.S3FileSystem(
        endpoint_override=f"127.0.0.1:{port}", scheme="http", region="us-east-1", allow_bucket_creation=True
    )
    s3.create_dir("chaos")


def _download(uri: str, folder: Path) -> None:
    from raycluster.io import storage

    for info in storage.list_infos(uri, recursive=True):
        target = folder / info.path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(storage.read_bytes(storage.join(uri, *info.path.split("/"))))


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


# --------------------------------------------------------------------------------------------------------------- images


def broken_images(context: FaultContext) -> None:
    """Truncate five images of a shard while no job runs, and resume with fewer workers.

    The result is compared with that of one process that resumes from the same checkpoint with the same broken images:
    at which step a running job would meet them depends on timing.
    """
    images = context.folder / "images"
    _write_digits(images)
    context.options.append(f"data.uri={images}")
    context.start()
    context.wait_for("training")
    context.end_job(signal.SIGTERM)
    for path in sorted(images.iterdir())[400:405]:
        os.truncate(path, path.stat().st_size // 2)
    context.compare_with = str(context.folder / "copy")
    shutil.copytree(context.run_dir, context.compare_with)
    context.start("run.workers=1")
    assert context.job is not None
    context.job.wait(timeout=900)
    skipped = (Path(context.run_dir) / "skipped.jsonl").read_text().splitlines()
    assert len(skipped) == 5, skipped


def _write_digits(folder: Path) -> None:
    from PIL import Image
    from sklearn.datasets import load_digits

    folder.mkdir()
    for index, digit in enumerate(load_digits().images):
        Image.fromarray((digit * 15).astype("uint8")).save(folder / f"{index:04d}.png")


FAULTS: dict[str, Fault] = {
    "training worker killed while training": training_worker("training"),
    "training worker killed while extracting": training_worker("extracting"),
    "training worker killed while clustering": training_worker("clustering"),
    "training worker killed in a checkpoint write": worker_while_writing,
    "all training workers killed": all_training_workers,
    "training worker killed, and one more on recovery": worker_twice,
    "pool actor killed while extracting": pool_actor("extracting"),
    "pool actor killed while clustering": pool_actor("clustering"),
    "pool actor killed while training": pool_actor("training"),
    "node removed while extracting": node_removed("extracting"),
    "node removed while clustering": node_removed("clustering"),
    "node removed while training": node_removed("training"),
    "node added": node_added,
    "node drained while training": drained("training"),
    "node drained while extracting": drained("extracting"),
    "job killed while training": job_killed("training"),
    "job killed while extracting": job_killed("extracting"),
    "job killed while clustering": job_killed("clustering"),
    "job stopped by SIGTERM, 2 -> 1 workers": job_stopped(signal.SIGTERM, "training", "1"),
    "job interrupted while clustering, 1 -> 0 workers": job_stopped(signal.SIGINT, "clustering", "0"),
    "job interrupted while extracting, 0 -> 2 workers": job_stopped(signal.SIGINT, "extracting", "2"),
    "second job on the same directory": second_job,
    "newest checkpoint truncated": truncated,
    "disk full for 30 s": disk_full,
    "bucket unreachable for 30 s": bucket_unreachable,
    "images truncated in the middle of a shard": broken_images,
}
