"""Images per second of the training stream, of a torch DataLoader with as many processes, and of decoding only.

The stream is timed from the call on, including planning by Ray Data; the DataLoader from its first batch on. For
photographs, also the stream of Sobel gradients (`views.train.sobel`) against that of pixels, from which the network
computes them.
"""

from __future__ import annotations

import io
import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from raycluster.data.epoch_plan import plan_epoch
from raycluster.data.loader import load_chunk
from raycluster.data.manifest import DataSettings, Manifest, build_manifest, write_manifest
from raycluster.data.transforms import View
from raycluster.distributed.ingest import stream
from raycluster.distributed.session import ray_session
from raycluster.types import Chunk, Loader, UserError

BATCH, STREAMS, MICROBATCH = 256, 8, 32
PHOTO = View(size=224, crop_scale=(0.08, 1.0), flip=0.5)


def run(small: str = "", photos: str = "", processes: int = 2, repeats: int = 3) -> str:
    """A table for images of 32 pixels (`small`) and for full-size photographs, both Parquet with a column `image`."""
    if not small and not photos:
        raise UserError("nothing to measure: give small=URI, photos=URI, or both (Parquet files with a column `image`)")
    os.environ["OMP_NUM_THREADS"] = "1"
    lines = [f"images/s with {processes} processes, median of {repeats} interleaved runs"]
    lines.append(f"{'':<28}{'raycluster':>12}{'DataLoader':>12}{'ratio':>8}{'decode only':>13}{'share':>8}")
    with ray_session(num_cpus=processes):
        for name, uri, view, times in (
            ("32 px, crop and flip", small, View(size=32, crop_scale=(0.3, 1.0), flip=0.5), 1),
            ("photos, crop to 224, flip", photos, PHOTO, 16),
        ):
            if uri:
                lines.append(_row(name, Problem(uri, view, times, processes), repeats))
        if photos:
            lines += ["", *_sobel_rows(photos, processes, repeats)]
    return "\n".join(lines)


class Problem:
    """A data set, visited `times` times per epoch, and three pipelines."""

    def __init__(self, uri: str, view: View, times: int, processes: int) -> None:
        self.view, self.processes = view, processes
        self.settings = DataSettings(uri=uri, shard_size=1000 if view.size < 64 else 50)
        self.manifest: Manifest = build_manifest(self.settings)
        self.manifest_uri = str(Path(tempfile.mkdtemp()) / "manifest.parquet")
        write_manifest(self.manifest, self.manifest_uri)
        self.visit_counts = np.full(self.manifest.num_samples, times)
        files = sorted(set(self.manifest.entries["container"].to_pylist()))
        self.images = [data for file in files for data in pq.read_table(file)["image"].to_pylist()] * times

    def ours(self, epoch: int) -> float:
        """Images per second of the training stream."""
        return _rate((len(block.samples) for block in stream(self.plan(epoch), self.load())), warm=False)

    def plan(self, epoch: int) -> list[Chunk]:
        size = len(self.images) // (STREAMS * MICROBATCH) * STREAMS * MICROBATCH
        counts = self.visit_counts.copy()
        counts[: len(self.images) - size] -= 1
        return plan_epoch(
            counts, self.manifest.shards, streams=STREAMS, microbatch=MICROBATCH, seed=0, epoch=epoch, window_shards=1
        )

    def load(self) -> Loader:
        return partial(
            load_chunk,
            manifest_uri=self.manifest_uri,
            view=self.view,
            seed=0,
            settings=self.settings,
            microbatch=MICROBATCH,
        )

    def dataloader(self, epoch: int) -> float:
        from torch.utils.data import DataLoader

        loader = DataLoader(
            _TorchDataset(self.images, self.view), BATCH, shuffle=True, num_workers=self.processes, prefetch_factor=4
        )
        return _rate(len(batch) for batch in loader)

    def decoding(self, epoch: int) -> float:
        """Images per second of decoding by Pillow only."""
        parts = [self.images[start :: self.processes * 8] for start in range(self.processes * 8)]
        with ProcessPoolExecutor(self.processes, mp_context=get_context("fork")) as pool:
            list(pool.map(_warm_up, range(self.processes)))
            return _rate(pool.map(_decode, parts), warm=False)


class _TorchDataset:
    def __init__(self, images: list[bytes], view: View) -> None:
        from torchvision import transforms

        self.images = images
        assert view.crop_scale is not None
        crop = transforms.RandomResizedCrop(view.size, scale=view.crop_scale)
        self.transform = transforms.Compose([crop, transforms.RandomHorizontalFlip(), transforms.ToTensor()])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> object:
        return self.transform(Image.open(io.BytesIO(self.images[index])).convert("RGB"))


def _decode(images: list[bytes]) -> int:
    for data in images:
        Image.open(io.BytesIO(data)).convert("RGB")
    return len(images)


def _warm_up(index: int) -> None:
    pass


def _rate(counts: Iterator[int], *, warm: bool = True) -> float:
    """Items per second. warm: from the arrival of the first batch on, without the start of the pipeline."""
    start, done = time.perf_counter(), 0
    for number, count in enumerate(counts):
        if warm and number == 0:
            start = time.perf_counter()
        else:
            done += count
    return done / (time.perf_counter() - start)


def _row(name: str, problem: Problem, repeats: int) -> str:
    problem.ours(0)  # the first run starts Ray's worker processes
    figures = [(problem.ours(n), problem.dataloader(n), problem.decoding(n)) for n in range(1, repeats + 1)]
    ours, loader, bare = (median(column) for column in zip(*figures, strict=True))
    return f"{name:<28}{ours:>12.0f}{loader:>12.0f}{ours / loader:>8.2f}{bare:>13.0f}{ours / bare:>8.2f}"


def _sobel_rows(uri: str, processes: int, repeats: int) -> list[str]:
    """Where Sobel gradients are computed: by the network from a stream of pixels, or in the stream."""
    lines = [f"{'Sobel of photos at 224':<28}{'stream, images/s':>18}{'bytes/image':>13}{'input layer, images/s':>23}"]
    views = {"by the network": PHOTO, "in the stream": replace(PHOTO, sobel=True)}
    problems = {name: Problem(uri, view, 16, processes) for name, view in views.items()}
    rates = [{name: problem.ours(n) for name, problem in problems.items()} for n in range(repeats)]
    for name, view in views.items():
        rate = median(found[name] for found in rates)
        lines.append(f"{name:<28}{rate:>18.0f}{view.blank(1).nbytes:>13}{_input_layer(view):>23.0f}")
    return lines


def _input_layer(view: View) -> float:
    """Images per second and core of the network's first layer."""
    import torch

    from raycluster.models.input_layers import Sobel

    images, layer = torch.from_numpy(view.blank(MICROBATCH)).permute(0, 3, 1, 2), Sobel()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rate = _rate(len(layer(images)) for _ in range(20))
    torch.set_num_threads(threads)
    return rate
