"""The search space: the values of each searched setting, as a grid or as random draws."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from raycluster.config.errors import ConfigError, format_value, report
from raycluster.config.registry import did_you_mean
from raycluster.seeding import generator
from raycluster.types import UserError

RANGES = ("int", "log_int", "float", "log_float")
SOURCE = "search"  # in error messages
EXAMPLE = "a list such as [10, 100] or a range such as {log_int: [10, 1000]}"
MAX_VALUES = 1000  # of one key
MAX_COMBINATIONS = 10_000
_LOG_FACTOR = 8  # lists whose largest number exceeds the smallest by this factor get a logarithmic axis
_DRAWS_PER_TRIAL = 100

Values = dict[str, Any]
"""One combination: {dotted key: value}."""


@dataclass(frozen=True)
class Axis:
    """The values of one key: one of `values`, or any value in [low, high] if these are empty."""

    key: str
    values: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    integer: bool = False
    log: bool = False

    @property
    def numeric(self) -> bool:
        """Whether all values are numbers."""
        return all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in self.values)

    def at(self, share: float) -> Any:
        """The value at a share (0 to 1) of the range."""
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
        """All values of a list, or both ends of a range: to be validated before the sweep starts."""
        return list(self.values) or [self.at(0.0), self.at(1.0)]


def one_by_one(axes: Sequence[Axis]) -> list[Values]:
    """One combination per example of each key, with the first example of the other keys."""
    first = {axis.key: axis.examples()[0] for axis in axes}
    return [{**first, axis.key: value} for axis in axes for value in axis.examples()]


def read_space(search: Mapping[str, Any], *, grid: bool) -> list[Axis]:
    """The axes of a `search` section. grid: ranges need steps. Raises UserError with all errors."""
    axes, config_errors = [], []
    for key, values in search.items():
        found = _axis(f"search.{key}", key, values)
        if isinstance(found, Axis) and grid and not found.values:
            example = f"{{{next(iter(values))}: {format_value(next(iter(values.values())))}, steps: 5}}"
            found = ConfigError(f"search.{key}", format_value(values), "a finite number of values", f"write {example}")
        if isinstance(found, Axis):
            axes.append(found)
        else:
            config_errors.append(found)
    if not search:
        config_errors.append(ConfigError("search", "nothing", f"at least one key with {EXAMPLE}"))
    if config_errors:
        raise UserError(report(SOURCE, config_errors))
    return axes


def _axis(path: str, key: str, values: Any) -> Axis | ConfigError:
    if isinstance(values, list):
        return _list_axis(path, key, values)
    if not isinstance(values, dict):
        return ConfigError(path, format_value(values), EXAMPLE)
    kinds = [kind for kind in RANGES if kind in values]
    unknown = [str(name) for name in values if name not in (*RANGES, "steps")]
    if len(kinds) != 1 or unknown:
        hint = did_you_mean(unknown[0], [*RANGES, "steps"]).removeprefix("; ") if unknown else ""
        return ConfigError(path, format_value(values), f"one of {', '.join(RANGES)}, and optionally steps", hint)
    return _range_axis(path, key, kinds[0], values)


def _list_axis(path: str, key: str, values: list[Any]) -> Axis | ConfigError:
    if len(values) > MAX_VALUES:
        return ConfigError(path, f"{len(values)} values", f"at most {MAX_VALUES}", "remove some")
    if len(values) < 2:
        seen = format_value(values)
        return ConfigError(
            path, seen, "at least two values to choose from", f"set {key} itself" if values else "add some"
        )
    repeated = [value for index, value in enumerate(values) if value in values[:index]]
    if repeated:
        return ConfigError(path, format_value(values), "each value once", f"remove one {format_value(repeated[0])}")
    axis = Axis(key, tuple(values))
    log = axis.numeric and min(values) > 0 and max(values) >= _LOG_FACTOR * min(values)
    return Axis(key, tuple(values), log=log)


def _range_axis(path: str, key: str, kind: str, values: dict[str, Any]) -> Axis | ConfigError:
    log, integer = kind.startswith("log_"), kind.endswith("int")
    bounds, steps = values[kind], values.get("steps")
    numbers = (int,) if integer else (int, float)
    good = isinstance(bounds, list) and len(bounds) == 2
    if not good or not all(isinstance(end, numbers) and not isinstance(end, bool) for end in bounds):
        return ConfigError(path, format_value(bounds), f"[low, high], two {'integers' if integer else 'numbers'}")
    low, high = bounds
    if not all(math.isfinite(end) for end in bounds):
        return ConfigError(path, format_value(bounds), "finite bounds")
    if low >= high:
        return ConfigError(path, format_value(bounds), "low < high", f"write [{high}, {low}]" if low > high else "")
    if log and low <= 0:
        return ConfigError(
            path, format_value(bounds), "low > 0 on a logarithmic scale", f"or use {kind.removeprefix('log_')}"
        )
    axis = Axis(key, (), low, high, integer, log)
    if steps is None:
        return axis
    if not isinstance(steps, int) or isinstance(steps, bool) or not 2 <= steps <= MAX_VALUES:
        return ConfigError(f"{path}.steps", format_value(steps), f"an integer from 2 to {MAX_VALUES}")
    return Axis(key, _stepped(axis, steps), log=log)


def _stepped(axis: Axis, steps: int) -> tuple[Any, ...]:
    shares = [index / (steps - 1) for index in range(steps)]
    if axis.integer and not axis.log:
        return tuple(dict.fromkeys(round(axis.low + share * (axis.high - axis.low)) for share in shares))
    return tuple(dict.fromkeys(axis.at(share) for share in shares))


def grid(axes: Sequence[Axis]) -> list[Values]:
    """All combinations; the last key varies fastest. Raises UserError if there are more than ``MAX_COMBINATIONS``."""
    count = math.prod(len(axis.values) for axis in axes)
    if count > MAX_COMBINATIONS:
        raise UserError(
            f"search: the grid has {count} combinations; wanted at most {MAX_COMBINATIONS}: use fewer values, or set "
            "sweep.strategy to random or bayesian"
        )
    return [dict(zip([axis.key for axis in axes], combination, strict=True)) for combination in _combinations(axes)]


def _combinations(axes: Sequence[Axis]) -> Iterator[tuple[Any, ...]]:
    return product(*(axis.values for axis in axes))


def draw(axes: Sequence[Axis], trials: int, seed: int) -> list[Values]:
    """`trials` distinct combinations, each key uniform (or log-uniform); deterministic in the seed.

    Raises UserError if the space has too few combinations.
    """
    found: dict[str, Values] = {}
    for index in range(trials * _DRAWS_PER_TRIAL):
        shares = generator(seed, "search", index).random(len(axes))
        values = {axis.key: axis.at(float(share)) for axis, share in zip(axes, shares, strict=True)}
        found.setdefault(repr(values), values)
        if len(found) == trials:
            return list(found.values())
    raise UserError(
        f"sweep.trials = {trials}, but the search space has about {len(found)} combinations; "
        "reduce sweep.trials, widen a range, or set sweep.strategy=grid to try all"
    )
