"""The actors of the feature pool follow the cluster: one on every node that can work, looked after by the job."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raycluster.distributed.features.feature_pool import FeatureStore, start_pool
from raycluster.distributed.train.policies import draining_nodes

_ANSWER_SECONDS = 5.0


class FeaturePoolManager:
    """Actors owned by this process. `actors` changes only in `grow` and `shrink`.

    wanted: how many, whatever the cluster has; 0 for one on every node, as nodes come and go.
    """

    def __init__(self, name: str, wanted: int) -> None:
        self._name, self._started, self._fixed = name, 0, bool(wanted)
        self.actors: list[ActorHandle] = (
            start_pool(name, wanted) if wanted else [self._start(node) for node in usable_nodes()]
        )

    def grow(self) -> bool:
        """Add actors on nodes without one, never more actors than nodes; returns whether there were any.

        Where Ray puts an actor is its own decision in the end.
        """
        nodes, places = usable_nodes(), self._places()
        if self._fixed or len(places) < len(self.actors):  # some are being restarted, or busy
            return False
        bare = [node for node in nodes if node not in places.values()][: max(0, len(nodes) - len(self.actors))]
        self.actors += [self._start(node) for node in bare]
        return bool(bare)

    def shrink(self, set_pool: Callable[[list[ActorHandle]], bool]) -> None:
        """End actors that share a node or whose node goes, once `set_pool` has made the others the pool."""
        nodes, places = usable_nodes(), self._places()
        if self._fixed or len(places) < len(self.actors):
            return
        stay: dict[str, ActorHandle] = {}
        for actor, node in places.items():
            if node in nodes:
                stay.setdefault(node, actor)
        before, rest = self.actors, list(stay.values())
        if rest and len(rest) < len(before) and set_pool(rest):
            self.actors = rest
            for actor in before:
                if actor not in rest:
                    ray.kill(actor)

    def processes(self) -> tuple[str, ...]:
        """Of the actors that answer: "host:pid"."""
        return tuple(answer[1] for answer in self._ask().values())

    def _places(self) -> dict[ActorHandle, str]:
        return {actor: answer[0] for actor, answer in self._ask().items()}

    def _ask(self) -> dict[ActorHandle, tuple[str, str]]:
        """(node, process) of the actors that answer; the others are being restarted, or busy."""
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
    """Nodes that live, stay, and have processors (a head without any only manages), if there are such."""
    leaving = draining_nodes()
    alive = [node for node in ray.nodes() if node["Alive"]]
    able = [node for node in alive if node["Resources"].get("CPU") and node["NodeID"] not in leaving]
    return sorted(node["NodeID"] for node in able or alive)
