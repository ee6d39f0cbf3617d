"""8-bit products propose what float64 decides, however badly rows and centroids fit 8 bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raycluster.clustering.search.centroids import prepare, quantize_rows
from raycluster.clustering.search.int8_torch import can_search, int8_search
from tests.clustering.nasty import KINDS, naive, problem

pytestmark = pytest.mark.skipif(
    not can_search(prepare(np.eye(2, dtype=np.float32))), reason="needs a processor with VNNI"
)


@settings(max_examples=150)
@given(st.integers(0, 2**32 - 1), st.sampled_from(KINDS), st.integers(1, 300), st.integers(1, 150), st.integers(1, 40))
def test_labels_are_those_of_float64(seed: int, nasty: str, num_rows: int, num_centroids: int, dim: int) -> None:
    values, centroids = problem(np.random.default_rng(seed), num_rows, num_centroids, dim, nasty)
    prepared = prepare(centroids)
    if can_search(prepared):
        search, size = int8_search(prepared)
        found = [search(values[start : start + size]) for start in range(0, num_rows, size)]
        assert np.array_equal(np.concatenate(found), naive(values, centroids))


def test_the_rounding_error_is_within_its_bound() -> None:
    rows = torch.randn(50, 33) * 10.0 ** torch.arange(-25, 25)[:, None]
    found = quantize_rows(rows)
    exact = rows.double()
    missing = exact - found.values.double() * found.scales.double()[:, None]
    assert (missing.norm(dim=1) <= found.errors.double()).all() and (exact.norm(dim=1) <= found.norms.double()).all()
    usual = (found.norms > 2.0**-50) & (found.norms < 2.0**50)
    assert usual.sum() > 25
    assert (found.errors < 0.02 * found.norms)[usual].all()
