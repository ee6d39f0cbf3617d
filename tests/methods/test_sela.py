from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydantic import ValidationError

from raycluster.clustering.kmeans.lloyd import kmeans
from raycluster.features.matrix import LocalFeatures
from raycluster.methods.base import AssignmentContext
from raycluster.methods.sela import Method
from raycluster.models.heads import Heads
from raycluster.seeding import seed_for
from raycluster.types import Assignments, Block

rng = np.random.default_rng(0)
VALUES = np.maximum(rng.standard_normal((210, 6)), 0).astype(np.float16)
WEIGHTS = [rng.standard_normal((size, 6)).astype(np.float32) for size in (3, 5)]
TWO = {"num_heads": 2, "num_clusters": (3, 5)}


def blocks(values: NDArray, number: int, order: NDArray | None = None) -> LocalFeatures:
    samples = np.arange(len(values)) if order is None else order
    return LocalFeatures([Block(part, values[part]) for part in np.array_split(samples, number)])


def assign(method: Method, features: LocalFeatures, previous: Assignments | None = None, seed: int = 0) -> Assignments:
    heads = heads_of(WEIGHTS[: method.num_heads])
    context = AssignmentContext(features.num_rows, round=0, seed=seed, heads=heads, previous=previous)
    return method.assign(features, context)


def heads_of(weights: list[NDArray]) -> Heads:
    """Heads of these weights, without bias."""
    heads = Heads(weights[0].shape[1], [len(weight) for weight in weights], seed=0)
    with torch.no_grad():
        for layer, weight in zip(heads.linear, weights, strict=True):
            layer.weight.copy_(torch.from_numpy(weight))
    return heads


def epochs_of(steps: list[int], steps_per_epoch: int) -> NDArray:
    return np.array(steps) / steps_per_epoch


def test_published_schedule_of_400_epochs() -> None:
    """The published loop counts epochs 0 to E inclusive, so E = 400 is a run of 401 epochs."""
    times = epochs_of(Method().reassign_steps(401, 10_000), 10_000)
    assert len(times) == 99, "the last of 100 is never reached"
    assert times[:6] == pytest.approx([0, 0.041, 0.164, 0.368, 0.655, 1.023], abs=1e-3)
    assert times[-2:] == pytest.approx([384.971, 392.950], abs=1e-3)
    assert [(times < epoch).sum() for epoch in (1, 10, 100)] == [5, 16, 50]


def test_published_schedule_of_200_epochs() -> None:
    times = epochs_of(Method().reassign_steps(201, 10_000), 10_000)
    assert [(times < epoch).sum() for epoch in (1, 10)] == [7, 23]


def test_linear_schedule_updates_each_of_ten_heads_39_or_40_times() -> None:
    method = Method(num_heads=10, num_clusters=128, schedule="linear", num_reassignments=400, reassign="one")
    steps = method.reassign_steps(401, 100)
    assert len(steps) == 399 and set(np.diff(steps)) == {100, 101}
    assert set(np.bincount(np.arange(len(steps) - 1) % 10)) == {39, 40}, "the first is of all heads"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"schedule": "epochs"}, [0, 10, 20, 30]),
        ({"schedule": "epochs", "every": 3}, [0, 30]),
        ({"schedule": "steps", "every": 15}, [0, 15, 30]),
        ({"schedule": "steps", "every": 4, "max_per_epoch": 2}, [0, 4, 12, 16, 20, 24, 32, 36]),
        ({"schedule": "linear", "num_reassignments": 5}, [0, 11, 21, 31]),
        ({"num_reassignments": 30, "max_per_epoch": 1}, [0, 10, 20, 30]),
    ],
)
def test_schedules(options: dict[str, Any], expected: list[int]) -> None:
    assert Method(**options).reassign_steps(4, 10) == expected


def test_more_reassignments_than_steps_are_one_a_step() -> None:
    assert Method(num_reassignments=1000).reassign_steps(2, 5) == list(range(10))


@pytest.mark.parametrize("rounding", ["argmax", "exact"])
def test_labels_do_not_depend_on_blocks_or_the_order_of_rows(rounding: Any) -> None:
    method = Method(**TWO, sharpness=5, rounding=rounding)
    expected = assign(method, blocks(VALUES, 1))
    for number in (2, 7, 64):
        found = assign(method, blocks(VALUES, number, np.random.default_rng(number).permutation(210)))
        assert np.array_equal(found.labels, expected.labels)
        assert all(np.array_equal(found.state[name], array) for name, array in expected.state.items())
        assert found.metrics == expected.metrics


def test_every_head_has_clusters_of_equal_size() -> None:
    found = assign(Method(**TWO, rounding="exact"), blocks(VALUES, 3))
    assert found.num_classes == (3, 5)
    assert np.bincount(found.labels[0]).tolist() == [70] * 3
    assert np.bincount(found.labels[1]).tolist() == [42] * 5


def test_clusters_get_the_shares_of_the_prior() -> None:
    found = assign(Method(num_clusters=3, prior=(1, 2, 4), rounding="exact"), blocks(VALUES, 3))
    assert np.bincount(found.labels[0]).tolist() == [30, 60, 120]


def test_by_hand() -> None:
    """The rows of the smaller hand case as features of an identity head: optimum (0, 0, 1, 1)."""
    rows = np.log(np.array([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.7, 0.3]])).astype(np.float32)
    method = Method(num_clusters=2, tolerance=1e-6)
    heads = heads_of([np.eye(2, dtype=np.float32)])
    found = method.assign(blocks(rows, 2), AssignmentContext(6, round=0, seed=0, heads=heads, previous=None))
    assert found.labels.tolist() == [[0, 0, 1, 1, -1, -1]], "samples without features have no label"
    assert found.metrics["transport_cost"] == pytest.approx(0.612192, abs=1e-6)


