"""Asking an autoscaler for machines, and letting them go.

Ray 2.60's brings none at all when asked for more than it could ever have: a run that allows 64 workers would never get
one on a cluster of at most 10 machines. The request of Ray Train is a shape of the whole cluster, to be reached
completely or not at all. So what is refused is asked for no longer.
"""

from __future__ import annotations

import time
from typing import Any

import ray
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply  # type: ignore[attr-defined]
from ray.data._internal.cluster_autoscaler import get_or_create_autoscaling_coordinator
from ray.data._internal.stats import get_or_create_stats_actor
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy
from ray.train.v2.api.config import ScalingConfig

from raycluster.run.policy import initial_request, next_request

_LOOK_SECONDS = 2.0
_ANSWER_SECONDS = 5
_RETRY_INTERVALS = 20  # resize intervals until all that the settings allow is asked for again


class FeasibleScalingPolicy(ElasticScalingPolicy):
    """Asks for as many workers as the autoscaler can bring, at most as many as the settings allow."""

    def __init__(self, scaling_config: ScalingConfig) -> None:
        super().__init__(scaling_config)
        self._wish, self._looked = initial_request(scaling_config.max_workers, time.monotonic()), 0.0
        self._retry_seconds = _RETRY_INTERVALS * scaling_config.elastic_resize_monitor_interval_s

    def _get_num_workers_for_resource_request(self) -> int:
        return self._wish.asked

    def _maybe_send_resource_request(self) -> None:
        now = time.monotonic()
        if now - self._looked >= _LOOK_SECONDS:
            self._looked, before = now, self._wish.asked
            refused = is_refused(self.scaling_config._resources_per_worker_not_none, before)
            most = self.scaling_config.max_workers
            self._wish = next_request(self._wish, most, refused=refused, now=now, retry_seconds=self._retry_seconds)
            if self._wish.asked != before:
                self._send_resource_request()
                return
        super()._maybe_send_resource_request()


def start_data_actors() -> None:
    """Start what Ray Data leaves running on this node, where the job is.

    It is made where data is first read, and stays there for as long as the cluster: on a machine that would otherwise
    become idle and go.
    """
    get_or_create_stats_actor()
    get_or_create_autoscaling_coordinator()


def is_refused(resources: dict[str, float], count: int) -> bool:
    """Whether the autoscaler says that the cluster could never have so many bundles of these resources."""
    wanted = {name: amount for name, amount in resources.items() if amount > 0}
    try:
        client = GcsClient(address=ray.get_runtime_context().gcs_address)
        reply: Any = GetClusterStatusReply.FromString(client.get_cluster_status(timeout_s=_ANSWER_SECONDS))
    except Exception:  # a moment of trouble on the head; it is asked again
        return False
    return any(
        dict(by_count.request.resources_bundle) == wanted and by_count.count >= count
        for constraint in reply.autoscaling_state.infeasible_cluster_resource_constraints
        for by_count in constraint.resource_requests
    )
