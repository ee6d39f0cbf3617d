"""Ray Data carries chunks to the worker that asked for them: read, decoded and augmented in parallel, kept in order.

The tasks import this module, so it must not import torch: that would cost each of them 11 seconds and a gigabyte.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from ray.data import DataContext

from raycluster.distributed.errors import user_errors
from raycluster.distributed.ray_internals import unlimited_read_ahead
from raycluster.io.retry import retry_context
from raycluster.types import Chunk, ImageBlock, Loader

BLOCK_BYTES = 4 * 2**20  # small blocks keep both cores busy and the first batch early (half a second instead of one)


def stream(
    chunks: Sequence[Chunk], load: Loader, *, cpus: float | None = None, retry_seconds: float = 0.0
) -> Iterator[ImageBlock]:
    """The image blocks of `chunks`, in their order; one Ray task reads one chunk.

    cpus: at most so many at a time, None for all of the cluster. retry_seconds: with storage out of reach. Errors of
    `load` are raised here as they are.
    """
    if not chunks:
        return
    with DataContext.current(quiet_context(cpus)), user_errors():
        items = [{"chunk": pickle.dumps(chunk)} for chunk in chunks]
        rows = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            partial(_load_rows, load=load, retry_seconds=retry_seconds), batch_size=None, batch_format="numpy"
        )
        for batch in rows.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=4):
            yield from _blocks(batch)


def quiet_context(cpus: float | None = None) -> DataContext:
    """How all our data sets are executed: in order, in small blocks, and without a word in the terminal."""
    context: DataContext = DataContext.get_current().copy()
    context.target_max_block_size = BLOCK_BYTES
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what it would log of an error is raised as well
    context.print_on_execution_start = False
    context.execution_options.preserve_order = True
    unlimited_read_ahead(context)
    context.op_resource_reservation_enabled = False  # there is one operator; its share alone would leave a core idle
    if cpus is not None:
        context.execution_options.resource_limits = context.execution_options.resource_limits.copy(cpu=cpus)
    return context


def _load_rows(
    batch: dict[str, NDArray[Any]], *, load: Loader, retry_seconds: float
) -> Iterator[dict[str, NDArray[Any]]]:
    for data in batch["chunk"]:
        for block in _with_retry(load, pickle.loads(data), retry_seconds):
            n = len(block.samples)
            yield {
                "lane": np.full(n, block.stream, np.int32),
                "position": np.arange(block.start, block.start + n),
                "sample": block.samples,
                "image": block.images,
                "error": block.errors.astype(str),
            }


def _with_retry(load: Loader, chunk: Chunk, retry_seconds: float) -> Iterator[ImageBlock]:
    with retry_context(retry_seconds):
        yield from load(chunk)


def _blocks(batch: dict[str, NDArray[Any]]) -> Iterable[ImageBlock]:
    """Ray may lay several blocks of a chunk together; lanes and positions tell them apart."""
    streams, positions = batch["lane"], batch["position"]
    cuts = np.flatnonzero((np.diff(streams) != 0) | (np.diff(positions) != 1)) + 1
    for first, last in zip([0, *cuts], [*cuts, len(streams)], strict=True):
        yield ImageBlock(
            int(streams[first]),
            int(positions[first]),
            batch["sample"][first:last],
            batch["image"][first:last],
            batch["error"][first:last].astype(str),
        )
