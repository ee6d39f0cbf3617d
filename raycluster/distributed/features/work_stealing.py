"""Work stealing: an idle actor takes blocks that a slower one has not begun."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from secrets import token_hex
from typing import Any

import ray
from ray.actor import ActorHandle

_BATCHES_PER_ACTOR = 4  # more balance better, fewer cost fewer calls
_BATCHES_IN_FLIGHT = 2  # per actor, so that it never waits for the next

Work = tuple[int, list[int]]
"""(index of the actor that stores these shards, shards)."""


def fold(
    actors: Sequence[ActorHandle], version: str, shards: Sequence[list[int]], call: ray.ObjectRef
) -> list[ray.ObjectRef]:
    """References to one partial sum per actor that did any work; together they cover all blocks once.

    An actor adds all its batches into one sum and returns it at the end, so at most one array of sums per actor exists
    or is sent. A stolen block is read from the object store, where it stays.
    """
    job = token_hex(4)
    parts = _BATCHES_PER_ACTOR if len(actors) > 1 else 1
    waiting = [deque(_batches(actor, own, parts)) for actor, own in enumerate(shards)]
    refs = _places(actors, version, shards)
    running: dict[ray.ObjectRef, int] = {}
    times: Counter[int] = Counter()

    def assign(actor: int) -> None:
        queue = waiting[actor] or max(waiting, key=len)
        if queue:
            holder, chosen = queue.popleft() if queue is waiting[actor] else queue.pop()
            taken = [] if holder == actor else [refs[holder][shard] for shard in chosen]
            running[actors[actor].work.remote(job, version, chosen, taken, call)] = actor
            times[actor] += 1

    for actor in list(range(len(actors))) * _BATCHES_IN_FLIGHT:
        if waiting[actor]:
            assign(actor)
    try:
        while running:
            for done in _ready(running):
                ray.get(done)
                assign(running.pop(done))
    except Exception:
        for actor in times:
            actors[actor].discard.remote(job)
        raise
    return [actors[actor].finish.remote(job, count) for actor, count in sorted(times.items())]


def map_jobs(
    actors: Sequence[ActorHandle],
    version: str,
    shards: Sequence[list[int]],
    work: tuple[Callable[..., Any], Sequence[tuple[Any, ...]]],
) -> list[Any]:
    """`function(features, *job)` for every job, in order; one actor solves a job, on the blocks of all actors.

    work: (function, jobs).
    """
    places = ray.get([actor.places.remote(version, own) for actor, own in zip(actors, shards, strict=True)])
    blocks = [ref for own in places for _, ref in sorted(own.items())]
    function, jobs = work
    idle, running = list(actors), dict[ray.ObjectRef, tuple[int, ActorHandle]]()
    results: list[Any] = [None] * len(jobs)
    for number in range(len(jobs) + len(actors)):
        if number >= len(jobs) or not idle:
            if not running:
                break
            (done,), _ = ray.wait(list(running), num_returns=1)
            place, actor = running.pop(done)
            results[place] = ray.get(done)
            idle.append(actor)
        if number < len(jobs):
            actor = idle.pop()
            running[actor.solve.remote(blocks, function, jobs[number])] = number, actor
    return results


def _ready(running: Iterable[ray.ObjectRef]) -> list[ray.ObjectRef]:
    """All references that are done, at least one: waiting for one at a time would cost quadratic time."""
    refs = list(running)
    ray.wait(refs, num_returns=1)
    return list(ray.wait(refs, num_returns=len(refs), timeout=0)[0])


def _batches(actor: int, shards: list[int], parts: int) -> list[Work]:
    size = max(1, -(-len(shards) // parts))
    return [(actor, shards[start : start + size]) for start in range(0, len(shards), size)]


def _places(actors: Sequence[ActorHandle], version: str, shards: Sequence[list[int]]) -> list[dict[int, ray.ObjectRef]]:
    """References to the blocks; requested for every fold, since a stored reference would keep its block alive."""
    if len(actors) == 1:
        return [{}]
    return list(ray.get([actor.places.remote(version, own) for actor, own in zip(actors, shards, strict=True)]))
