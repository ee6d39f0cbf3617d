"""Exact assignment on a GPU against float32 products, with the utilisation of tensor cores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from benchmarks.units import DIM, seconds
from numpy.typing import NDArray

from raycluster.clustering.search import int8_cuda
from raycluster.clustering.search.centroids import PreparedCentroids, prepare, quantize_rows
from raycluster.clustering.search.float32 import in_tiles
from raycluster.types import UserError

_PLAIN_SCORES = 1 << 28


def run(rows: int = 1_280_000, clusters: str = "10000,80000") -> str:
    """A table: seconds of one assignment of the rows of a mixture. clusters: numbers of clusters, separated by commas.

    Rows lie in GPU memory for `float32` and `products alone`, otherwise in host memory, as features do.
    """
    if not torch.cuda.is_available():
        raise UserError("benchmark gpu needs a CUDA device, and torch finds none; run it on a machine with a GPU")
    where = torch.device("cuda")
    int8, bf16 = (peak(dtype, where) for dtype in (torch.int8, torch.bfloat16))
    values = mixture(rows, DIM, where)
    lines = [
        f"{rows} x {DIM}, {torch.cuda.get_device_name()}: {int8:.3g} int8, {bf16:.3g} bf16 operations a second",
        "",
        "| K | engine | seconds | times faster than float32 | share of int8 | of bf16 | labels as float32 |",
        "|---:|---|---:|---:|---:|---:|---:|",
    ]
    for num_clusters in map(int, clusters.split(",")):
        operations, base = 2.0 * rows * num_clusters * DIM, 0.0
        for name, spent, agreement in passes(values, num_clusters):
            base, rate = base or spent, operations / spent
            shares = f"{rate / int8:.0%} | {rate / bf16:.0%}"
            lines.append(f"| {num_clusters} | {name} | {spent:.3f} | {base / spent:.1f} | {shares} | {agreement:.5%} |")
    return "\n".join(lines)


def passes(values: torch.Tensor, num_clusters: int) -> Iterator[tuple[str, float, float]]:
    """(name, seconds, share of labels equal to those of float32 products) of each engine."""
    where, host = values.device, values.cpu().numpy()
    prepared = prepare(host[np.random.default_rng(1).choice(len(host), num_clusters, replace=False)])
    engines: dict[str, Callable[[], Any]] = {"float32": lambda: _plain(values, prepared)}
    if int8_cuda.can_search(prepared, where):
        engines["raycluster"] = lambda: in_tiles(host, *int8_cuda.gpu_search(prepared, where))
    if find_spec("fastkmeans"):
        engines["fastkmeans"] = lambda: _fastkmeans(host, prepared, where)
    wanted = _plain(values, prepared)
    for name, engine in engines.items():
        agreement = float((engine() == wanted).mean())  # also compiles
        yield name, seconds(engine), agreement
        if name == "raycluster":
            yield "raycluster, products alone", seconds(lambda: _products(values, prepared)), agreement


def mixture(count: int, dim: int, where: torch.device) -> torch.Tensor:
    """Normalised rows (count, dim) of a mixture of a thousand components."""
    torch.manual_seed(0)
    places = torch.randint(1000, (count,), device=where)
    values = torch.randn(1000, dim, device=where)[places].add_(torch.randn(count, dim, device=where))
    return torch.nn.functional.normalize(values)


def peak(dtype: torch.dtype, where: torch.device, side: int = 8192) -> float:
    """Operations per second of the vendor's product of square matrices."""
    left, right = (torch.randint(-127, 128, (side, side), device=where).to(dtype) for _ in range(2))
    product = torch._int_mm if dtype == torch.int8 else torch.mm
    return 2.0 * side**3 / seconds(lambda: float(product(left, right.T)[0, 0]), 10)


def _plain(values: torch.Tensor, prepared: PreparedCentroids) -> Any:
    tables = prepared.centred, prepared.offsets, torch.from_numpy(prepared.centre)
    centred, offsets, centre = (table.to(values.device) for table in tables)
    parts = values.split(max(1, _PLAIN_SCORES // len(centred)))
    return torch.cat([torch.addmm(offsets, part - centre, centred.T).argmax(dim=1) for part in parts]).cpu().numpy()


def _products(values: torch.Tensor, prepared: PreparedCentroids) -> None:
    from raycluster.clustering.search.triton_kernel import highest, pack_rows

    on_device, (_, size) = prepared.device_cache[values.device], int8_cuda.gpu_search(prepared, values.device)
    for part in values.split(size):
        found = highest(pack_rows(quantize_rows(part - on_device.centre)), on_device.packed)
    float(found[0, 0])  # synchronises


def _fastkmeans(host: NDArray[np.float32], prepared: PreparedCentroids, where: torch.device) -> Any:
    from fastkmeans import FastKMeans

    found = FastKMeans(host.shape[1], len(prepared.centroids), device=where)
    found.centroids = prepared.centroids
    return found.predict(host)
