from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from raycluster.clustering.search import assign as module
from raycluster.clustering.search import float32, int8_torch, rerank
from raycluster.clustering.search.assign import assign, nearest
from raycluster.clustering.search.centroids import prepare
from raycluster.types import UserError

ENGINES = ["torch", "faiss", "int8"]


@pytest.fixture(params=["bytes", "float32"], autouse=True, scope="module")
def products(request: pytest.FixtureRequest) -> Iterator[str]:
    """The products of the engine `torch`: 8-bit, where this processor has fast ones, and float32."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "float32":
            patch.setattr(module, "can_search", lambda prepared: False)
        yield request.param


def _naive(values: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    difference = values.astype(np.float64)[:, None] - centroids.astype(np.float64)[None]
    distances = np.square(difference).sum(axis=2)
    return distances.argmin(axis=1), distances.min(axis=1)


def _random(num_rows: int, num_centroids: int, dim: int, offset: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(num_rows + dim)
    values = (rng.standard_normal((num_rows, dim)) + offset).astype(np.float32)
    return values, (rng.standard_normal((num_centroids, dim)) + offset).astype(np.float32)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("shape", [(700, 37, 16), (5, 3, 1), (1, 1, 4), (300, 2, 300)])
def test_labels_are_those_of_float64(engine: module.Engine, shape: tuple[int, int, int], offset: float) -> None:
    values, centroids = _random(*shape, offset)
    labels, distances = nearest(values, centroids, engine=engine)
    wanted, least = _naive(values, centroids)
    assert np.array_equal(labels, wanted)
    assert labels.dtype == np.int64 and distances.dtype == np.float32
    np.testing.assert_allclose(distances, least, rtol=1e-6)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_lowest_of_equal_centroids_wins(engine: module.Engine) -> None:
    values, centroids = _random(400, 20, 8)
    labels, _ = nearest(values, np.tile(centroids, (3, 1)), engine=engine)
    assert np.array_equal(labels, _naive(values, centroids)[0])
    assert nearest(np.array([[1.0]], np.float32), np.array([[2.0], [0.0]]), engine=engine)[0].tolist() == [0]


@pytest.mark.parametrize("engine", ENGINES)
def test_near_ties_that_float32_cannot_tell_apart(engine: module.Engine) -> None:
    rng = np.random.default_rng(0)
    base = rng.standard_normal((1, 64)).astype(np.float32)
    centroids = base + (rng.standard_normal((50, 64)) * 1e-6).astype(np.float32)
    centroids = np.concatenate([centroids, -10 * base])
    values = np.repeat(base, 200, axis=0) + (rng.standard_normal((200, 64)) * 1e-6).astype(np.float32)
    assert np.array_equal(nearest(values, centroids, engine=engine)[0], _naive(values, centroids)[0])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("factor", [1e-30, 1e-18, 1e18, 1e30])
def test_values_whose_squares_leave_float32(engine: module.Engine, factor: float) -> None:
    values, centroids = _random(60, 9, 5)
    values, centroids = values * np.float32(factor), centroids * np.float32(factor)
    with np.errstate(over="ignore"):
        labels, _ = nearest(values, centroids, engine=engine)
    assert np.array_equal(labels, _naive(values, centroids)[0])


@settings(max_examples=60, deadline=None)
@given(
    arrays(np.float32, st.tuples(st.integers(1, 30), st.just(3)), elements=st.integers(-3, 3).map(np.float32)),
    arrays(np.float32, st.tuples(st.integers(1, 12), st.just(3)), elements=st.integers(-3, 3).map(np.float32)),
)
def test_many_exact_ties(values: np.ndarray, centroids: np.ndarray) -> None:
    wanted, _ = _naive(values, centroids)
    for engine in ENGINES:
        assert np.array_equal(nearest(values, centroids, engine=engine)[0], wanted)


def test_labels_do_not_depend_on_the_other_rows() -> None:
    values, centroids = _random(1000, 64, 48)
    prepared = prepare(centroids)
    whole, (labels, distances) = assign(values, prepared), nearest(values, centroids)
    for size in (1, 3, 17, 255, 257):
        cuts = range(0, 1000, size)
        assert np.array_equal(np.concatenate([assign(values[i : i + size], prepared) for i in cuts]), whole)
        parts = [nearest(values[i : i + size], centroids)[1] for i in cuts]
        assert np.array_equal(np.concatenate(parts), distances)
    assert np.array_equal(labels, whole)


def test_many_centroids_are_searched_in_small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    values, centroids = _random(300, 90, 6)
    monkeypatch.setitem(float32._TILE_SCORES, "cpu", 1)
    monkeypatch.setattr(int8_torch, "_TILE_SCORES", 1)
    monkeypatch.setattr(int8_torch, "_PANEL_SCORES", 2000)
    monkeypatch.setattr(rerank, "_PAIR_ENTRIES", 1)
    for engine in ENGINES:
        assert np.array_equal(nearest(values, centroids, engine=engine)[0], _naive(values, centroids)[0])


def test_coarse_products_change_no_label() -> None:
    values, centroids = _random(500, 40, 32)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        labels, _ = nearest(values, centroids, engine="torch")
    finally:
        torch.set_float32_matmul_precision(before)
    assert np.array_equal(labels, _naive(values, centroids)[0])


@pytest.mark.parametrize("engine", ENGINES)
def test_half_precision_read_only_and_empty_input(engine: module.Engine) -> None:
    values, centroids = _random(50, 6, 4)
    half = values.astype(np.float16)
    half.flags.writeable = False
    labels, _ = nearest(half, centroids, engine=engine)
    assert np.array_equal(labels, nearest(half.astype(np.float32), centroids, engine=engine)[0])
    assert nearest(values[:0], centroids, engine=engine)[0].shape == (0,)


def test_input_is_checked() -> None:
    values, centroids = _random(5, 3, 4)
    with pytest.raises(UserError, match=r"\(K, 4\)"):
        nearest(values, centroids[:, :2])
    with pytest.raises(UserError, match="features hold NaN"):
        nearest(np.full_like(values, np.nan), centroids)
    with pytest.raises(UserError, match="centroids hold NaN"):
        nearest(values, np.full_like(centroids, np.inf))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    values, centroids = _random(5000, 300, 64)
    on_gpu, _ = nearest(values, centroids)
    for part in (module, float32, int8_torch):
        monkeypatch.setattr(part, "device", lambda: torch.device("cpu"))
    assert np.array_equal(on_gpu, nearest(values, centroids)[0])
