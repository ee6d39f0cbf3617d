from __future__ import annotations

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raycluster.clustering import whitening
from raycluster.clustering.whitening import _covariance, fit_whitening, whiten
from raycluster.features.matrix import FeatureStats, LocalFeatures, feature_stats
from raycluster.types import Block, UserError


def _features(values: np.ndarray, num_blocks: int = 1, order_seed: int | None = None) -> LocalFeatures:
    rows = np.arange(len(values)) if order_seed is None else np.random.default_rng(order_seed).permutation(len(values))
    return LocalFeatures([Block(part, values[part]) for part in np.array_split(rows, num_blocks)])


def _correlated(num_rows: int, dim: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((dim, dim)) * np.geomspace(1, 0.1, dim)[:, None]
    return (rng.standard_normal((num_rows, dim)) @ mixing + rng.standard_normal(dim)).astype(np.float32)


def _all_rows(features: LocalFeatures, dim: int) -> np.ndarray:
    return whiten(features, dim).rows(np.arange(features.num_rows))


def test_four_points_on_two_axes() -> None:
    values = np.array([[2, 0], [-2, 0], [0, 1], [0, -1]], np.float32)
    fitted = fit_whitening(_features(values, 2), 2)
    root = np.sqrt(2)
    found = (values - fitted.mean) @ fitted.projection
    np.testing.assert_allclose(found, [[root, 0], [-root, 0], [0, root], [0, -root]], atol=1e-5)
    np.testing.assert_allclose(_all_rows(_features(values), 2), found / root, atol=1e-5)


def test_whitened_columns_are_uncorrelated_with_variance_one() -> None:
    values = _correlated(5000, 64)
    fitted = fit_whitening(_features(values, 3), 16)
    found = (values.astype(np.float64) - fitted.mean) @ fitted.projection
    np.testing.assert_allclose(found.T @ found / 5000, np.eye(16), atol=1e-3)
    np.testing.assert_allclose(found.mean(axis=0), 0, atol=1e-5)


def test_full_rank_distances_are_those_of_mahalanobis() -> None:
    values = _correlated(3000, 8)
    fitted = fit_whitening(_features(values), 8)
    found = (values.astype(np.float64) - fitted.mean) @ fitted.projection
    difference = (values[:50] - values[50:100]).astype(np.float64)
    wanted = np.einsum("ij,jk,ik->i", difference, np.linalg.inv(np.cov(values.T, bias=True)), difference)
    np.testing.assert_allclose(np.square(found[:50] - found[50:100]).sum(axis=1), wanted, rtol=1e-3)


def test_agrees_with_faiss_up_to_sign() -> None:
    values = _correlated(5000, 64)
    matrix = faiss.PCAMatrix(64, 16, -0.5)
    matrix.train(values)
    wanted = matrix.apply(values)
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    found = _all_rows(_features(values, 4), 16)
    assert np.abs(np.abs(found) - np.abs(wanted)).max() < 1e-4
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-6)


def test_equals_the_covariance_convention_in_float64() -> None:
    values = _correlated(5000, 64)
    centred = values.astype(np.float64) - values.mean(axis=0, dtype=np.float64)
    variances, directions = np.linalg.eigh(centred.T @ centred / 5000)
    wanted = centred @ directions[:, :-17:-1] / np.sqrt(variances[:-17:-1])
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    found = _all_rows(_features(values), 16)
    assert np.abs(found * np.sign((found * wanted).sum(axis=0)) - wanted).max() < 1e-5


@settings(max_examples=8, deadline=None)
@given(st.sampled_from([2, 7, 64]), st.integers(0, 1000))
def test_any_blocks_in_any_order_are_bitwise_identical(num_blocks: int, order_seed: int) -> None:
    values = _correlated(1000, 20)
    wanted = _all_rows(_features(values), 11)
    assert _all_rows(_features(values, num_blocks, order_seed), 11).tobytes() == wanted.tobytes()


