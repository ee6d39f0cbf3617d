"""Axes: where values lie, and what is written beside them."""

from __future__ import annotations

import pytest

from raycluster.sweep.axes import along, choices, tick_label


def test_logarithmic_values_lie_evenly() -> None:
    scale = along([10, 100, 1000], log=True, label_values=True)
    low, middle, high = (scale.place(value) for value in (10, 100, 1000))
    assert middle == pytest.approx(0.5) and middle - low == pytest.approx(high - middle)
    assert [text for _, text in scale.ticks()] == ["10", "100", "1000"]


def test_round_numbers_stand_inside() -> None:
    assert [text for _, text in along([0.613, 0.982]).ticks()] == ["0.6", "0.7", "0.8", "0.9", "1"]
    assert [text for _, text in along([3, 40_000], log=True).ticks()] == ["10", "100", "1000", "10,000"]
    for scale in (along([0.613, 0.978]), along([5.0]), along([]), along([0.0, 0.0]), along([-3.0, 5.0], log=True)):
        assert all(0 <= place <= 1 for place, _ in scale.ticks()) and 2 <= len(scale.ticks()) <= 8


def test_choices_have_places_of_their_own() -> None:
    scale = choices(["uniform", "weighted", [1, 2], "uniform"])
    assert [text for _, text in scale.ticks()] == ["uniform", "weighted", "[1, 2]"]
    assert scale.place([1, 2]) == pytest.approx(5 / 6)
    assert choices(["a" * 30]).ticks()[0][1] == "a" * 13 + "…"


def test_labels_are_short() -> None:
    assert [tick_label(value) for value in (0.123456, 12, 1234567, 0.5)] == ["0.1235", "12", "1,234,567", "0.5"]
