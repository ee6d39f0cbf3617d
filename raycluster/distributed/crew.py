"""The actors of the feature pool follow the cluster: one on every node that can work, looked after by the job."""

from __future__ import annotations

from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raycluster.distributed.policies import draining_nodes
from raycluster.distributed.pool import FeatureStore, start_pool

_ANSWER_SECONDS = 5.0


class Crew:
    """Actors owned by this process. `actors` changes only in `adapt`.

    wanted: how many, whatever the cluster has; 0 for one on every node, as nodes come and go.
    """

    def __init__(self, name: str, wanted: int) -> None:
        self._name, self._started, self._fixed = name, 0, bool(wanted)
        self.actors: list[ActorHandle] = (
            start_pool(name, wanted) if wanted else [self._start(node) for node in usable_nodes()]
        )

    def adapt(self, *, idle: bool) -> bool:
        """Add actors where there are more nodes than actors; if `idle`, end those that share a node or whose node goes.

        Never more actors than nodes: where Ray puts one is its own decision in the end. idle: nobody needs the features
        that actors hold now. Returns whether any changed.
        """
        if self._fixed:
            return False
        before = list(self.actors)
        nodes, places = usable_nodes(), self._places()
        if len(places) < len(self.actors):  # some are being restarted, or busy
            return False
        if idle:
            places = self._dismiss(nodes, places)
        bare = [node for node in nodes if node not in places.values()]
        self.actors += [self._start(node) for node in bare[: len(nodes) - len(self.actors)]]
        return self.actors != before

    def processes(self) -> tuple[str, ...]:
        """Of the actors that answer: "host:pid"."""
        return tuple(answer[1] for answer in self._ask().values())

    def _dismiss(self, nodes: list[str], places: dict[ActorHandle, str]) -> dict[ActorHandle, str]:
        """End all but one actor a node; the places of those that stay."""
        stay: dict[str, ActorHandle] = {}
        for actor, node in places.items():
            if node in nodes:
                stay.setdefault(node, actor)
        for actor in places if stay else ():
            if actor not in stay.values():
                self.actors.remove(actor)
                ray.kill(actor)
        return {actor: node for node, actor in stay.items()} if stay else places

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
