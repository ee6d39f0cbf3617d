"""The configuration of a sweep: that of a run, and the sections `search` and `sweep`."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import Field

from raycluster.config import settings
from raycluster.run.state import Config
from raycluster.types import UserError


@settings
class SweepSettings:
    """How the values in `search` are tried, and how trials are judged.

    strategy: `grid` tries all combinations, `random` draws some, `bayesian` learns from the trials before which to try
    (Optuna's TPE). trials: combinations to try, for random and bayesian. batch: combinations that bayesian proposes at
    a time; part of the result (null for 4). seeds: runs of each combination, whose median counts: `seed`, `seed` + 1...
    objective: what makes a trial good, any number of metrics.jsonl; null for the accuracy of the first of
    evaluation.probes where there are labels, else effective_rank. direction: whether more of it is better.
    early_stopping: `asha` ends trials that lag behind, and runs a grid in a seeded random order. grace_epochs: what
    every trial is given before that, no less than a round of any trial (null for epochs / reduction^2). reduction: one
    in so many goes on at each rung (null for 3).
    """

    strategy: Literal["grid", "random", "bayesian"] = "grid"
    trials: Annotated[int, Field(ge=1)] | None = None
    batch: Annotated[int, Field(ge=1)] | None = None
    seeds: Annotated[int, Field(ge=1)] = 1
    objective: str | None = None
    direction: Literal["max", "min"] = "max"
    early_stopping: Literal["none", "asha"] = "none"
    grace_epochs: Annotated[float, Field(gt=0)] | None = None
    reduction: Annotated[float, Field(gt=1)] | None = None

    def __post_init__(self) -> None:
        faults = []
        if self.strategy == "grid" and self.trials is not None:
            faults.append("trials has no effect with strategy grid, which tries all: remove it")
        if self.strategy != "grid" and self.trials is None:
            faults.append(f"strategy {self.strategy} needs trials, how many to try")
        if self.strategy != "bayesian" and self.batch is not None:
            faults.append(f"batch has no effect with strategy {self.strategy}: remove it")
        if self.early_stopping == "none" and (self.grace_epochs, self.reduction) != (None, None):
            faults.append("grace_epochs and reduction have no effect without early_stopping: asha")
        if faults:
            raise UserError("; ".join(faults))

    def rungs(self, epochs: int) -> list[float]:
        """The epochs before the end at which trials are compared: grace, grace x reduction... (none: never)."""
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
    """A run with the settings that all trials share, and what is searched.

    search: {dotted.key: values}, where values are a list, or a range {int | log_int | float | log_float: [low, high]}
    with `steps` for a grid of it. sweep: how.
    """

    search: dict[str, Any]
    sweep: SweepSettings = SweepSettings()

    def run_fields(self) -> dict[str, Any]:
        """The sections that belong to a run."""
        return {field.name: getattr(self, field.name) for field in fields(Config)}
