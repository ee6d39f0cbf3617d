"""What happens after a lost worker group: Ray's failure policy asks `raycluster.run.policy`.

Ray's own policy counts every failure. This one has no limit for announced preemptions and for groups that found no
resources in time, and reports each restart to the job.
"""

from __future__ import annotations

from typing import Any

from ray.actor import ActorHandle
from ray.train.v2.api.config import FailureConfig
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError

from raycluster.distributed import ray_internals
from raycluster.distributed.train.worker_errors import describe_loss
from raycluster.events import FailureEvent
from raycluster.run.policy import Failure, after_failure

_FailurePolicy: Any = ray_internals.base_class(ray_internals.FAILURE_POLICY)


class RetryFailurePolicy(_FailurePolicy):
    """Restarts the group as `after_failure` decides, and tells the job why."""

    def __init__(self, failure_config: FailureConfig, channel: ActorHandle) -> None:
        super().__init__(failure_config)
        self._channel, self._failures = channel, 0

    def make_decision(self, training_failed_error: TrainingFailedError) -> Any:
        error = training_failed_error
        if isinstance(error, ControllerError) and not ray_internals.is_retryable_controller_failure(
            error.controller_failure
        ):
            return ray_internals.failure_decision(restart=False)
        if ray_internals.is_preemption(error):
            failure = Failure("preemption")
        elif isinstance(error, ControllerError):
            failure = Failure("start")
        else:
            self._failures += 1
            failure = Failure("worker", self._failures, self.failure_config.max_failures)
        decision = after_failure(failure)
        if decision.why:
            self._channel.publish.remote(FailureEvent(f"{decision.why}{describe_loss(error)}"))
        return ray_internals.failure_decision(decision.restart)
