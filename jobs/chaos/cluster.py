"""A cluster of several nodes on one machine, to break things on: real processes of Ray, killed from outside."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ray.cluster_utils import Cluster

from raycluster.distributed.session import TRAIN_SLOT

PATIENCE_SECONDS = 600.0
_LOOK_SECONDS = 0.02


class TestCluster:
    """A head, which runs the jobs, and nodes that offer one training slot each. A context manager."""

    def __init__(self, num_nodes: int = 2) -> None:
        self._num_nodes = num_nodes
        self.nodes: list[Any] = []

    def __enter__(self) -> TestCluster:
        self._folder = tempfile.mkdtemp(prefix="rs-", dir="/tmp")  # sockets lie below: their paths may have 107 letters
        (Path(self._folder) / "ray").mkdir()
        self._before = os.environ.get("RAY_TMPDIR")
        os.environ["RAY_TMPDIR"] = self._folder  # else it would become the default cluster of this machine
        os.environ.update(
            RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0", RAY_worker_niceness="0", RAY_DEDUP_LOGS="0"
        )
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):  # of the bucket that will be out of reach
            os.environ.setdefault(name, "chaos")
        head = {
            "num_cpus": 2,
            "object_store_memory": 200_000_000,
            "include_dashboard": False,
            "temp_dir": self._folder,
        }
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.restore()
        return self

    def __exit__(self, *error: object) -> None:
        self.cluster.shutdown()
        os.environ.pop("RAY_TMPDIR")
        if self._before is not None:
            os.environ["RAY_TMPDIR"] = self._before
        shutil.rmtree(self._folder, ignore_errors=True)

    def restore(self) -> None:
        """As many nodes as in the beginning."""
        while len(self.nodes) < self._num_nodes:
            self.add_node()
        while len(self.nodes) > self._num_nodes:
            self.remove_node(self.nodes[-1])

    def add_node(self) -> Any:
        """A new node; returns when it has joined."""
        has: dict[str, Any] = {"num_cpus": 1, "resources": {TRAIN_SLOT: 1}, "object_store_memory": 150_000_000}
        node = self.cluster.add_node(**has)
        self.nodes.append(node)
        return node

    def remove_node(self, node: Any) -> None:
        """The machine vanishes: every process of it dies at once."""
        self.nodes.remove(node)
        self.cluster.remove_node(node, allow_graceful=False)

    def drain_node(self, node: Any, seconds: int) -> None:
        """The notice of a spot machine: it goes away after so many seconds."""
        ray = str(Path(sys.executable).parent / "ray")
        words = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot machine"]
        where = ["--address", self.cluster.address, "--node-id", node.node_id]
        subprocess.run([ray, "drain-node", *where, *words, "--deadline-remaining-seconds", str(seconds)], check=True)

    def start_job(self, *words: object, log: Path) -> subprocess.Popen[bytes]:
        """`python jobs/pretrain.py ...` on this cluster, in a process group of its own."""
        root = Path(__file__).parent.parent.parent
        environment = {
            **os.environ,
            "RAY_ADDRESS": self.cluster.address,
            "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
            "OMP_NUM_THREADS": "1",
        }
        with log.open("ab") as out:
            return subprocess.Popen(
                [sys.executable, "jobs/pretrain.py", *map(str, words)],
                cwd=root,
                env=environment,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )


def kill(process: str, number: int = signal.SIGKILL) -> None:
    """Send a signal to a process as a status names it, "host:pid"."""
    os.kill(int(process.rpartition(":")[2]), number)


def wait_until(what: Any, *, job: subprocess.Popen[bytes] | None = None, seconds: float = PATIENCE_SECONDS) -> Any:
    """The first true answer. Raises TimeoutError when time is up, or when the job ended before."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found = what()
        if found:
            return found
        if job is not None and job.poll() is not None:
            raise TimeoutError(f"the job ended with exit code {job.returncode} before it happened")
        time.sleep(_LOOK_SECONDS)
    raise TimeoutError(f"waited {seconds:.0f} s in vain")
