"""Scales of chart axes: linear, logarithmic or categorical."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from raycluster.config.errors import format_value

_MOST_TICKS = 6
_LONGEST_LABEL = 14


@dataclass(frozen=True)
class Scale:
    """Maps values in [low, high] to positions in [0, 1].

    choices: the values of a categorical axis, in order. marks: values with a tick.
    """

    low: float = 0.0
    high: float = 1.0
    log: bool = False
    choices: tuple[str, ...] = ()
    marks: tuple[float, ...] = ()

    def position(self, value: Any) -> float:
        """The position of a value, from 0 (left or bottom) to 1."""
        if self.choices:
            return (self.choices.index(format_value(value)) + 0.5) / len(self.choices)
        low, high, at = (math.log(x) if self.log else x for x in (self.low, self.high, float(value)))
        return (at - low) / (high - low) if high > low else 0.5

    def ticks(self) -> list[tuple[float, str]]:
        """(position, label) of each tick."""
        if self.choices:
            return [((index + 0.5) / len(self.choices), _short(text)) for index, text in enumerate(self.choices)]
        return [(self.position(mark), tick_label(mark)) for mark in self.marks]


def categorical_scale(values: Sequence[Any]) -> Scale:
    """A categorical scale of the distinct values, in order."""
    return Scale(choices=tuple(dict.fromkeys(format_value(value) for value in values)))


def numeric_scale(
    values: Sequence[float], *, log: bool = False, margin: float = 0.06, label_values: bool = False
) -> Scale:
    """A numeric scale of the range of the values.

    margin: share of the range added on both sides. label_values: put ticks at the values if they are few.
    """
    distinct = sorted(set(values)) or [0.0, 1.0]
    log = log and distinct[0] > 0
    low, high = (math.log(end) if log else float(end) for end in (distinct[0], distinct[-1]))
    padding = margin * (high - low) or (0.5 if log else max(abs(high) * 0.05, 1e-3))
    low, high = low - padding, high + padding
    if log:
        low, high = math.exp(low), math.exp(high)
    few = label_values and len(distinct) <= _MOST_TICKS
    return Scale(low, high, log, marks=tuple(distinct) if few else _round_numbers(low, high, log))


def _round_numbers(low: float, high: float, log: bool) -> tuple[float, ...]:
    if log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        fine = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
        inside = [value for value in fine if low <= value <= high]
        return tuple(value for value in inside if len(inside) <= _MOST_TICKS or math.log10(value).is_integer())
    rough = (high - low) / (_MOST_TICKS - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    first = math.ceil(low / step)
    return tuple(index * step for index in range(first, math.floor(high / step) + 1))


def tick_label(value: float) -> str:
    """A number in short form."""
    return f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST_LABEL else text[: _LONGEST_LABEL - 1] + "…"
