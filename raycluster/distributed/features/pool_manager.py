"""Keeps the actors of the feature pool on the nodes of the cluster: one per usable node, owned by the job."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raycluster.distributed.features.feature_pool import FeatureStore, start_pool
from raycluster.distributed.ray_internals import draining_nodes

_ANSWER_SECONDS = 5.0


class FeaturePoolManager:
    """The actors of a pool, owned by this process. `actors` changes only in `grow` and `shrink`.

    wanted: a fixed number of actors; 0 for one per node, as nodes are added and removed.
    """

    def __init__(self, name: str, wanted: int) -> None:
        self._name, self._started, self._fixed = name, 0, bool(wanted)
        self.actors: list[ActorHandle] = (
            start_pool(name, wanted) if wanted else [self._start(node) for node in usable_nodes()]
        )

    def grow(self) -> bool:
        """Add actors on nodes without one, at most as many actors as nodes; returns whether any was added.

        Node affinity is soft: Ray may place an actor elsewhere.
        """
        nodes, places = usable_nodes(), self._places()
        if self._fixed or len(places) < len(self.actors):  # some are restarting or busy
            return False
        empty = [node for node in nodes if node not in places.values()][: max(0, len(nodes) - len(self.actors))]
        self.actors += [self._start(node) for node in empty]
        return bool(empty)

    def shrink(self, set_pool: Callable[[list[ActorHandle]], bool]) -> None:
        """Kill actors that share a node or whose node is leaving, once `set_pool` has made the others the pool."""
        nodes, places = usable_nodes(), self._places()
        if self._fixed or len(places) < len(self.actors):
            return
        kept: dict[str, ActorHandle] = {}
        for actor, node in places.items():
            if node in nodes:
                kept.setdefault(node, actor)
        before, rest = self.actors, list(kept.values())
        if rest and len(rest) < len(before) and set_pool(rest):
            self.actors = rest
            for actor in before:
                if actor not in rest:
                    ray.kill(actor)

    def close(self) -> None:
        """End all actors, which would otherwise hold memory for as long as the job is connected to Ray."""
        for actor in self.actors:
            ray.kill(actor)

    def processes(self) -> tuple[str, ...]:
        """The "host:pid" of each actor that answers."""
        return tuple(answer[1] for answer in self._ask().values())

    def _places(self) -> dict[ActorHandle, str]:
        return {actor: answer[0] for actor, answer in self._ask().items()}

    def _ask(self) -> dict[ActorHandle, tuple[str, str]]:
        """(node, process) of each actor that answers; the others are restarting or busy."""
        refs = {actor: actor.place.remote() for actor in self.actors}
        answers = {}
        ready, _ = ray.wait(list(refs.values()), num_returns=len(refs), timeout=_ANSWER_SECONDS)
        for actor, ref in refs.items():
            if ref in ready:
                try:
                    answers[actor] = ray.get(ref, timeout=_ANSWER_SECONDS)
                except (RayError, GetTimeoutError):
                    continue
        return answers

    def _start(self, node: str) -> ActorHandle:
        remote: Any = ray.remote(FeatureStore)
        self._started += 1
        there = NodeAffinitySchedulingStrategy(node, soft=True)
        return remote.options(
            name=f"{self._name}-{self._started}",
            num_cpus=0,
            max_restarts=-1,
            max_task_retries=0,
            scheduling_strategy=there,
        ).remote()


def usable_nodes() -> list[str]:
    """Nodes with CPUs that are alive and not draining; all that are alive if there are none (a head has no CPUs)."""
    leaving = draining_nodes()
    alive = [node for node in ray.nodes() if node["Alive"]]
    able = [node for node in alive if node["Resources"].get("CPU") and node["NodeID"] not in leaving]
    return sorted(node["NodeID"] for node in able or alive)
