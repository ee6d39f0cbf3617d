"""Bayesian search: proposals from the results so far."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from raycluster.seeding import seed_for
from raycluster.sweep.space import Axis, Values

_ATTEMPTS = 20  # per proposal that is not a repetition


def propose(
    axes: Sequence[Axis],
    tried: Sequence[tuple[Values, float | None]],
    count: int,
    *,
    seed: int,
    direction: Literal["max", "min"] = "max",
) -> list[Values]:
    """`count` combinations to try next, by the tree-structured Parzen estimator (Bergstra et al., 2011) of Optuna.

    tried: combinations and their objectives (None: failed), in order. The proposals are deterministic in these and the
    seed, so an interrupted search resumes with the same ones. They may repeat combinations of a small space.
    """
    distributions = {axis.key: _distribution(axis) for axis in axes}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(
            seed=seed_for(seed, "propose", len(tried)) % 2**32, n_startup_trials=2 * len(axes) + 2, constant_liar=True
        )
    study = optuna.create_study(sampler=sampler, direction="maximize" if direction == "max" else "minimize")
    for values, objective in tried:
        study.add_trial(_to_trial(axes, distributions, values, objective))
    known, found = [values for values, _ in tried], []
    for attempt in range(count * _ATTEMPTS):
        asked = study.ask(distributions)
        values = {axis.key: _value(axis, asked.params[axis.key]) for axis in axes}
        if values not in known or attempt >= count * (_ATTEMPTS - 1):
            known.append(values)
            found.append(values)
        if len(found) == count:
            break
    return found


def _distribution(axis: Axis) -> BaseDistribution:
    if axis.values:  # by index: Optuna accepts no lists or sections as choices
        return CategoricalDistribution(range(len(axis.values)))
    if axis.integer:
        return IntDistribution(int(axis.low), int(axis.high), log=axis.log)
    return FloatDistribution(axis.low, axis.high, log=axis.log)


def _value(axis: Axis, parameter: Any) -> Any:
    if axis.values:
        return axis.values[parameter]
    return parameter if axis.integer else min(max(float(f"{parameter:.6g}"), axis.low), axis.high)


def _to_trial(
    axes: Sequence[Axis], distributions: dict[str, BaseDistribution], values: Values, objective: float | None
) -> optuna.trial.FrozenTrial:
    parameters = {axis.key: axis.values.index(values[axis.key]) if axis.values else values[axis.key] for axis in axes}
    state = optuna.trial.TrialState.FAIL if objective is None else optuna.trial.TrialState.COMPLETE
    return optuna.trial.create_trial(state=state, params=parameters, distributions=distributions, value=objective)
