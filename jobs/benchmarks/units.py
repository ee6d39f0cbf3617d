"""Unit costs of each kind of work on one core: the measured constants of the scaling study."""

from __future__ import annotations

import io
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from numpy.typing import NDArray
from PIL import Image
from ray.data import DataContext
from sklearn.metrics import normalized_mutual_info_score

from raycluster.clustering.fixed_point import ClusterSums, means, merge
from raycluster.clustering.kmeans.lloyd import kmeans
from raycluster.clustering.search.centroids import prepare
from raycluster.clustering.sinkhorn.api import sinkhorn
from raycluster.clustering.whitening import whiten
from raycluster.data.epoch_plan import plan_epoch, shard_chunks
from raycluster.data.loader import load_chunk
from raycluster.data.manifest import DataSettings, build_manifest, write_manifest
from raycluster.data.transforms import View
from raycluster.distributed.features import work_stealing
from raycluster.distributed.features.dataset import pooled
from raycluster.distributed.ingest import quiet_context
from raycluster.features.extraction import FeatureSpec
from raycluster.features.matrix import LocalFeatures
from raycluster.models.heads import Heads
from raycluster.run.directory import write_assignments
from raycluster.training.config import TrainingSettings
from raycluster.training.optimiser import Optimisers
from raycluster.training.step import Microbatch, Network, Step
from raycluster.types import Block, Features

DIM = 256
_SHARD = 1000
_FEW, _MANY = 20_000, 60_000  # rows; the difference of their times has no constant part
_EXTRA_FOLDS = 4  # folds of Sinkhorn in addition to its iterations: range of the rows, candidates, labels, final pass


@dataclass(frozen=True)
class Units:
    """Seconds on one core. decode: reading and augmenting one photograph. forward, step: one image, forward and in a
    training step. whiten: one row of 256 columns. accumulate, kmeans: one row per iteration, and per row and cluster.
    sinkhorn: per row and cluster, until convergence.

    Seconds of serial work. update: of the centroids, per value and iteration. combine: adding one byte of sums. fold: a
    sum over few rows with two actors; ask: per further actor. send: one byte between processes through Ray. labels:
    gathering, comparing and writing one label. plan: one row of an epoch plan.

    Counts. folds: of Sinkhorn over the rows. parameters: of the network.
    """

    decode: float
    forward: float
    step: float
    whiten: float
    accumulate: float
    kmeans: float
    sinkhorn: float
    update: float
    combine: float
    fold: float
    ask: float
    send: float
    labels: float
    plan: float
    folds: float
    parameters: float

    def table(self) -> str:
        """One line per constant."""
        return "\n".join(f"{field.name:<12}{getattr(self, field.name):10.3g}" for field in fields(self))


def measure(model: str, size: int) -> Units:
    """Measure all constants, for a network at `size` pixels. Needs a Ray session; takes one or two minutes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        forward, step, parameters = _network(model, size)
        fold, ask, send = _messages()
        with pool(_FEW, 1) as few, pool(_MANY, 1) as many:
            accumulate, pair = _kmeans(few, many)
            whitening = seconds(lambda: whiten(many, DIM))
            params, folds = _sinkhorn(few, many)
        return Units(
            decode=_decode(size),
            forward=forward,
            step=step,
            whiten=whitening / _MANY,
            accumulate=accumulate,
            kmeans=pair,
            sinkhorn=params,
            update=_update(),
            combine=_combine(),
            fold=fold,
            ask=ask,
            send=send,
            labels=_labels(),
            plan=_plan(),
            folds=folds,
            parameters=parameters,
        )
    finally:
        torch.set_num_threads(threads)


def seconds(work: Callable[[], Any], repeats: int = 3, clock: Callable[[], float] = time.perf_counter) -> float:
    """The minimum over some runs, which is least affected by other load."""
    found = []
    for _ in range(repeats):
        began = clock()
        work()
        found.append(clock() - began)
    return min(found)


def core_seconds(work: Callable[[], Any], repeats: int = 3) -> float:
    """Like `seconds`, in CPU time of this process."""
    return seconds(work, repeats, time.process_time)


def rows(count: int, dim: int = DIM) -> LocalFeatures:
    """Normalised rows of a mixture of a thousand components, in shards."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((1000, dim))[rng.integers(1000, size=count)] + rng.standard_normal((count, dim))
    values = (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float16)
    starts = range(0, count, _SHARD)
    return LocalFeatures([Block(np.arange(at, min(at + _SHARD, count)), values[at : at + _SHARD]) for at in starts])


