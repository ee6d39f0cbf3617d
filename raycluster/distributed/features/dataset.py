"""Ray Datasets as Features: blocks stored in a pool of actors, restored from the dataset when an actor dies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from secrets import token_hex
from typing import Any

import numpy as np
import ray
import ray.data
from numpy.typing import NDArray
from ray.actor import ActorHandle
from ray.data import DataContext

from raycluster.distributed.features.feature_pool import PooledFeatures, start_pool
from raycluster.distributed.ingest import quiet_context
from raycluster.distributed.session import ray_session
from raycluster.io import storage
from raycluster.io.embeddings import embedding_files, only_column
from raycluster.types import UserError

MAX_BLOCK_BYTES = 64 * 2**20


@contextmanager
def pooled_files(uri: str, column: str | None, *, num_actors: int, max_block_bytes: int) -> Iterator[PooledFeatures]:
    """The embeddings in the files at a path or URI, read by Ray Data and stored as by `pooled`.

    The sample ids are those of `as_features`. Joins the running cluster, or starts one here. Raises UserError if there
    are both .npy and Parquet files.
    """
    names = embedding_files(uri)
    filesystem, _ = storage.filesystem(uri)
    paths = [storage.filesystem(name)[1] for name in names]
    with ray_session(), DataContext.current(quiet_context()):
        if len({name.endswith(".npy") for name in paths}) > 1:
            raise UserError(f"{storage.shown(uri)} holds .npy and Parquet files; actors read files of one kind")
        if paths[0].endswith(".npy"):
            dataset, column = ray.data.read_numpy(paths, filesystem=filesystem), "data"
        else:
            column = column or only_column(names[0])
            dataset = ray.data.read_parquet(paths, filesystem=filesystem, columns=[column])
        with pooled(dataset, column, num_actors=num_actors, max_block_bytes=max_block_bytes) as features:
            yield features


@contextmanager
def pooled(
    dataset: Any,
    column: str | None = None,
    *,
    num_actors: int | None = None,
    max_block_bytes: int = MAX_BLOCK_BYTES,
) -> Iterator[PooledFeatures]:
    """The rows of one column of a dataset, stored by num_actors actors (None: one per node) until the context ends.

    column: the one that holds (D,) arrays or lists; None if the dataset has only one column. The sample ids are 0, 1,
    2... in the order of the dataset. Each actor uses all CPUs of its node, and stores rows in blocks of at most
    max_block_bytes (one row at least). Raises UserError if there is no such column.
    """
    names = dataset.columns() or []
    wanted = column or (names[0] if len(names) == 1 else None)
    if wanted not in names:
        raise UserError(f"name the column of the embeddings as column=...; the dataset has {names}, seen {column!r}")
    blocks = dataset.to_numpy_refs(column=wanted)
    parts, first = [], 0
    for block, (count, size) in zip(blocks, ray.get([_rows_and_bytes.remote(block) for block in blocks]), strict=True):
        rows = max(1, max_block_bytes * count // max(1, size))
        for start in range(0, count, rows):
            parts.append((first + start, block, start, min(count, start + rows)))
        first += count
    actors = start_pool(f"kmeans-{token_hex(4)}", num_actors or max(1, len(ray.nodes())))

    def restore(actor: ActorHandle, shards: list[int]) -> None:
        ray.get([actor.take.remote("rows", shard, *parts[shard]) for shard in shards])

    try:
        for shard in range(len(parts)):
            restore(actors[shard % len(actors)], [shard])
        yield PooledFeatures(actors, "rows", restore)
    finally:
        for actor in actors:
            ray.kill(actor)


@ray.remote(num_cpus=0)
def _rows_and_bytes(values: NDArray[Any]) -> tuple[int, int]:
    """(rows, bytes of these rows as an array)."""
    if values.dtype == object and len(values):
        return len(values), len(values) * np.asarray(values[0]).nbytes
    return len(values), values.nbytes
