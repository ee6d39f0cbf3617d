"""K-means against a naive Lloyd in float64, on thousands of small, hard problems."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raycluster.clustering.kmeans.lloyd import LloydProgress, LloydState, kmeans
from raycluster.clustering.search.assign import Engine, nearest
from raycluster.features.matrix import LocalFeatures
from raycluster.types import Block, UserError


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Thousands of tiny problems: starting threads would take most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


KINDS = ["normal", "whole", "copies", "constant column", "offset", "tiny", "huge", "zeros", "float16"]


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, int, int]:
    """Rows, number of clusters, seed."""
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    num_rows, dim = draw(st.integers(1, 60)), draw(st.sampled_from([1, 2, 3, 8, 33]))
    kind = draw(st.sampled_from(KINDS))
    values = rng.standard_normal((num_rows, dim)).astype(np.float32)
    if kind == "whole":
        values = rng.integers(-2, 3, (num_rows, dim)).astype(np.float32)
    elif kind == "copies":
        values = values[rng.integers(0, max(1, num_rows // 3), num_rows)]
    elif kind == "constant column":
        values[:, 0] = 7
    elif kind == "offset":
        values += np.float32(50)
    elif kind in ("tiny", "huge"):
        values *= np.float32(1e-20 if kind == "tiny" else 1e15)
    elif kind == "zeros":
        values[: num_rows // 2] = 0
    elif kind == "float16":
        values = values.astype(np.float16)
    num_clusters = draw(st.one_of(st.just(1), st.just(num_rows), st.integers(1, num_rows)))
    return values, num_clusters, seed % 1000


def _blocks(values: np.ndarray, num_blocks: int, seed: int) -> LocalFeatures:
    rng = np.random.default_rng(seed)
    cuts = np.sort(rng.integers(0, len(values) + 1, num_blocks - 1))
    return LocalFeatures([Block(rows, values[rows]) for rows in np.split(rng.permutation(len(values)), cuts)])


def _lloyd(values: np.ndarray, centroids: np.ndarray, iterations: int) -> tuple[list[float], bool]:
    """Inertia before each step; and whether a cluster was ever empty, from where on nothing can be compared."""
    rows, centroids, inertia = values.astype(np.float64), centroids.astype(np.float64), []
    for _ in range(iterations):
        distance = np.square(rows[:, None] - centroids[None]).sum(axis=2)
        labels = distance.argmin(axis=1)
        inertia.append(float(distance.min(axis=1).sum()))
        if len(np.unique(labels)) < len(centroids):
            return inertia, True
        means = [rows[labels == cluster].mean(axis=0) for cluster in range(len(centroids))]
        centroids = np.stack(means).astype(np.float32).astype(np.float64)
    return inertia, False


@settings(max_examples=800)
@given(problems(), st.integers(0, 6), st.booleans(), st.integers(1, 5))
def test_against_naive_lloyd(
    problem: tuple[np.ndarray, int, int], iterations: int, plain: bool, num_blocks: int
) -> None:
    values, num_clusters, seed = problem
    distinct = len(np.unique(values.astype(np.float32) + np.float32(0), axis=0))
    features = _blocks(values, num_blocks, seed)
    options = {"iterations": iterations, "seed": seed, "plain": plain}
    if distinct < num_clusters:
        with pytest.raises(UserError, match=f"only {distinct} distinct"):
            kmeans(features, num_clusters, **options)  # type: ignore[arg-type]
        return
    found = kmeans(features, num_clusters, **options)  # type: ignore[arg-type]
    engine: Engine
    for engine in ("torch", "faiss") if seed % 10 == 0 else ("torch",):
        other = kmeans(_blocks(values, 1, 0), num_clusters, engine=engine, **options)  # type: ignore[arg-type]
        assert other.centroids.tobytes() == found.centroids.tobytes() and other.inertia == found.inertia
        assert np.array_equal(other.labels, found.labels)
    labels, _ = nearest(values, found.centroids, engine="torch")
    assert np.array_equal(found.labels, labels)
    assert found.sizes.min() >= 1 and np.array_equal(found.sizes, np.bincount(labels, minlength=num_clusters))
    total = float(np.square(values.astype(np.float64) - found.centroids[labels]).sum())
    # The inertia is in integer units, whose rounding adds up to this share of its largest value.
    assert found.inertia[-1] == pytest.approx(total, rel=1e-6, abs=1e-9 * float(np.square(values.astype(float)).sum()))


@settings(max_examples=500)
@given(problems(), st.integers(1, 6))
def test_plain_steps_are_lloyds(problem: tuple[np.ndarray, int, int], iterations: int) -> None:
    values, num_clusters, seed = problem
    distinct = np.unique(values.astype(np.float32) + np.float32(0), axis=0)
    if len(distinct) < num_clusters:
        return
    begin = np.random.default_rng(seed).permutation(distinct)[:num_clusters]
    found = kmeans(_blocks(values, 3, seed), num_clusters, init=begin, iterations=iterations, plain=True)
    wanted, emptied = _lloyd(values, begin, iterations)
    scale = float(np.square(values.astype(np.float64)).sum())
    compared = min(len(wanted), len(found.inertia))
    # Near-ties between equal distances may go either way in float64; integers and copies have exact ties only.
    np.testing.assert_allclose(found.inertia[:compared], wanted[:compared], rtol=1e-5, atol=1e-7 * scale + 1e-300)
    if not emptied:
        steps = np.diff(found.inertia)
        assert (steps <= 1e-7 * scale).all()


@settings(max_examples=200)
@given(problems(), st.integers(2, 8), st.integers(0, 7))
def test_resuming_from_any_step_changes_nothing(
    problem: tuple[np.ndarray, int, int], iterations: int, stop: int
) -> None:
    values, num_clusters, seed = problem
    if len(np.unique(values.astype(np.float32) + np.float32(0), axis=0)) < num_clusters:
        return
    states: list[LloydState] = []

    def record(progress: LloydProgress) -> None:
        states.append(progress.state)

    whole = kmeans(_blocks(values, 2, 0), num_clusters, iterations=iterations, seed=seed, report=record)
    state = states[min(stop, len(states) - 1)]
    again = kmeans(_blocks(values, 3, 1), num_clusters, iterations=iterations, seed=seed, init=state)
    if len(whole.inertia) - 1 == len(states) and state.iteration < len(states):
        assert again.centroids.tobytes() == whole.centroids.tobytes() and again.inertia == whole.inertia
    assert np.array_equal(again.labels, whole.labels)


@settings(max_examples=100)
@given(problems(), st.sampled_from(["random", "k-means++"]))
def test_spherical_centroids_have_norm_1(problem: tuple[np.ndarray, int, int], init: str) -> None:
    values, num_clusters, seed = problem
    if values.dtype == np.float16 or not np.square(values.astype(np.float64)).sum(axis=1).all():
        return
    try:
        found = kmeans(_blocks(values, 2, 0), num_clusters, init=init, seed=seed, spherical=True, iterations=4)  # type: ignore[arg-type]
    except UserError as error:
        assert "distinct" in str(error)
        return
    norms = np.linalg.norm(found.centroids.astype(np.float64), axis=1)
    assert np.all((np.abs(norms - 1) < 1e-6) | (norms == 0))
    assert np.array_equal(found.predict(values), found.labels[np.arange(len(values))])
