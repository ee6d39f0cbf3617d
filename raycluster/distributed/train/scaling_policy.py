"""How many workers a run has: Ray's scaling policies, with a checkpoint before every change.

Ray's own elastic policy restarts the group to resize it without notice. This one proposes the new size through the
control channel, and restarts the group once the workers have saved.
"""

from __future__ import annotations

from typing import Any

import ray
from ray.actor import ActorHandle
from ray.train.v2.api.config import ScalingConfig

from raycluster.distributed import ray_internals
from raycluster.distributed.ray_internals import RequesterHooks
from raycluster.distributed.train.autoscaler import FeasibleScalingPolicy

_ANSWER_SECONDS = 10.0
_FixedScalingPolicy: Any = ray_internals.base_class(ray_internals.FIXED_POLICY)


class FixedSizePolicy(RequesterHooks, _FixedScalingPolicy):
    """The same number of workers from the beginning to the end."""


class CheckpointBeforeResizePolicy(FeasibleScalingPolicy):
    """Elastic, but a running group is resized only when its workers have saved a checkpoint and allow the restart."""

    def __init__(self, scaling_config: ScalingConfig, requester: str, channel: ActorHandle) -> None:
        super().__init__(scaling_config, requester)
        self._channel, self._proposed = channel, False

    def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> Any:
        if not self._proposed:
            decision = super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
            self._proposed = not ray_internals.is_no_decision(decision)
            if not self._proposed:
                return decision
        self.send_request()
        size = self.possible_workers() or 0
        if size == worker_group_state.num_workers or size < self.scaling_config.min_workers:
            self._withdraw()
            return ray_internals.no_decision()
        try:
            restart_allowed = ray.get(self._channel.propose.remote(size), timeout=_ANSWER_SECONDS)
        except Exception:  # the channel is being restarted; asked again at the next poll
            return ray_internals.no_decision()
        return self.resize_to(size) if restart_allowed else ray_internals.no_decision()

    def make_decision_for_non_running_worker_group(self) -> Any:
        if self._proposed:
            self._withdraw()
        return super().make_decision_for_non_running_worker_group()

    def _withdraw(self) -> None:
        self._proposed = False
        self._channel.withdraw.remote()


def scaling_policy(scaling_config: ScalingConfig, requester: str, channel: ActorHandle) -> Any:
    """The policy for a fixed or an elastic number of workers. requester: the same for all jobs of a run."""
    if not scaling_config.elasticity_enabled:
        return FixedSizePolicy(scaling_config, requester)
    return CheckpointBeforeResizePolicy(scaling_config, requester, channel)
