"""What one piece of each kind of work costs here, on one core: the constants of the scaling study, all measured."""

from __future__ import annotations

import io
import tempfile
import time
from collections.abc import Callable
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
from sklearn.metrics import normalized_mutual_info_score

from raycluster.clustering.kmeans import kmeans
from raycluster.clustering.sums import ClusterSums, merge
from raycluster.clustering.whitening import whiten
from raycluster.data.load import load_chunk
from raycluster.data.manifest import DataSettings, build_manifest, write_manifest
from raycluster.data.plan import plan_epoch, shard_chunks
from raycluster.data.transforms import View
from raycluster.extraction import Descriptor
from raycluster.features import LocalFeatures
from raycluster.models.heads import Heads
from raycluster.rundir import write_assignments
from raycluster.training.optimiser import Optimisers
from raycluster.training.settings import TrainingSettings
from raycluster.training.step import Microbatch, Network, Step
from raycluster.types import Block

DIM = 256
_SHARD = 1000


@dataclass(frozen=True)
class Units:
    """Seconds on one core. decode: reading and varying one photograph. forward, step: one picture through the network,
    and through a training step. whiten: one row of 256. kmeans: one row against one cluster, a step.
    sinkhorn: the same, until its tolerance is reached.

    Seconds that more workers do not share: update: of centroids, one value a step. combine: adding one byte of sums.
    call: asking one actor. send: one byte from one process to another through Ray. labels: one row's label, gathered,
    compared and written down. plan: one row of an epoch's plan.

    Numbers: passes of Sinkhorn over the rows; parameters of the network.
    """

    decode: float
    forward: float
    step: float
    whiten: float
    kmeans: float
    sinkhorn: float
    update: float
    combine: float
    call: float
    send: float
    labels: float
    plan: float
    passes: float
    parameters: float

    def table(self) -> str:
        """One line a constant."""
        return "\n".join(f"{field.name:<12}{getattr(self, field.name):10.3g}" for field in fields(self))


def measure(model: str, size: int) -> Units:
    """All of them, the network at `size` pixels; needs a Ray session. Takes a minute or two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        forward, step, parameters = _network(model, size)
        call, send = _messages()
        pair, update = _kmeans()
        labelling, passes = _sinkhorn()
        return Units(
            decode=_decode(size),
            forward=forward,
            step=step,
            whiten=_whiten(),
            kmeans=pair,
            sinkhorn=labelling,
            update=update,
            combine=_combine(),
            call=call,
            send=send,
            labels=_labels(),
            plan=_plan(),
            passes=passes,
            parameters=parameters,
        )
    finally:
        torch.set_num_threads(threads)


def seconds(work: Callable[[], Any], repeats: int = 3, clock: Callable[[], float] = time.perf_counter) -> float:
    """The least of some runs: what the work takes when nothing else disturbs it."""
    found = []
    for _ in range(repeats):
        began = clock()
        work()
        found.append(clock() - began)
    return min(found)


def core_seconds(work: Callable[[], Any], repeats: int = 3) -> float:
    """The same of this process alone, whatever else runs on the machine."""
    return seconds(work, repeats, time.process_time)


def rows(count: int, dim: int = DIM) -> LocalFeatures:
    """Rows of length 1 about a thousand centres, in shards."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((1000, dim))[rng.integers(1000, size=count)] + rng.standard_normal((count, dim))
    values = (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float16)
    starts = range(0, count, _SHARD)
    return LocalFeatures([Block(np.arange(at, min(at + _SHARD, count)), values[at : at + _SHARD]) for at in starts])


def photograph(seed: int) -> bytes:
    """A JPEG of 500 x 375 pixels, about as many bytes as a photograph of that size has."""
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
    """Seconds of a picture forwards, seconds of a picture in training, number of parameters."""
    backbone = import_module(f"raycluster.models.{model}").Model().build(0)
    heads, settings = Heads(backbone.num_features, (1000,), 0), TrainingSettings(threads=1)
    network = Network(backbone, heads)
    step = Step(network, Optimisers(backbone, heads, settings), settings)
    images = np.random.default_rng(0).integers(256, size=(batch, size, size, 3), dtype=np.uint8)
    part = Microbatch(torch.from_numpy(images), torch.zeros(1, batch, dtype=torch.int64), torch.ones(batch), 0)
    backbone.eval()
    cpu = torch.device("cpu")
    forwards = core_seconds(lambda: Descriptor(View(size=size)).describe(backbone, images, cpu)) / batch
    backbone.train()
    training = core_seconds(lambda: step([part], epoch=0.0)) / batch
    return forwards, training, float(sum(values.numel() for values in network.parameters()))


