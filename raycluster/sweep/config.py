"""The configuration of a sweep: the configuration of a run with the sections `search` and `sweep`."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import Field

from raycluster.config import settings
from raycluster.run.config import Config
from raycluster.sweep.space import MAX_COMBINATIONS, MAX_VALUES
from raycluster.types import UserError


@settings
class SweepSettings:
    """How combinations of the values in `search` are chosen and compared.

    strategy: `grid` tries all combinations, `random` draws some, `bayesian` proposes some from the results so far
    (Optuna's TPE). trials: number of combinations, for random and bayesian. batch: combinations that bayesian proposes
    at a time; affects the result (null for 4). seeds: runs of each combination with `seed`, `seed` + 1..., compared by
    their median. objective: any number of metrics.jsonl; null for the accuracy of the first of evaluation.probes if
    there are labels, else effective_rank. direction: whether to maximise or minimise it, null for
    what its evaluation declares. early_stopping: `asha` stops
    poor trials early, and runs a grid in a seeded random order. grace_epochs: epochs that every trial may run, at least
    one round of any trial (null for epochs / reduction^2). reduction: one in `reduction` trials continues at each rung
    (null for 3).
    """

    strategy: Literal["grid", "random", "bayesian"] = "grid"
    trials: Annotated[int, Field(ge=1, le=MAX_COMBINATIONS)] | None = None
    batch: Annotated[int, Field(ge=1, le=MAX_VALUES)] | None = None
    seeds: Annotated[int, Field(ge=1, le=MAX_VALUES)] = 1
    objective: str | None = None
    direction: Literal["max", "min"] | None = None
    early_stopping: Literal["none", "asha"] = "none"
    grace_epochs: Annotated[float, Field(gt=0)] | None = None
    reduction: Annotated[float, Field(gt=1)] | None = None

    def __post_init__(self) -> None:
        problems = []
        if self.strategy == "grid" and self.trials is not None:
            problems.append("trials has no effect with strategy grid, which tries all combinations: remove it")
        if self.strategy != "grid" and self.trials is None:
            problems.append(f"strategy {self.strategy} needs trials, the number of combinations to try")
        if self.strategy != "bayesian" and self.batch is not None:
            problems.append(f"batch has no effect with strategy {self.strategy}: remove it")
        if self.early_stopping == "none" and (self.grace_epochs, self.reduction) != (None, None):
            problems.append("grace_epochs and reduction have no effect without early_stopping: asha")
        if problems:
            raise UserError("; ".join(problems))

    def rungs(self, epochs: int) -> list[float]:
        """The epochs, before the last, at which trials are compared: grace, grace * reduction...; may be empty."""
        if self.early_stopping == "none":
            return []
        reduction = self.reduction or 3.0
        rung, found = self.grace_epochs or max(1.0, epochs / reduction**2), []
        while rung < epochs:
            found.append(rung)
            rung *= reduction
        return found


@settings
class SweepConfig(Config):
    """The settings that all trials share, and those that are searched.

    search: {dotted.key: values}; values are a list or a range {int | log_int | float | log_float: [low, high]}, with
    `steps` for a grid. sweep: the search strategy.
    """

    search: dict[str, Any]
    sweep: SweepSettings = SweepSettings()

    def run_fields(self) -> dict[str, Any]:
        """The sections that belong to a run."""
        return {field.name: getattr(self, field.name) for field in fields(Config)}
