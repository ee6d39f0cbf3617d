"""Reading Ray Train's errors: whether a worker was lost, and why."""

from __future__ import annotations

import re

import ray
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

from raycluster.distributed.ray_internals import is_health_check_failure

_COLLATERAL = re.compile("gloo|nccl|connection (closed|reset|refused)|broken pipe|socket", re.IGNORECASE)
_ERROR_LINE = re.compile(r"[\w.]+(Error|Exception|Failed|Lost\w*)\b")


def is_worker_loss(error: BaseException) -> bool:
    """Whether training failed because a process or machine was lost, or because the others missed it."""
    if not isinstance(error, WorkerGroupError):
        return False
    return any(
        is_health_check_failure(failure)
        or isinstance(failure, ray.exceptions.RayActorError)
        or _COLLATERAL.search(str(failure))
        for failure in error.worker_failures.values()
    )


def describe_loss(error: TrainingFailedError) -> str:
    """In parentheses, what is known of the worker that died, else of the first that failed; "" if nothing is."""
    failures = getattr(error, "worker_failures", {})
    if not failures:
        return ""
    dead = [rank for rank, failure in failures.items() if is_health_check_failure(failure)]
    rank = (dead or sorted(failures))[0]
    failure = getattr(failures[rank], "health_check_failure", failures[rank])
    lines = [line.strip() for line in str(failure).splitlines() if line.strip()]
    reason = next((line for line in reversed(lines) if _ERROR_LINE.match(line)), " ".join(lines[:1]))
    return f" (rank {rank}: {reason[:200]})"