def test_one_head_at_a_time_leaves_the_others() -> None:
    method = Method(**TWO, reassign="one")
    first = assign(method, blocks(VALUES, 2))
    moved = blocks(VALUES[::-1].copy(), 2)
    second = assign(method, moved, first)
    third = assign(method, moved, second)
    everything = assign(Method(**TWO), moved, first)
    assert np.array_equal(second.labels[0], everything.labels[0])
    assert np.array_equal(second.labels[1], first.labels[1])
    assert np.array_equal(third.labels, everything.labels)


def test_kmeans_labels_differ_from_balanced_ones_in_the_assignment_alone() -> None:
    method, transport = Method(**TWO, labels="kmeans"), Method(**TWO)
    assert method.feature_request(3) == transport.feature_request(3)
    assert method.reassign_steps(20, 50) == transport.reassign_steps(20, 50)
    first = assign(method, blocks(VALUES, 3), seed=4)
    assert first.num_classes == assign(transport, blocks(VALUES, 3)).num_classes == (3, 5)
    for head, size in enumerate((3, 5)):
        alone = kmeans(blocks(VALUES, 2), size, seed=seed_for(4, "kmeans", head), plain=True)
        assert np.array_equal(first.labels[head], alone.labels)
    assert not np.array_equal(first.labels, assign(method, blocks(VALUES, 3), seed=5).labels), "starts are random"


def test_kmeans_begins_with_the_labels_before_so_that_numbers_of_clusters_stay() -> None:
    method = Method(**TWO, labels="kmeans")
    first = assign(method, blocks(VALUES, 3))
    again = assign(method, blocks(VALUES, 5), first, seed=9)
    assert again.metrics["iterations"] <= first.metrics["iterations"]
    assert np.mean(again.labels == first.labels) > 0.8
    one = Method(**TWO, labels="kmeans", reassign="one")
    moved = blocks(VALUES[::-1].copy(), 2)
    assert np.array_equal(assign(one, moved, first).labels[1], first.labels[1])


def test_kmeans_labels_do_not_depend_on_blocks() -> None:
    method = Method(**TWO, labels="kmeans")
    expected = assign(method, blocks(VALUES, 1))
    for number in (2, 7, 64):
        found = assign(method, blocks(VALUES, number, np.random.default_rng(number).permutation(210)))
        assert np.array_equal(found.labels, expected.labels) and found.metrics == expected.metrics


def test_without_reassignment_labels_are_random_balanced_and_stay() -> None:
    method = Method(num_heads=2, num_clusters=(4, 7), num_reassignments=0)
    assert method.feature_request(0) is None
    assert method.reassign_steps(3, 10) == [0, 10, 20]
    context = AssignmentContext(33, round=0, seed=1, heads=heads_of(WEIGHTS), previous=None)
    found = method.assign(None, context)
    for row, size in zip(found.labels, (4, 7), strict=True):
        sizes = np.bincount(row, minlength=size)
        assert len(sizes) == size and sizes.max() - sizes.min() <= 1
        assert (np.diff(row) < 0).any(), "not in order"
    assert found.num_classes == (4, 7)
    assert method.assign(None, replace(context, round=1, seed=2, previous=found)) is found
    assert not np.array_equal(method.assign(None, replace(context, seed=2)).labels, found.labels)


def test_a_single_reassignment_is_at_the_start() -> None:
    assert Method(num_reassignments=1).reassign_steps(4, 10) == [0]


def test_warm_start_begins_with_the_scalings_of_the_previous_round() -> None:
    cold, warm = Method(**TWO, tolerance=1e-6), Method(**TWO, tolerance=1e-6, warm_start=True)
    first = assign(cold, blocks(VALUES, 2))
    again = assign(warm, blocks(VALUES, 2), first)
    assert first.metrics["iterations"] > 3 >= again.metrics["iterations"]
    assert np.array_equal(again.labels, first.labels)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"every": 2}, "every has no effect with schedule quadratic"),
        ({"schedule": "steps", "num_reassignments": 9}, "num_reassignments has no effect with schedule steps"),
        ({"schedule": "epochs", "max_per_epoch": 1}, "max_per_epoch has no effect"),
        ({"num_heads": 3, "num_clusters": (4, 5)}, "names 2 heads, num_heads says 3"),
        ({"num_clusters": 3, "prior": (1, 2)}, "prior has 2 shares"),
        ({"num_clusters": 2, "prior": (0, 0)}, "prior sums to 0"),
        ({"reassign": "one"}, "no effect with a single head"),
        ({"features": "online", "view": "train"}, "no effect with online features"),
        ({"features": "online", "network_mode": "train"}, "no effect with online features"),
        ({"labels": "kmeans", "sharpness": 10}, "sharpness has no effect with labels kmeans: .* its default, 25.0"),
        ({"labels": "kmeans", "rounding": "exact"}, "rounding has no effect with labels kmeans"),
        ({"num_reassignments": 0, "labels": "kmeans"}, "labels has no effect with num_reassignments 0"),
        ({"num_reassignments": 0, "view": "train"}, "view has no effect with num_reassignments 0"),
    ],
)
def test_settings_without_effect_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        Method(**options)