def _whiten(count: int = 20_000) -> float:
    features = rows(count)
    return core_seconds(lambda: whiten(features, DIM)) / count


def _kmeans(clusters: int = 10_000, few: int = 10_000, many: int = 30_000) -> tuple[float, float]:
    """Seconds of one row against one cluster, and of one value of the centroids whatever the rows."""
    one, other = (_step(rows(count), clusters) for count in (few, many))
    pair = (other - one) / (many - few) / clusters
    return pair, max(0.0, one - few * clusters * pair) / clusters / DIM


def _step(features: LocalFeatures, clusters: int, steps: int = 2) -> float:
    """Seconds of a step of k-means: the difference between two runs is free of what is done once."""

    def run(iterations: int) -> float:
        return core_seconds(lambda: kmeans(features, clusters, iterations=iterations, plain=True))

    return (run(1 + steps) - run(1)) / steps


def head(clusters: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """An untrained classifier of the rows."""
    weight = np.random.default_rng(0).standard_normal((clusters, DIM))
    return weight.astype(np.float32), np.zeros(clusters, np.float32)


def _sinkhorn(count: int = 20_000, clusters: int = 500) -> tuple[float, float]:
    """Seconds of one row against one cluster until the tolerance is reached, and how many times rows were gone over."""
    from raycluster.clustering.sinkhorn import sinkhorn

    features, classifier = rows(count), head(clusters)
    passes = sinkhorn(features, [classifier]).iterations[0]
    return core_seconds(lambda: sinkhorn(features, [classifier]), repeats=2) / count / clusters, float(passes)


def _combine(clusters: int = 10_000) -> float:
    left, right = (ClusterSums(np.ones((clusters, DIM), np.int64), ()) for _ in range(2))
    return core_seconds(lambda: merge(left, right)) / left.totals.nbytes


class _Echo:
    def take(self, values: NDArray[np.uint8]) -> int:
        return len(values)

    def give(self, size: int) -> NDArray[np.uint8]:
        return np.zeros(size, np.uint8)


def _messages(size: int = 50_000_000, calls: int = 200) -> tuple[float, float]:
    """Seconds to ask an actor, seconds a byte there and into the store."""
    remote: Any = ray.remote(_Echo)
    actor = remote.options(num_cpus=0).remote()
    ray.get(actor.give.remote(1))
    call = seconds(lambda: ray.get([actor.give.remote(1) for _ in range(calls)])) / calls
    send = seconds(lambda: ray.get(actor.give.remote(size)).max()) / size
    ray.kill(actor)
    return call, send


class _Manifest:
    def __init__(self, count: int) -> None:
        self.paths = pa.array([f"n{index % 1000:08d}/n{index:08d}.JPEG" for index in range(count)])
        self.num_samples = count


def _labels(count: int = 200_000, clusters: int = 1000) -> float:
    """Put in order, compared with those before, and written as Parquet, as the job does with those of every round."""
    rng = np.random.default_rng(0)
    samples, labels = rng.permutation(count), rng.integers(clusters, size=count)
    manifest: Any = _Manifest(count)

    def handle() -> None:
        found = labels[np.argsort(samples)].astype(np.int32)
        normalized_mutual_info_score(found, labels)
        with tempfile.TemporaryDirectory() as folder:
            write_assignments(folder, manifest, found[None])

    return core_seconds(handle) / count


def _plan(count: int = 1_000_000, lanes: int = 128) -> float:
    count -= count % (lanes * 32)
    shards = [(start, min(start + _SHARD, count)) for start in range(0, count, _SHARD)]
    counts = np.ones(count, np.int64)
    return (
        core_seconds(
            lambda: plan_epoch(counts, shards, lanes=lanes, microbatch=32, seed=0, epoch=0, window_shards=16), repeats=2
        )
        / count
    )
