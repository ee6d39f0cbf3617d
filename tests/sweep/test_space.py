"""Search spaces: values, combinations and errors."""

from __future__ import annotations

import math
import re

import pytest
import yaml

from raycluster.sweep.space import Axis, draw, grid, read_space
from raycluster.types import UserError


def space(text: str, *, grid: bool = False) -> list[Axis]:
    return read_space(yaml.safe_load(text), grid=grid)


def test_a_grid_is_every_combination_the_last_key_varying_fastest() -> None:
    axes = space("{a.k: {log_int: [10, 1000], steps: 3}, b: [x, y]}", grid=True)
    assert grid(axes) == [{"a.k": k, "b": b} for k in (10, 100, 1000) for b in ("x", "y")]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("{log_int: [1, 8], steps: 4}", (1, 2, 4, 8)),
        ("{log_int: [1, 4], steps: 9}", (1, 2, 3, 4)),  # equal integers count once
        ("{int: [2, 10], steps: 3}", (2, 6, 10)),
        ("{float: [0.0, 1.0], steps: 3}", (0.0, 0.5, 1.0)),
        ("{log_float: [0.001, 0.1], steps: 3}", (0.001, 0.01, 0.1)),
    ],
)
def test_steps_of_a_range(text: str, values: tuple[float, ...]) -> None:
    (axis,) = space(f"{{key: {text}}}", grid=True)
    assert axis.values == pytest.approx(values)
    assert all(type(value) is type(wanted) for value, wanted in zip(axis.values, values, strict=True))


def test_lists_that_span_much_are_shown_on_a_logarithmic_axis() -> None:
    axes = space("{a: [10, 100], b: [1, 2, 3], c: [0, 100], d: [yes, no], e: [[1], [2]]}")
    assert [axis.log for axis in axes] == [True, False, False, False, False]
    assert [axis.numeric for axis in axes] == [True, True, True, False, False]


def test_draws_follow_from_the_seed_stay_inside_and_differ() -> None:
    axes = space("{k: {log_int: [10, 1000]}, lr: {float: [0.1, 0.2]}, n: {int: [1, 3]}, s: [u, v]}")
    drawn = draw(axes, 200, seed=3)
    assert drawn == draw(axes, 200, seed=3) != draw(axes, 200, seed=4)
    assert draw(axes, 5, seed=3) == drawn[:5]
    assert len({tuple(values.values()) for values in drawn}) == 200
    assert all(10 <= values["k"] <= 1000 and 0.1 <= values["lr"] <= 0.2 for values in drawn)
    assert {values["n"] for values in drawn} == {1, 2, 3} and {values["s"] for values in drawn} == {"u", "v"}
    below = sum(values["k"] < math.sqrt(10 * 1000) for values in drawn)
    assert 75 <= below <= 125, "half of a logarithmic range lies below its geometric mean"


def test_more_trials_than_combinations_are_refused() -> None:
    with pytest.raises(UserError, match=r"about 4 combinations"):
        draw(space("{a: [1, 2], b: [1, 2]}"), 5, seed=0)


def test_all_errors_are_reported_together() -> None:
    with pytest.raises(UserError) as caught:
        space(
            "{a: [], b: [7], c: [1, 1], d: {log_int: [100, 10]}, e: {log_float: [0, 1]}, f: {logint: [1, 2]}, g: 5,"
            " h: {int: [1, 2.5]}, i: {int: [1, 9], steps: 1}, j: {int: [1, 9]}}",
            grid=True,
        )
    text = str(caught.value)
    assert "10 errors" in text
    for expected in (
        "search.a: seen []; wanted at least two values",
        "search.b: seen [7]; wanted at least two values to choose from; set b itself",
        "search.c: seen [1, 1]; wanted each value once",
        "search.d: seen [100, 10]; wanted low < high; write [10, 100]",
        "search.e: seen [0, 1]; wanted low > 0 on a logarithmic scale; or use float",
        "did you mean log_int?",
        "search.g: seen 5; wanted a list",
        "search.h: seen [1, 2.5]; wanted [low, high], two integers",
        "search.i.steps: seen 1",
        "search.j: seen {int: [1, 9]}; wanted a finite number of values; write {int: [1, 9], steps: 5}",
    ):
        assert expected in text, text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "{a: {float: [0.0, 1.0], steps: 100000000}}",
            "search.a.steps: seen 100000000; wanted an integer from 2 to 1000",
        ),
        ("{a: {log_int: [1, 1000000000000], steps: 1001}}", "wanted an integer from 2 to 1000"),
        ("{a: {float: [0.0, .inf]}}", "search.a: seen [0.0, .inf]; wanted finite bounds"),
        (f"{{a: {list(range(1001))}}}", "search.a: seen 1001 values; wanted at most 1000"),
    ],
)
def test_large_spaces_are_refused_quickly(text: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        space(text)


def test_large_grids_are_refused_quickly() -> None:
    axes = space(f"{{{', '.join(f'a{number}: {{float: [0, 1], steps: 1000}}' for number in range(9))}}}", grid=True)
    with pytest.raises(UserError, match=rf"the grid has {10**27} combinations; wanted at most 10000"):
        grid(axes)


def test_nothing_to_search_is_refused() -> None:
    with pytest.raises(UserError, match="wanted at least one key"):
        space("{}")
