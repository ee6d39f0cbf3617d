"""A Ray cluster of several nodes on one machine, for fault injection."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from ray.cluster_utils import Cluster

from raycluster.distributed.session import TRAIN_SLOT

T = TypeVar("T")

TIMEOUT_SECONDS = 600.0
_POLL_SECONDS = 0.02


class TestCluster:
    """A head node, which runs the jobs, and nodes with one training slot each. A context manager."""

    __test__ = False  # for pytest

    def __init__(self, num_nodes: int = 2) -> None:
        self._num_nodes = num_nodes
        self.nodes: list[Any] = []

    def __enter__(self) -> TestCluster:
        with ExitStack() as stack:  # an interruption while the nodes start must also clean up
            # Sockets lie in the folder: their paths are limited to 107 characters.
            folder = stack.enter_context(
                tempfile.TemporaryDirectory(prefix="rs-", dir="/tmp", ignore_cleanup_errors=True)
            )
            (Path(folder) / "ray").mkdir()
            stack.callback(_set_variable, "RAY_TMPDIR", os.environ.get("RAY_TMPDIR"))
            self._set_environment(folder)
            head = {
                "num_cpus": 2,
                "object_store_memory": 200_000_000,
                "include_dashboard": False,
                "temp_dir": folder,
            }
            with _keep_sigterm_handler():
                self.cluster = Cluster(initialize_head=True, head_node_args=head)
            stack.callback(self.cluster.shutdown)
            self.restore()
            self._cleanup = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._cleanup.close()

    @staticmethod
    def _set_environment(folder: str) -> None:
        os.environ["RAY_TMPDIR"] = folder  # keeps it from becoming the default cluster of this machine
        os.environ.update(
            RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0", RAY_worker_niceness="0", RAY_DEDUP_LOGS="0"
        )
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):  # for the S3 server of a scenario
            os.environ.setdefault(name, "chaos")

    def restore(self) -> None:
        """Return to the initial number of nodes."""
        while len(self.nodes) < self._num_nodes:
            self.add_node()
        while len(self.nodes) > self._num_nodes:
            self.remove_node(self.nodes[-1])

    def add_node(self) -> Any:
        """Add a node; returns when it has joined."""
        resources: dict[str, Any] = {"num_cpus": 1, "resources": {TRAIN_SLOT: 1}, "object_store_memory": 150_000_000}
        with _keep_sigterm_handler():
            node = self.cluster.add_node(**resources)
        self.nodes.append(node)
        return node

    def remove_node(self, node: Any) -> None:
        """Kill all processes of a node at once."""
        self.nodes.remove(node)
        self.cluster.remove_node(node, allow_graceful=False)

    def drain_node(self, node: Any, seconds: int) -> None:
        """Announce the preemption of a node in `seconds` seconds, as spot machines do."""
        ray = str(Path(sys.executable).parent / "ray")
        words = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot machine"]
        where = ["--address", self.cluster.address, "--node-id", node.node_id]
        subprocess.run([ray, "drain-node", *where, *words, "--deadline-remaining-seconds", str(seconds)], check=True)

    def start_job(self, *words: object, log: Path) -> subprocess.Popen[bytes]:
        """Start `python jobs/pretrain.py ...` on this cluster, in a process group of its own. log: appended to."""
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


@contextmanager
def _keep_sigterm_handler() -> Iterator[None]:
    """Undo the replacement of the handler by Ray, whose own drains every node for 30 s before it exits."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


def _set_variable(name: str, value: str | None) -> None:
    os.environ.pop(name, None)
    if value is not None:
        os.environ[name] = value


def kill(process: str, number: int = signal.SIGKILL) -> None:
    """Send a signal to a process, given as "host:pid"."""
    os.kill(int(process.rpartition(":")[2]), number)


def wait_until(
    condition: Callable[[], T], *, job: subprocess.Popen[bytes] | None = None, seconds: float = TIMEOUT_SECONDS
) -> T:
    """Poll until the condition is true; returns its value. Raises TimeoutError after `seconds`, or if the job ends."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found = condition()
        if found:
            return found
        if job is not None and job.poll() is not None:
            raise TimeoutError(f"the job ended with exit code {job.returncode} before the condition held")
        time.sleep(_POLL_SECONDS)
    raise TimeoutError(f"the condition did not hold within {seconds:.0f} s")
