"""Requesting as many machines as an autoscaler can provide.

Ray's autoscaler (2.60) adds no machine at all when asked for more than the cluster can ever have: a run that allows 64
workers would get none on a cluster of at most 10 machines. Ray Train's request describes the whole cluster and is
fulfilled completely or not at all. Infeasible requests are therefore bisected.
"""

from __future__ import annotations

import time
from typing import Any

from ray.train.v2.api.config import ScalingConfig

from raycluster.distributed import ray_internals
from raycluster.distributed.ray_internals import ElasticHooks
from raycluster.run.policy import initial_request, next_request

_POLL_SECONDS = 2.0
_RETRY_INTERVALS = 20  # resize intervals until the maximum is requested again
_ElasticScalingPolicy: Any = ray_internals.base_class(ray_internals.ELASTIC_POLICY)


class FeasibleScalingPolicy(ElasticHooks, _ElasticScalingPolicy):
    """Requests as many workers as the autoscaler can provide, at most as many as the settings allow."""

    def __init__(self, scaling_config: ScalingConfig, requester: str) -> None:
        super().__init__(scaling_config, requester)
        self._request, self._polled_at = initial_request(scaling_config.max_workers, time.monotonic()), 0.0
        self._retry_seconds = _RETRY_INTERVALS * scaling_config.elastic_resize_monitor_interval_s

    def workers_to_request(self) -> int:
        return self._request.asked

    def update_request(self) -> bool:
        now = time.monotonic()
        if now - self._polled_at < _POLL_SECONDS:
            return False
        self._polled_at, before = now, self._request.asked
        refused = ray_internals.is_infeasible(self.scaling_config.resources_per_worker or {}, before)
        most = self.scaling_config.max_workers
        self._request = next_request(self._request, most, refused=refused, now=now, retry_seconds=self._retry_seconds)
        return self._request.asked != before
