"""Ray Datasets as Features: their blocks in a pool of actors, restored from the dataset when an actor dies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from secrets import token_hex
from typing import Any

import numpy as np
import ray
from ray.actor import ActorHandle

from raycluster.distributed.pool import PooledFeatures, start_pool
from raycluster.types import UserError


@contextmanager
def pooled(dataset: Any, column: str | None = None, *, num_actors: int | None = None) -> Iterator[PooledFeatures]:
    """The rows of one column of a dataset, held by as many actors as there are nodes (or num_actors) until the end.

    column: the one that holds (D,) arrays or lists; None if the dataset has only one column. The sample ids are 0, 1,
    2... in the order of the dataset. Each actor uses all processors of its node. Raises UserError if there is no such
    column.
    """
    names = dataset.columns() or []
    wanted = column or (names[0] if len(names) == 1 else None)
    if wanted not in names:
        raise UserError(f"name the column of the embeddings as column=...; the dataset has {names}, seen {column!r}")
    blocks = dataset.to_numpy_refs(column=wanted)
    rows = ray.get([_num_rows.remote(block) for block in blocks])
    firsts = np.cumsum([0, *rows])[:-1].tolist()
    actors = start_pool(f"kmeans-{token_hex(4)}", num_actors or max(1, len(ray.nodes())))

    def restore(actor: ActorHandle, shards: list[int]) -> None:
        ray.get([actor.take.remote("rows", shard, firsts[shard], blocks[shard]) for shard in shards])

    try:
        full = [shard for shard, count in enumerate(rows) if count]
        for place, shard in enumerate(full):
            restore(actors[place % len(actors)], [shard])
        yield PooledFeatures(actors, "rows", restore)
    finally:
        for actor in actors:
            ray.kill(actor)


@ray.remote(num_cpus=0)
def _num_rows(values: Any) -> int:
    return len(values)
