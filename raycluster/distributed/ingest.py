"""Image loading by Ray Data: chunks are read, decoded and augmented in parallel and delivered in order.

The tasks import this module, so it must not import torch, which takes 11 seconds and a gigabyte per process.
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

BLOCK_BYTES = 4 * 2**20  # small blocks overlap better and deliver the first batch in half the time


def stream(
    chunks: Sequence[Chunk], load: Loader, *, cpus: float | None = None, retry_seconds: float = 0.0
) -> Iterator[ImageBlock]:
    """The image blocks of `chunks`, in their order; one Ray task reads one chunk.

    cpus: limit of concurrent tasks, None for all CPUs of the cluster. retry_seconds: how long a task waits for storage
    that is unavailable. Errors of `load` are raised here unchanged.
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
    """The context of all data sets: in order, in small blocks, without terminal output."""
    context: DataContext = DataContext.get_current().copy()
    context.target_max_block_size = BLOCK_BYTES
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # errors are raised as well
    context.print_on_execution_start = False
    context.execution_options.preserve_order = True
    unlimited_read_ahead(context)
    context.op_resource_reservation_enabled = False  # with one operator, its reserved share would leave a core idle
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
                "stream": np.full(n, block.stream, np.int32),
                "position": np.arange(block.start, block.start + n),
                "sample": block.samples,
                "image": block.images,
                "error": block.errors.astype(str),
                **{f"extra_view_{number}": images for number, images in enumerate(block.extra_views)},
            }


def _with_retry(load: Loader, chunk: Chunk, retry_seconds: float) -> Iterator[ImageBlock]:
    with retry_context(retry_seconds):
        yield from load(chunk)


def _blocks(batch: dict[str, NDArray[Any]]) -> Iterable[ImageBlock]:
    """Split a batch, in which Ray may join several blocks, by stream and position."""
    streams, positions = batch["stream"], batch["position"]
    cuts = np.flatnonzero((np.diff(streams) != 0) | (np.diff(positions) != 1)) + 1
    for first, last in zip([0, *cuts], [*cuts, len(streams)], strict=True):
        yield ImageBlock(
            int(streams[first]),
            int(positions[first]),
            batch["sample"][first:last],
            batch["image"][first:last],
            batch["error"][first:last].astype(str),
            tuple(batch[name][first:last] for name in sorted(batch) if name.startswith("extra_view_")),
        )
