"""Work shared out to several actors: whoever is done takes what slower ones have not begun."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from secrets import token_hex
from typing import Any

import ray
from ray.actor import ActorHandle

_BATCHES_PER_ACTOR = 4  # that an actor's blocks are dealt out in: more balance better, fewer ask less often
_BATCHES_IN_FLIGHT = 2  # helpings on their way to an actor, so that it never waits for the next

Work = tuple[int, list[int]]
"""The actor that holds some shards, and these shards."""


def fold(
    actors: Sequence[ActorHandle], version: str, shards: Sequence[list[int]], call: ray.ObjectRef
) -> list[ray.ObjectRef]:
    """What each actor that did anything makes of its share; the sum of them is that of all blocks.

    An actor keeps one sum, whatever it is given, and gives it away once at the end: no more than one array of totals
    per actor exists or travels. A block that is taken over is read from the object store, where it stays.
    """
    job = token_hex(4)
    parts = _BATCHES_PER_ACTOR if len(actors) > 1 else 1
    waiting = [deque(_batches(actor, own, parts)) for actor, own in enumerate(shards)]
    refs = _places(actors, version, shards)
    running: dict[ray.ObjectRef, int] = {}
    times: Counter[int] = Counter()

    def hand(actor: int) -> None:
        queue = waiting[actor] or max(waiting, key=len)
        if queue:
            holder, chosen = queue.popleft() if queue is waiting[actor] else queue.pop()
            taken = [] if holder == actor else [refs[holder][shard] for shard in chosen]
            running[actors[actor].work.remote(job, version, chosen, taken, call)] = actor
            times[actor] += 1

    for actor in list(range(len(actors))) * _BATCHES_IN_FLIGHT:
        if waiting[actor]:
            hand(actor)
    try:
        while running:
            for done in _ready(running):
                ray.get(done)
                hand(running.pop(done))
    except Exception:
        for actor in times:
            actors[actor].forget.remote(job)
        raise
    return [actors[actor].finish.remote(job, count) for actor, count in sorted(times.items())]


def map_jobs(
    actors: Sequence[ActorHandle],
    version: str,
    shards: Sequence[list[int]],
    work: tuple[Callable[..., Any], Sequence[tuple[Any, ...]]],
) -> list[Any]:
    """What `function(features, *job)` gives for every job, in order; one actor does a job, reading blocks of all.

    work: the function and the jobs.
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
    """Those that are done, at least one: to look at all for each of them would cost the square of their number."""
    refs = list(running)
    ray.wait(refs, num_returns=1)
    return list(ray.wait(refs, num_returns=len(refs), timeout=0)[0])


def _batches(actor: int, shards: list[int], parts: int) -> list[Work]:
    size = max(1, -(-len(shards) // parts))
    return [(actor, shards[start : start + size]) for start in range(0, len(shards), size)]


def _places(actors: Sequence[ActorHandle], version: str, shards: Sequence[list[int]]) -> list[dict[int, ray.ObjectRef]]:
    """Where the blocks lie in the object store; asked for anew each time, for whoever knows a block keeps it alive."""
    if len(actors) == 1:
        return [{}]
    return list(ray.get([actor.places.remote(version, own) for actor, own in zip(actors, shards, strict=True)]))
