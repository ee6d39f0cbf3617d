"""Optimiser steps with a head of very many clusters: all logits against those of `training.partial_softmax`."""

from __future__ import annotations

import time
from multiprocessing import get_context
from statistics import median

from benchmarks.kmeans_memory import reset_peak, resident
from benchmarks.modes import random_batch

from raycluster.models.heads import Heads
from raycluster.models.smallnet import Model
from raycluster.training.config import TrainingSettings
from raycluster.training.determinism import prepare_process
from raycluster.training.objective import CrossEntropy
from raycluster.training.optimiser import Optimisers
from raycluster.training.partial_softmax import with_partial_softmax
from raycluster.training.step import Network, Step


def run(clusters: int = 100_000, chosen: str = "1000,10000", steps: int = 2, repeats: int = 5, threads: int = 2) -> str:
    """A table: seconds and memory of a step of 256 images, smallnet at 32 pixels with a wide last layer.

    clusters: of the head. chosen: numbers of clusters whose logits are computed, separated by commas. The last row is a
    head of 100 clusters, hence the network alone. Steps of all rows take turns. Memory is the peak of the first step of
    a process beyond the weights: gradients, momentum and activations.
    """
    prepare_process()
    cases = [(clusters, count) for count in (clusters, *map(int, chosen.split(",")))] + [(100, 100)]
    trainers = {case: _trainer(*case, threads) for case in cases}
    seconds: dict[tuple[int, int], list[float]] = {case: [] for case in cases}
    for repeat in range(repeats + 1):
        for case, trainer in trainers.items():
            elapsed = _seconds(trainer, case[0], steps)
            if repeat:
                seconds[case].append(elapsed)
    lines = ["| clusters | logits computed | s a step | faster | MB of memory |", "|---:|---:|---:|---:|---:|"]
    for case in cases:
        with get_context("spawn").Pool(1) as pool:
            memory = pool.apply(_memory, (*case, threads))
        step, faster = median(seconds[case]), median(seconds[cases[0]]) / median(seconds[case])
        lines.append(f"| {case[0]} | {case[1]} | {step:.3f} | {faster:.2f} | {memory / 1e6:.0f} |")
    return f"batch 256 = 8 x 32, {threads} threads, median of {repeats}\n\n" + "\n".join(lines)


def _trainer(clusters: int, chosen: int, threads: int) -> Step:
    settings = TrainingSettings(threads=threads, head_momentum=0.9)
    backbone = Model(widths=(16, 32, 64, 1024)).build(0)
    heads = Heads(backbone.num_features, (clusters,), 0)
    objective = with_partial_softmax(CrossEntropy(), chosen, (clusters,))
    network = Network(backbone, heads)
    return Step(network, Optimisers(backbone, heads, settings), settings, objective=objective)


def _seconds(trainer: Step, clusters: int, steps: int) -> float:
    batches = [random_batch(index, clusters) for index in range(steps)]
    began = time.perf_counter()
    for batch in batches:
        trainer(batch, epoch=0.0)
    return (time.perf_counter() - began) / steps


def _memory(clusters: int, chosen: int, threads: int) -> int:
    """Bytes by which the peak of a step exceeds what is resident before the first."""
    prepare_process()
    _seconds(_trainer(100, 100, threads), 100, 1)  # loads libraries
    trainer = _trainer(clusters, chosen, threads)
    baseline = resident("VmRSS")
    reset_peak()
    _seconds(trainer, clusters, 1)
    return resident("VmHWM") - baseline
