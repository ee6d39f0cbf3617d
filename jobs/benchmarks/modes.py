"""Training throughput of exact mode against fast mode."""

from __future__ import annotations

import time
from statistics import median

import torch

from raycluster.models.heads import Heads
from raycluster.models.smallnet import Model
from raycluster.training.config import TrainingSettings
from raycluster.training.determinism import prepare_process
from raycluster.training.optimiser import Optimisers
from raycluster.training.step import Microbatch, Network, Step


def run(steps: int = 10, repeats: int = 5, threads: int = 2) -> str:
    """A table: images/s of both modes on the same batches, interleaved, smallnet at 32 pixels."""
    prepare_process()
    rates: dict[str, list[float]] = {"fast": [], "exact": []}
    trainers = {mode: _trainer(mode, threads) for mode in rates}
    batches = [random_batch(index, 100) for index in range(4)]
    for repeat in range(repeats + 1):
        for mode, trainer in trainers.items():
            began = time.perf_counter()
            for step in range(steps):
                trainer(batches[step % len(batches)], epoch=0.0)
            if repeat:
                rates[mode].append(256 * steps / (time.perf_counter() - began))
    fast, exact = median(rates["fast"]), median(rates["exact"])
    return (
        f"training images/s, smallnet, 32 px, batch 256 = 8 x 32, {threads} threads, median of {repeats}\n"
        f"fast {fast:.0f}   exact {exact:.0f}   exact costs {1 - exact / fast:.0%}"
    )


def _trainer(mode: str, threads: int) -> Step:
    settings = TrainingSettings(mode=mode, threads=threads)
    backbone = Model().build(0)
    heads = Heads(backbone.num_features, (100,), 0)
    return Step(Network(backbone, heads), Optimisers(backbone, heads, settings), settings)


def random_batch(index: int, num_classes: int) -> list[Microbatch]:
    """256 images of 32 pixels with labels of one set, drawn from the index."""
    generator = torch.Generator().manual_seed(index)
    return [
        Microbatch(
            torch.randint(256, (32, 32, 32, 3), generator=generator, dtype=torch.uint8),
            torch.randint(num_classes, (1, 32), generator=generator),
            torch.ones(32),
            seed=stream,
        )
        for stream in range(8)
    ]