def test_threads_are_bitwise_identical() -> None:
    values = _correlated(3000, 96)
    before = torch.get_num_threads()
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append(_all_rows(_features(values, 5), 40).tobytes())
    torch.set_num_threads(before)
    assert found[0] == found[1]


@pytest.mark.parametrize("num_rows", [5, 8, 20])
def test_fewer_rows_than_columns(num_rows: int) -> None:
    found = _all_rows(_features(_correlated(num_rows, 30), 2), 5)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-6)


def test_a_constant_column_and_a_copied_one_are_not_blown_up() -> None:
    values = _correlated(500, 6)
    values[:, 2] = 7.25
    values[:, 3] = values[:, 1]
    fitted = fit_whitening(_features(values, 3), 6)
    found = (values.astype(np.float64) - fitted.mean) @ fitted.projection
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found.std(axis=0)[:4], 1, rtol=1e-3)
    assert found.std(axis=0)[4:].max() < 1e-2


def test_columns_of_very_different_scale_and_offset() -> None:
    values = _correlated(2000, 3).astype(np.float64) * [1e-12, 1, 1e12] + [1e-9, 0, 1e13]
    plain = _correlated(2000, 3)
    for column in range(3):
        rows = values[:, column : column + 1].astype(np.float32)
        alone = fit_whitening(_features(rows), 1)
        found = ((rows - alone.mean) @ alone.projection)[:, 0]
        wanted = (plain[:, column] - plain[:, column].mean()) / plain[:, column].std()
        assert np.abs(np.abs(found) - np.abs(wanted)).max() < 2e-3


def test_rows_all_alike_and_a_row_at_the_mean_become_zero() -> None:
    assert not _all_rows(_features(np.full((10, 3), 0.1, np.float32)), 2).any()
    values = np.array([[1, 0], [-1, 0], [0, 2], [0, -2], [0, 0]], np.float32)
    assert not _all_rows(_features(values, 2), 2)[4].any()


def test_half_precision_is_read_exactly() -> None:
    half = _correlated(200, 5).astype(np.float16)
    assert _all_rows(_features(half, 3), 4).tobytes() == _all_rows(_features(half.astype(np.float32)), 4).tobytes()


def test_covariance_of_extreme_values_is_exact() -> None:
    values = np.tile(np.array([[-3.0, 5.0], [3.0, -5.0]], np.float32), (20_000, 1))
    features = _features(values)
    mean, covariance, _ = _covariance(features, feature_stats(features))
    assert mean.tolist() == [0, 0]
    assert covariance.tolist() == [[9, -15], [-15, 25]]


def test_wide_features_are_multiplied_in_stripes(monkeypatch: pytest.MonkeyPatch) -> None:
    features = _features(_correlated(300, 23), 4)
    wanted = _all_rows(features, 9)
    monkeypatch.setattr(whitening, "_STRIPE", 5)
    monkeypatch.setattr(whitening, "_PIECE_ENTRIES", 100)
    assert _all_rows(features, 9).tobytes() == wanted.tobytes()


@pytest.mark.parametrize("num_rows", [10**3, 10**6, 10**8, 10**10])
def test_sums_of_products_cannot_overflow(num_rows: int) -> None:
    centre, step = whitening._grid(FeatureStats(num_rows, np.array([-1], np.float32), np.array([3], np.float32)))
    assert centre == 1
    assert num_rows * int(2 / step[0]) ** 2 < 2**63


def test_invalid_arguments_are_named() -> None:
    values = _correlated(4, 6)
    with pytest.raises(UserError, match="4 rows of 6 columns to 5"):
        whiten(_features(values), 5)
    with pytest.raises(UserError, match="20 rows of 6 columns to 7"):
        fit_whitening(_features(_correlated(20, 6)), 7)
    values[2, 3] = np.inf
    with pytest.raises(UserError, match=r"\[2\]"):
        whiten(_features(values), 2)
