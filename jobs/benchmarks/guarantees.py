"""Cost of the guarantees: deterministic against arbitrary order of data, and checkpoints against none."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from benchmarks.ingest import MICROBATCH, STREAMS, Problem
from benchmarks.units import photograph
from numpy.typing import NDArray

from raycluster.config import parse
from raycluster.data.epoch_plan import split_chunks, steps
from raycluster.data.loader import rows_within
from raycluster.data.transforms import View
from raycluster.distributed import ingest
from raycluster.distributed.session import ray_session
from raycluster.events import Round
from raycluster.run.config import Config, RunSettings
from raycluster.run.local_workers import LocalWorkers
from raycluster.run.loop import CHUNK_BYTES, pretrain
from raycluster.types import Chunk, ImageBlock

_RUN = """
data: {uri: digits}
views: {train: {size: 64, crop_scale: [0.4, 1.0]}, eval: {size: 64}}
model: {name: alexnet, input: sobel}
method: {name: deepcluster, num_clusters: 100, layer: conv1, descriptor: pooled, pca_dim: 16, iterations: 2}
training: {epochs: 1, global_batch: 32, microbatch: 32}
run: {dir: unset}
"""


def run(data: str = "", processes: int = 2, repeats: int = 3, checkpoint_seconds: float = 5.0) -> str:
    """Two tables. data: Parquet files with a column `image`; synthetic photographs if empty."""
    os.environ["OMP_NUM_THREADS"] = str(processes)
    return "\n".join([*_order(data, processes, repeats), "", *_checkpoints(checkpoint_seconds, repeats=2)])


# ---------------------------------------------------------------------------------------------------------------- order


def _order(data: str, processes: int, repeats: int) -> list[str]:
    with tempfile.TemporaryDirectory() as folder, ray_session(num_cpus=processes):
        uri = data or _synthetic(Path(folder))
        # Streams read 64 MB ahead: a short epoch would consist of the start alone.
        problem = Problem(uri, View(size=224, crop_scale=(0.08, 1.0), flip=0.5), 64 if data else 16, processes)
        _in_order(problem, 0)  # the first run starts Ray's worker processes
        found = [(_in_order(problem, n), _in_any_order(problem, n)) for n in range(1, repeats + 1)]
    ordered, free = (median(column) for column in zip(*found, strict=True))
    return [
        f"images/s with {processes} processes, median of {repeats} interleaved runs of {len(problem.images)} images",
        f"in order, resumable {ordered:.0f}   the same in any order {free:.0f}   ratio {ordered / free:.3f}",
    ]


def _plan(problem: Problem, epoch: int) -> list[Chunk]:
    """The chunks that tasks read, as in training."""
    return split_chunks(problem.plan(epoch), rows_within(CHUNK_BYTES, problem.view, MICROBATCH), MICROBATCH)


def _in_order(problem: Problem, epoch: int) -> float:
    """Images per second in order, as in training: one microbatch of every stream per step."""
    began = time.perf_counter()
    blocks = ingest.stream(_plan(problem, epoch), problem.load())
    done = sum(len(rows[0]) for step in steps(blocks, range(STREAMS), MICROBATCH) for rows in step.values())
    return done / (time.perf_counter() - began)


def _in_any_order(problem: Problem, epoch: int) -> float:
    """Images per second with blocks of Ray Data in order of completion, cut into microbatches."""

    def any_order(*args: Any) -> Any:
        context = ordered_context(*args)
        context.execution_options.preserve_order = False
        return context

    ordered_context = ingest.quiet_context
    began = time.perf_counter()
    with mock.patch.object(ingest, "quiet_context", any_order):
        done = sum(map(len, _microbatches(ingest.stream(_plan(problem, epoch), problem.load()))))
    return done / (time.perf_counter() - began)


def _microbatches(blocks: Iterable[ImageBlock]) -> Iterator[NDArray[np.uint8]]:
    rest = None
    for block in blocks:
        images = block.images if rest is None else np.concatenate([rest, block.images])
        full = len(images) // MICROBATCH * MICROBATCH
        yield from (images[start : start + MICROBATCH] for start in range(0, full, MICROBATCH))
        rest = images[full:] if full < len(images) else None


def _synthetic(folder: Path, count: int = 1024) -> str:
    photographs = [photograph(seed) for seed in range(64)]
    pq.write_table(pa.table({"image": photographs * (count // 64)}), folder / "photographs.parquet")
    return str(folder)


# ---------------------------------------------------------------------------------------------------------- checkpoints


def _checkpoints(every_seconds: float, repeats: int) -> list[str]:
    """Training with frequent checkpoints, and without."""
    default = RunSettings(dir="unset").checkpoint_minutes * 60
    pairs = [(_train(1e9), _train(every_seconds)) for _ in range(repeats)]
    without, saving = (median(seconds for seconds, _, _ in column) for column in zip(*pairs, strict=True))
    _, taken, size = pairs[-1][1]
    each = max(0.0, saving - without) / max(1, taken)
    return [
        f"training AlexNet, checkpoints of {size / 1e6:.0f} MB, median of {repeats} interleaved runs",
        f"without {without:.1f} s   with {taken} checkpoints {saving:.1f} s   {each:.2f} s each",
        f"at the default of one in {default / 60:g} minutes {each / default:.2%} of the training time",
    ]


def _train(every_seconds: float) -> tuple[float, int, int]:
    """(seconds of training in a round, checkpoints in it, bytes of the newest)."""
    with tempfile.TemporaryDirectory() as folder:
        words = [f"run.dir={folder}", f"run.checkpoint_minutes={every_seconds / 60}", "run.keep_checkpoints=99"]
        events = pretrain(parse(Config, _RUN, words), LocalWorkers())
        record = next(event.record for event in events if isinstance(event, Round))
        events.close()
        files = sorted(Path(folder, "checkpoints").iterdir())
        return record["seconds_training"], len(files) - 1, files[-1].stat().st_size  # one is written after the round
