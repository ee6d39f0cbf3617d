"""Bayesian search improves on random search, deterministically."""

from __future__ import annotations

import math

import yaml

from raycluster.sweep.bayesian import propose
from raycluster.sweep.space import Values, draw, read_space

AXES = read_space(
    yaml.safe_load("{k: {log_int: [2, 2000]}, lr: {log_float: [0.001, 1.0]}, start: [[1], [2, 3]]}"), grid=False
)


def objective(values: Values) -> float:
    return -(math.log(values["k"] / 100) ** 2) - math.log(values["lr"] / 0.1) ** 2 - (values["start"] == [1])


def search(direction: str) -> list[tuple[Values, float | None]]:
    sign = 1 if direction == "max" else -1
    tried: list[tuple[Values, float | None]] = []
    while len(tried) < 40:
        found = propose(AXES, tried, 4, seed=1, direction=direction)  # type: ignore[arg-type]
        tried += [(values, None if len(tried) == 8 else sign * objective(values)) for values in found]
    return tried


def test_proposals_surpass_random_search_without_repetition() -> None:
    for direction in ("max", "min"):
        tried = [values for values, _ in search(direction)]
        late = sum(objective(values) for values in tried[20:]) / 20
        at_random = [objective(values) for values in draw(AXES, 200, seed=0)]
        assert late > sum(at_random) / 200 + 2, direction
        assert all(values not in tried[:index] for index, values in enumerate(tried))
        assert all(2 <= values["k"] <= 2000 and 0.001 <= values["lr"] <= 1 for values in tried)


def test_proposals_are_deterministic() -> None:
    tried = search("max")[:16]
    assert propose(AXES, tried, 4, seed=1) == propose(AXES, tried, 4, seed=1) == [v for v, _ in search("max")[16:20]]
    assert propose(AXES, tried, 4, seed=2) != propose(AXES, tried, 4, seed=1)
