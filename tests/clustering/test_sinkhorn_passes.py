"""Bitwise identical for any blocks, order, threads, vector width, and with any cached values lost."""

from __future__ import annotations

from collections import OrderedDict
from functools import reduce
from hashlib import sha256
from typing import Any

import numpy as np
import pytest
import torch

from raycluster.clustering import row_cache
from raycluster.clustering.sinkhorn import native, reference
from raycluster.clustering.sinkhorn.api import Sinkhorn, sinkhorn
from raycluster.clustering.sinkhorn.sparse import CandidateWindow, Classifier, pack
from raycluster.features.matrix import LocalFeatures, add
from raycluster.types import Block

NUM_ROWS, DIM = 1100, 37
RNG = np.random.default_rng(0)
VALUES = RNG.standard_normal((NUM_ROWS, DIM)).astype(np.float32)
HEADS = [
    (RNG.standard_normal((k, DIM)).astype(np.float32) * scale, RNG.standard_normal(k).astype(np.float32))
    for k, scale in ((5, 0.01), (70, 0.3), (129, 1.5))
]
compiled = pytest.mark.skipif(not native.support(), reason="no compiled passes on this machine")


def digest(found: Sinkhorn) -> str:
    numbers = [found.marginal_errors, found.iterations, found.costs, found.rounding_costs]
    arrays = [found.samples, found.labels, *found.scalings, *found.sizes, np.array(numbers, np.float64)]
    return sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()


def blocks(num_blocks: int, *, shuffled: bool) -> list[Block]:
    rng = np.random.default_rng(num_blocks)
    order = rng.permutation(NUM_ROWS) if shuffled else np.arange(NUM_ROWS)
    cuts = np.sort(rng.integers(0, NUM_ROWS + 1, num_blocks - 1))
    return [Block(part, VALUES[part]) for part in np.split(order, cuts)]


@pytest.fixture(params=["compiled", "plain"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "plain":
        monkeypatch.setattr(native, "_library", lambda: None)
    elif not native.support():
        pytest.skip("no compiled passes on this machine")
    return str(request.param)


def test_any_blocks_in_any_order_are_bitwise_identical(engine: str) -> None:
    wanted = digest(sinkhorn(LocalFeatures(blocks(1, shuffled=False)), HEADS, rounding="exact"))
    for num_blocks in (1, 2, 7, 64):
        features = LocalFeatures(blocks(num_blocks, shuffled=True))
        assert digest(sinkhorn(features, HEADS, rounding="exact")) == wanted


def test_permuted_rows_have_the_permuted_labels() -> None:
    order = np.random.default_rng(1).permutation(NUM_ROWS)
    here = sinkhorn(LocalFeatures([Block(np.arange(NUM_ROWS), VALUES)]), HEADS)
    there = sinkhorn(LocalFeatures([Block(np.arange(NUM_ROWS), VALUES[order])]), HEADS)
    assert np.array_equal(there.labels, here.labels[:, order])


def test_blocks_that_move_between_processes_are_bitwise_identical(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values cached by one process may be stale when a block returns to it from another one."""
    memories, rng = [OrderedDict(), OrderedDict()], np.random.default_rng(5)

    class Stolen(LocalFeatures):
        def fold(self, function: Any, *args: Any, combine: Any = add) -> Any:
            found = []
            for block in self._blocks:
                monkeypatch.setattr(row_cache, "_CACHE", memories[int(rng.random() < 0.3)])
                found.append(function(block, *args))
            return reduce(combine, found)

    wanted = digest(sinkhorn(LocalFeatures(blocks(1, shuffled=False)), HEADS[1:2]))
    assert digest(sinkhorn(Stolen(blocks(7, shuffled=True)), HEADS[1:2])) == wanted


def test_threads_and_evicted_values_are_bitwise_identical() -> None:
    class Evicting(LocalFeatures):
        def fold(self, function: Any, *args: Any, **options: Any) -> Any:
            row_cache._CACHE.clear()
            return super().fold(function, *args, **options)

    wanted = digest(sinkhorn(LocalFeatures(blocks(3, shuffled=False)), HEADS[1:2]))
    assert digest(sinkhorn(Evicting(blocks(3, shuffled=False)), HEADS[1:2])) == wanted
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(5)
        assert digest(sinkhorn(LocalFeatures(blocks(9, shuffled=True)), HEADS[1:2])) == wanted
    finally:
        torch.set_num_threads(threads)
    assert not row_cache._CACHE


@compiled
def test_narrower_vectors_are_bitwise_identical(monkeypatch: pytest.MonkeyPatch) -> None:
    features = LocalFeatures(blocks(2, shuffled=False))
    wanted = digest(sinkhorn(features, HEADS))
    monkeypatch.setattr(native, "support", lambda: 1)
    assert digest(sinkhorn(features, HEADS)) == wanted


@compiled
@pytest.mark.parametrize("dim", [1, 37, 600])
def test_both_engines_find_the_same_candidates_plan_and_sums(dim: int) -> None:
    rng = np.random.default_rng(dim)
    values = rng.standard_normal((101, dim)).astype(np.float32)
    head = pack(rng.standard_normal((130, dim)).astype(np.float32) / np.sqrt(dim), rng.standard_normal(130))
    scaling = np.where(np.arange(130) == 7, -np.inf, rng.standard_normal(130))
    window, shift = CandidateWindow(9.0, scaling, 21.5), rng.standard_normal(130)
    ours, theirs = (engine.candidates(values, head, window) for engine in (native, reference))
    assert np.array_equal(ours.first, theirs.first) and np.array_equal(ours.cluster, theirs.cluster)
    for name in ("score", "top", "norm"):
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), atol=2e-4)
    assert 7 not in ours.cluster and ours.score.max() == 0 and ours.score.min() >= -21.5
    one, two = (engine.plan(ours, shift, 30.0, 2.0**30) for engine in (native, reference))
    assert np.array_equal(one.cluster, two.cluster) and one.value == pytest.approx(two.value, rel=1e-12)
    np.testing.assert_allclose(one.share, two.share, rtol=1e-12, atol=1e-16)
    vector = rng.uniform(-1, 1, 130)
    for mine, other in (
        (native.marginals(one, 130, 2.0**40), reference.marginals(one, 130, 2.0**40)),
        ([native.product(one, vector, 2.0**40)], [reference.product(one, vector, 2.0**40)]),
    ):
        for left, right in zip(mine, other, strict=True):
            np.testing.assert_allclose(left, right, rtol=1e-9, atol=200)


def test_the_product_is_the_derivative_of_the_marginals(engine: str) -> None:
    rng = np.random.default_rng(4)
    logits, shift, vector = rng.standard_normal((50, 11)), rng.standard_normal(11), rng.uniform(-1, 1, 11)
    found = native.candidates(logits, Classifier(None, np.zeros(11, np.float32)), CandidateWindow(2, np.zeros(11), 99))

    def sums(step: float) -> np.ndarray:
        plan = native.plan(found, shift + step * vector, 40, 1.0)
        return native.marginals(plan, 11, 2.0**44)[0] / 2.0**44

    product = native.product(native.plan(found, shift, 40, 1.0), vector, 2.0**44) / 2.0**44
    np.testing.assert_allclose(product, (sums(1e-4) - sums(-1e-4)) / 2e-4, atol=1e-6)
    assert sums(0).sum() == pytest.approx(50, abs=1e-9)
