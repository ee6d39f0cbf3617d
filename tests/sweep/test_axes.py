"""Scales of axes: positions and ticks."""

from __future__ import annotations

import pytest

from raycluster.sweep.axes import categorical_scale, numeric_scale, tick_label


def test_logarithmic_positions() -> None:
    scale = numeric_scale([10, 100, 1000], log=True, label_values=True)
    low, middle, high = (scale.position(value) for value in (10, 100, 1000))
    assert middle == pytest.approx(0.5) and middle - low == pytest.approx(high - middle)
    assert [text for _, text in scale.ticks()] == ["10", "100", "1000"]


def test_ticks_lie_inside_the_axis() -> None:
    assert [text for _, text in numeric_scale([0.613, 0.982]).ticks()] == ["0.6", "0.7", "0.8", "0.9", "1"]
    assert [text for _, text in numeric_scale([3, 40_000], log=True).ticks()] == ["10", "100", "1000", "10,000"]
    for scale in (
        numeric_scale([0.613, 0.978]),
        numeric_scale([5.0]),
        numeric_scale([]),
        numeric_scale([0.0, 0.0]),
        numeric_scale([-3.0, 5.0], log=True),
    ):
        assert all(0 <= position <= 1 for position, _ in scale.ticks()) and 2 <= len(scale.ticks()) <= 8


def test_categorical_positions() -> None:
    scale = categorical_scale(["uniform", "weighted", [1, 2], "uniform"])
    assert [text for _, text in scale.ticks()] == ["uniform", "weighted", "[1, 2]"]
    assert scale.position([1, 2]) == pytest.approx(5 / 6)
    assert categorical_scale(["a" * 30]).ticks()[0][1] == "a" * 13 + "…"


def test_labels_are_short() -> None:
    assert [tick_label(value) for value in (0.123456, 12, 1234567, 0.5)] == ["0.1235", "12", "1,234,567", "0.5"]
