"""The search space: which values a setting may take, every combination of them, or some."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from raycluster.config.errors import ConfigError, format_value
from raycluster.config.registry import did_you_mean
from raycluster.seeding import generator
from raycluster.types import UserError

RANGES = ("int", "log_int", "float", "log_float")
EXAMPLE = "a list such as [10, 100] or a range such as {log_int: [10, 1000]}"
_LOG_FACTOR = 8  # from which factor on the numbers of a list are shown on a logarithmic axis
_DRAWS_PER_TRIAL = 100

Values = dict[str, Any]
"""One combination: {dotted key: value}."""


@dataclass(frozen=True)
class Axis:
    """What one key may be: one of `values`, or, where there are none, anything from low to high."""

    key: str
    values: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    integer: bool = False
    log: bool = False

    @property
    def numeric(self) -> bool:
        """Whether its values lie on a line."""
        return all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in self.values)

    def at(self, share: float) -> Any:
        """The value at this share (0 to 1) of the way."""
        if self.values:
            return self.values[min(int(share * len(self.values)), len(self.values) - 1)]
        if self.integer and not self.log:
            return min(int(self.low + share * (self.high - self.low + 1)), int(self.high))
        if self.log:
            value = math.exp(math.log(self.low) + share * math.log(self.high / self.low))
        else:
            value = self.low + share * (self.high - self.low)
        return round(value) if self.integer else float(f"{value:.6g}")

    def examples(self) -> list[Any]:
        """Every value of a list, both ends of a range: what must be valid before anything starts."""
        return list(self.values) or [self.at(0.0), self.at(1.0)]


def one_by_one(axes: Sequence[Axis]) -> list[Values]:
    """Every example of every key, the other keys being at their first."""
    first = {axis.key: axis.examples()[0] for axis in axes}
    return [{**first, axis.key: value} for axis in axes for value in axis.examples()]


def read_space(search: Mapping[str, Any], *, grid: bool) -> list[Axis]:
    """The axes of a `search` section. grid: ranges need steps. Raises UserError with all mistakes at once."""
    axes, config_errors = [], []
    for key, values in search.items():
        found = _axis(f"search.{key}", key, values)
        if isinstance(found, Axis) and grid and not found.values:
            example = f"{{{next(iter(values))}: {format_value(next(iter(values.values())))}, steps: 5}}"
            found = ConfigError(f"search.{key}", format_value(values), "values that a grid can try", f"write {example}")
        if isinstance(found, Axis):
            axes.append(found)
        else:
            config_errors.append(found)
    if not search:
        config_errors.append(ConfigError("search", "nothing", f"at least one key with {EXAMPLE}"))
    if config_errors:
        raise UserError(told(config_errors))
    return axes


def told(config_errors: Sequence[ConfigError | str]) -> str:
    """All mistakes of a search space as one message."""
    lines = "\n".join(f"  {config_error}" for config_error in config_errors)
    return f"the search space has {len(config_errors)} mistake{'s' * (len(config_errors) > 1)}\n{lines}"


def _axis(path: str, key: str, values: Any) -> Axis | ConfigError:
    if isinstance(values, list):
        return _list_axis(path, key, values)
    if not isinstance(values, dict):
        return ConfigError(path, format_value(values), EXAMPLE)
    kinds = [kind for kind in RANGES if kind in values]
    unknown = [str(name) for name in values if name not in (*RANGES, "steps")]
    if len(kinds) != 1 or unknown:
        hint = did_you_mean(unknown[0], [*RANGES, "steps"]).removeprefix("; ") if unknown else ""
        return ConfigError(path, format_value(values), f"one of {', '.join(RANGES)}, and steps where wanted", hint)
    return _range_axis(path, key, kinds[0], values)


def _list_axis(path: str, key: str, values: list[Any]) -> Axis | ConfigError:
    if len(values) < 2:
        seen = format_value(values)
        return ConfigError(
            path, seen, "at least two values to choose from", f"set {key} itself" if values else "add some"
        )
    repeated = [value for index, value in enumerate(values) if value in values[:index]]
    if repeated:
        return ConfigError(path, format_value(values), "each value once", f"{format_value(repeated[0])} is there twice")
    axis = Axis(key, tuple(values))
    log = axis.numeric and min(values) > 0 and max(values) >= _LOG_FACTOR * min(values)
    return Axis(key, tuple(values), log=log)


def _range_axis(path: str, key: str, kind: str, values: dict[str, Any]) -> Axis | ConfigError:
    log, integer = kind.startswith("log_"), kind.endswith("int")
    bounds, steps = values[kind], values.get("steps")
    numbers = (int,) if integer else (int, float)
    good = isinstance(bounds, list) and len(bounds) == 2
    if not good or not all(isinstance(end, numbers) and not isinstance(end, bool) for end in bounds):
        return ConfigError(path, format_value(bounds), f"[low, high], two {'whole ' * integer}numbers")
    low, high = bounds
    if low >= high:
        return ConfigError(path, format_value(bounds), "low < high", f"write [{high}, {low}]" if low > high else "")
    if log and low <= 0:
        return ConfigError(
            path, format_value(bounds), "low > 0 on a logarithmic scale", f"or use {kind.removeprefix('log_')}"
        )
    axis = Axis(key, (), low, high, integer, log)
    if steps is None:
        return axis
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 2:
        return ConfigError(f"{path}.steps", format_value(steps), "a whole number, 2 or more")
    return Axis(key, _stepped(axis, steps), log=log)


def _stepped(axis: Axis, steps: int) -> tuple[Any, ...]:
    shares = [index / (steps - 1) for index in range(steps)]
    if axis.integer and not axis.log:
        return tuple(dict.fromkeys(round(axis.low + share * (axis.high - axis.low)) for share in shares))
    return tuple(dict.fromkeys(axis.at(share) for share in shares))


def grid(axes: Sequence[Axis]) -> list[Values]:
    """Every combination; the last key varies fastest."""
    return [dict(zip([axis.key for axis in axes], combination, strict=True)) for combination in _combinations(axes)]


def _combinations(axes: Sequence[Axis]) -> Iterator[tuple[Any, ...]]:
    return product(*(axis.values for axis in axes))


def draw(axes: Sequence[Axis], trials: int, seed: int) -> list[Values]:
    """So many different combinations, each key drawn evenly (or evenly in its logarithm); they follow from the seed.

    Raises UserError if there are not so many.
    """
    found: list[Values] = []
    for index in range(trials * _DRAWS_PER_TRIAL):
        shares = generator(seed, "search", index).random(len(axes))
        values = {axis.key: axis.at(float(share)) for axis, share in zip(axes, shares, strict=True)}
        if values not in found:
            found.append(values)
        if len(found) == trials:
            return found
    raise UserError(
        f"sweep.trials = {trials}, but the search space has hardly more than {len(found)} combinations; "
        "ask for fewer trials, widen a range, or set sweep.strategy=grid to try all"
    )