def photograph(seed: int) -> bytes:
    """A JPEG of 500 x 375 pixels with the typical file size of a photograph."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(256, size=(24, 32, 3), dtype=np.uint8)).resize(
        (500, 375), Image.Resampling.BICUBIC
    )
    noisy = np.asarray(coarse, np.int16) + rng.normal(0, 12, (375, 500, 3)).astype(np.int16)
    file = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=85)
    return file.getvalue()


def _decode(size: int, count: int = 64) -> float:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for index in range(count):
            (folder / f"{index:03d}.jpg").write_bytes(photograph(index))
        data, uri = DataSettings(uri=name), str(folder / "manifest.parquet")
        manifest = build_manifest(data)
        write_manifest(manifest, uri)
        [chunk] = shard_chunks(manifest.shards)
        view = View(size=size, crop_scale=(0.08, 1.0), flip=0.5)
        return core_seconds(lambda: list(load_chunk(chunk, uri, view, seed=0, settings=data))) / count


def _network(model: str, size: int, batch: int = 32) -> tuple[float, float, float]:
    """(seconds per image forward, seconds per image in training, number of parameters)."""
    backbone = import_module(f"raycluster.models.{model}").Model().build(0)
    heads, settings = Heads(backbone.num_features, (1000,), 0), TrainingSettings(threads=1)
    network = Network(backbone, heads)
    step = Step(network, Optimisers(backbone, heads, settings), settings)
    images = np.random.default_rng(0).integers(256, size=(batch, size, size, 3), dtype=np.uint8)
    part = Microbatch(torch.from_numpy(images), torch.zeros(1, batch, dtype=torch.int64), torch.ones(batch), 0)
    backbone.eval()
    cpu = torch.device("cpu")
    forward = core_seconds(lambda: FeatureSpec(View(size=size)).describe(backbone, images, cpu)) / batch
    backbone.train()
    training = core_seconds(lambda: step([part], epoch=0.0)) / batch
    return forward, training, float(sum(values.numel() for values in network.parameters()))


@contextmanager
def pool(count: int, actors: int) -> Iterator[Features]:
    """`rows` in a pool of actors that are pinned to one core each."""
    parts = [part.astype(np.float16) for part in np.array_split(rows(count).rows(np.arange(count)), 4 * actors)]
    with DataContext.current(quiet_context()), pooled(ray.data.from_numpy(parts), num_actors=actors) as features:
        processes = sorted(set(features.collect(_process)))
        features.collect(_pin, {process: place % (os.cpu_count() or 1) for place, process in enumerate(processes)})
        yield features


def _process(block: Block) -> int:
    return os.getpid()


def _pin(block: Block, cores: dict[int, int]) -> None:
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), {cores[os.getpid()]})


def kmeans_step(features: Features, clusters: int, few: int = 1, many: int = 4) -> float:
    """Seconds per iteration of k-means: a difference of two runs, without set-up."""

    def run(iterations: int) -> float:
        return seconds(lambda: kmeans(features, clusters, iterations=iterations, plain=True), repeats=2)

    return (run(many) - run(few)) / (many - few)


def _kmeans(few: Features, many: Features, small: int = 1000, large: int = 8000) -> tuple[float, float]:
    """(seconds per row and iteration, seconds per row and cluster)."""
    one, other = ((kmeans_step(many, size) - kmeans_step(few, size)) / (_MANY - _FEW) for size in (small, large))
    pair = (other - one) / (large - small)
    return max(0.0, one - small * pair), pair


def _update(clusters: int = 4000) -> float:
    """Seconds per value of the centroids and iteration: means in the job, preparation in an actor."""
    totals, centroids = np.ones((clusters, DIM), np.int64), np.ones((clusters, DIM), np.float32)
    sizes = np.ones(clusters, np.int64)
    return core_seconds(lambda: prepare(means(totals, sizes, 1.0, centroids)).packed) / centroids.size


def head(clusters: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """A random classifier (weight, bias) of the rows."""
    weight = np.random.default_rng(0).standard_normal((clusters, DIM))
    return weight.astype(np.float32), np.zeros(clusters, np.float32)


def _sinkhorn(few: Features, many: Features, clusters: int = 500) -> tuple[float, float]:
    """(seconds per row and cluster until convergence, number of folds over the rows)."""
    classifier = head(clusters)
    one, other = (seconds(lambda rows=rows: sinkhorn(rows, [classifier])) for rows in (few, many))
    folds = sinkhorn(few, [classifier]).iterations[0] + _EXTRA_FOLDS
    return (other - one) / (_MANY - _FEW) / clusters, float(folds)


def _combine(clusters: int = 10_000) -> float:
    left, right = (ClusterSums(np.ones((clusters, DIM), np.int64), ()) for _ in range(2))
    return core_seconds(lambda: merge(left, right)) / left.totals.nbytes


class _Idle:
    """An actor with the interface of the pool and no work."""

    def places(self, version: str, shards: list[int]) -> dict[int, None]:
        return dict.fromkeys(shards)

    def work(self, *_: Any) -> None:
        pass

    def finish(self, job: str, times: int) -> None:
        pass

    def give(self, size: int) -> NDArray[np.uint8]:
        return np.zeros(size, np.uint8)


def _messages(size: int = 50_000_000, asked: int = 64) -> tuple[float, float, float]:
    """(seconds of an empty sum over two actors, per further actor, per byte through the object store)."""
    remote: Any = ray.remote(_Idle)
    actors = [remote.options(num_cpus=0).remote() for _ in range(2)]
    ray.get([actor.give.remote(1) for actor in actors])

    def ask(count: int) -> float:
        some = [actors[place % len(actors)] for place in range(count)]
        shards = [list(range(4 * place, 4 * place + 4)) for place in range(count)]
        return seconds(lambda: ray.get(work_stealing.fold(some, "", shards, ray.put(()))), repeats=10)

    further = (ask(asked) - ask(1)) / (asked - 1)
    with pool(8, 2) as features:
        two = seconds(lambda: features.fold(_nothing), repeats=10)
    send = seconds(lambda: ray.get(actors[0].give.remote(size)).max()) / size
    for actor in actors:
        ray.kill(actor)
    return two, further, send


def _nothing(block: Block) -> tuple[int]:
    return (0,)


class _Manifest:
    def __init__(self, count: int) -> None:
        self.paths = pa.array([f"n{index % 1000:08d}/n{index:08d}.JPEG" for index in range(count)])
        self.num_samples = count


def _labels(count: int = 200_000, clusters: int = 1000) -> float:
    """Seconds per label to sort, compare with the previous ones and write as Parquet, as after every round."""
    rng = np.random.default_rng(0)
    samples, labels = rng.permutation(count), rng.integers(clusters, size=count)
    manifest: Any = _Manifest(count)

    def process() -> None:
        found = labels[np.argsort(samples)].astype(np.int32)
        normalized_mutual_info_score(found, labels)
        with tempfile.TemporaryDirectory() as folder:
            write_assignments(folder, manifest, found[None])

    return core_seconds(process) / count


def _plan(count: int = 1_000_000, streams: int = 128) -> float:
    count -= count % (streams * 32)
    shards = [(start, min(start + _SHARD, count)) for start in range(0, count, _SHARD)]
    counts = np.ones(count, np.int64)
    return (
        core_seconds(
            lambda: plan_epoch(counts, shards, streams=streams, microbatch=32, seed=0, epoch=0, window_shards=16),
            repeats=2,
        )
        / count
    )
