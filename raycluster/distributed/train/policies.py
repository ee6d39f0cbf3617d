"""How many workers and what after a loss: Ray's questions, put to `raycluster.decisions`.

Ray's own policies restart the group to resize it without telling anybody, decide with reservations that may be 20
seconds old, and count what they restart for. These differ in that alone. Ray is pinned to one minor version, for its
policies are no public interface.
"""

from __future__ import annotations

import re
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.context import TrainRunContext
from ray.train.v2._internal.execution.failure_handling.default import (
    RETRYABLE_CONTROLLER_ERRORS,
    _is_preemption_failure,
)
from ray.train.v2._internal.execution.failure_handling.failure_policy import FailureDecision, FailurePolicy
from ray.train.v2._internal.execution.scaling_policy import (
    FixedScalingPolicy,
    NoopDecision,
    ScalingPolicy,
)
from ray.train.v2._internal.execution.scaling_policy.autoscaling_coordinator_client import (
    TrainAutoscalingCoordinatorClient,
)
from ray.train.v2.api.config import FailureConfig, ScalingConfig
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

from raycluster.distributed.train.autoscaler import FeasibleScalingPolicy
from raycluster.events import FailureEvent
from raycluster.run.policy import Failure, after_failure

_ANSWER_SECONDS = 10.0
_COLLATERAL = re.compile("gloo|nccl|connection (closed|reset|refused)|broken pipe|socket", re.IGNORECASE)


class _FreshReservations:
    """What the cluster has reserved for the run now: without nodes that died or are about to."""

    _autoscaling_coordinator: Any
    _requester_id: str | None

    def _get_reserved_resources(self) -> Any:
        try:
            reserved = ray.get(
                self._autoscaling_coordinator.get_reserved_resources.remote(self._requester_id, recompute=True),
                timeout=_ANSWER_SECONDS,
            )
            leaving = draining_nodes()
        except Exception:  # a moment of trouble on the head; it is asked again
            return None
        return {node: resources for node, resources in reserved.items() if node not in leaving}


class _Requester(ScalingPolicy):
    """Asks for machines under the name of the run: a job that goes on takes the place of one that was killed.

    Under a name of its own, as Ray has it, it would wait three minutes, until what the dead job asked for expires.
    """

    _name: str

    def after_controller_start(self, train_run_context: TrainRunContext) -> None:
        self._requester_id = f"raycluster-{self._name}"
        self._coordinator_client = TrainAutoscalingCoordinatorClient(self._requester_id)
        self._send_resource_request()


class FixedSizePolicy(_Requester, FixedScalingPolicy):
    """The same number of workers from the beginning to the end."""

    def __init__(self, scaling_config: ScalingConfig, name: str) -> None:
        super().__init__(scaling_config)
        self._name = name


class CheckpointBeforeResizePolicy(_Requester, _FreshReservations, FeasibleScalingPolicy):
    """Elastic, but a running group is restarted in another size only when its workers have saved and let go."""

    def __init__(self, scaling_config: ScalingConfig, name: str, channel: ActorHandle) -> None:
        super().__init__(scaling_config)
        self._name, self._channel, self._proposed = name, channel, False

    def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> Any:
        if not self._proposed:
            decision = super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
            self._proposed = not isinstance(decision, NoopDecision)
            if not self._proposed:
                return decision
        self._maybe_send_resource_request()
        reserved = self._get_reserved_resources()
        size = self._count_possible_workers(reserved) if reserved is not None else 0
        if size == worker_group_state.num_workers or size < self.scaling_config.min_workers:
            self._proposed = False
            self._channel.withdraw.remote()
            return NoopDecision()
        try:
            allow_restart = ray.get(self._channel.propose.remote(size), timeout=_ANSWER_SECONDS)
        except Exception:  # the line is being restarted; it is asked again
            return NoopDecision()
        return self._get_resize_decision(size) if allow_restart else NoopDecision()

    def make_decision_for_non_running_worker_group(self) -> Any:
        if self._proposed:
            self._proposed = False
            self._channel.withdraw.remote()
        return super().make_decision_for_non_running_worker_group()


class RetryFailurePolicy(FailurePolicy):
    """Starts the group again as `after_failure` says, and tells the job why."""

    def __init__(self, failure_config: FailureConfig, channel: ActorHandle) -> None:
        super().__init__(failure_config)
        self._channel, self._failures = channel, 0

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        error = training_failed_error
        if isinstance(error, ControllerError) and not isinstance(error.controller_failure, RETRYABLE_CONTROLLER_ERRORS):
            return FailureDecision.RAISE
        if _is_preemption_failure(error):
            failure = Failure("preemption")
        elif isinstance(error, ControllerError):
            failure = Failure("start")
        else:
            self._failures += 1
            failure = Failure("worker", self._failures, self.failure_config.max_failures)
        verdict = after_failure(failure)
        if verdict.why:
            self._channel.publish.remote(FailureEvent(f"{verdict.why}{reason(error)}"))
        return FailureDecision.RETRY if verdict.restart else FailureDecision.RAISE


def scaling_policy(scaling_config: ScalingConfig, name: str, channel: ActorHandle | None) -> ScalingPolicy:
    """The policy for a fixed or an elastic number of workers. name: of the run, the same for all of its jobs."""
    if channel is None or not scaling_config.elasticity_enabled:
        return FixedSizePolicy(scaling_config, name)
    return CheckpointBeforeResizePolicy(scaling_config, name, channel)


def draining_nodes() -> set[str]:
    """Nodes that will be taken away."""
    return set(ray._private.state.state.get_draining_nodes())


def is_loss(error: BaseException) -> bool:
    """Whether a failure of training is the machines' fault: a process died, or the others missed it."""
    if not isinstance(error, WorkerGroupError):
        return False
    return any(
        isinstance(failure, (WorkerHealthCheckFailedError, ray.exceptions.RayActorError))
        or _COLLATERAL.search(str(failure))
        for failure in error.worker_failures.values()
    )


def reason(error: TrainingFailedError) -> str:
    """In parentheses, what is known of the worker that died, else of the first that failed; "" if nothing is."""
    failures = getattr(error, "worker_failures", {})
    if not failures:
        return ""
    dead = [rank for rank, failure in failures.items() if isinstance(failure, WorkerHealthCheckFailedError)]
    rank = (dead or sorted(failures))[0]
    failure = getattr(failures[rank], "health_check_failure", failures[rank])
    lines = [channel.strip() for channel in str(failure).splitlines() if channel.strip()]
    said = next(
        (channel for channel in reversed(lines) if re.match(r"[\w.]+(Error|Exception|Failed|Lost\w*)\b", channel)), ""
    )
    return f" (number {rank}: {(said or ' '.join(lines[:1]))[:200]})"
