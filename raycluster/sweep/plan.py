"""The state of a sweep: the next trial, early stops, and the table of results."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from raycluster.evaluation.base import declared_metrics
from raycluster.sweep.bayesian import propose
from raycluster.sweep.config import SweepConfig
from raycluster.sweep.space import Axis, Values
from raycluster.sweep.stopping import decide
from raycluster.sweep.trials import History, Trial, make_trial, number, read_history
from raycluster.types import UserError

BATCH = 4
PHASES = ("extracting", "assigning", "training", "evaluating")


@dataclass(frozen=True)
class Row:
    """A trial in the table. status: waiting, running, finished, stopped (early) or failed.

    records: of its rounds, up to an early stop. objective: of the last round that has one, None if it is not a finite
    number. worker_seconds: seconds times workers, summed over all rounds. skipped_lines: of metrics.jsonl that hold no
    record.
    """

    trial: Trial
    status: str
    records: list[dict[str, Any]]
    objective: float | None
    worker_seconds: float
    reason: str = ""
    skipped_lines: int = 0


@dataclass(frozen=True)
class Combination:
    """The trials of one combination. objective: the median over the seeds, None unless all trials finished."""

    number: int
    values: Values
    rows: list[Row]
    objective: float | None

    @property
    def so_far(self) -> float | None:
        """Like `objective`, but over all trials that did not fail, at their last round."""
        found = [row.objective for row in self.rows if row.status != "failed" and row.objective is not None]
        return median(found) if found else None

    def figure(self, name: str) -> float | None:
        """The median over the seeds of a number in the last records, None if one lacks it."""
        last = [number(row.records[-1], name) for row in self.rows if row.records]
        found = [value for value in last if value is not None]
        return median(found) if len(found) == len(self.rows) else None


class Sweep:
    """Schedules trials and collects their results. The final table is independent of the timing of trials.

    combinations: to try, none for bayesian. objective: the name of a number in metrics.jsonl.
    """

    def __init__(
        self, config: SweepConfig, axes: Sequence[Axis], combinations: Sequence[Values], *, objective: str
    ) -> None:
        self.config, self.axes, self.objective = config, list(axes), objective
        self.trials: list[Trial] = []
        self.histories: dict[str, History] = {}
        self.done = False
        self._combinations = list(combinations)
        self._started: set[str] = set()
        self._batches_of_trials = self._plan()
        declared = declared_metrics().get(objective)
        lower = declared is not None and not declared.higher_is_better
        self.direction: Literal["max", "min"] = config.sweep.direction or ("min" if lower else "max")
        self._sign = 1.0 if self.direction == "max" else -1.0

    def next(self) -> Trial | None:
        """A trial to start or resume; None while others must end first, and when the sweep is `done`."""
        while not self.done:
            stopped = self._stopped()
            for trial, place in zip(self.trials, stopped, strict=True):
                if place is None and not self.histories[trial.name].outcome and trial.name not in self._started:
                    self._started.add(trial.name)
                    return trial
            if not all(self._is_over(trial, place) for trial, place in zip(self.trials, stopped, strict=True)):
                return None
            batch = next(self._batches_of_trials, None)
            self.done = batch is None
            self.trials += batch or []
            self.histories |= {trial.name: read_history(trial) for trial in batch or []}
        return None

    def tell(self, name: str, record: dict[str, Any]) -> bool:
        """Record a round of a trial; returns whether it must stop. Raises UserError if the objective does not exist."""
        self.histories[name].records[record["round"]] = record
        numbers = [key for key, value in record.items() if isinstance(value, (int, float))]
        # Metrics that compare a round with the previous one are missing in the first.
        if self.objective not in numbers and record["round"] > 0:
            raise UserError(
                f"sweep.objective: seen {self.objective}; wanted a number of metrics.jsonl, here {', '.join(numbers)}"
            )
        return self._stopped()[self._place(name)] is not None

    def close(self, name: str, outcome: str = "finished", reason: str = "") -> None:
        """Record the end of a trial. outcome: `finished` or `failed`; ignored if it was stopped early."""
        if self._stopped()[self._place(name)] is None:
            self.histories[name].outcome, self.histories[name].reason = outcome, reason
        self._started.discard(name)

    def rows(self) -> list[Row]:
        """The table, in the order of the trials."""
        return [self._row(trial, place) for trial, place in zip(self.trials, self._stopped(), strict=True)]

    def combinations(self) -> list[Combination]:
        """The table by combination, in order."""
        rows: dict[int, list[Row]] = {}
        for row in self.rows():
            rows.setdefault(row.trial.number, []).append(row)
        return [
            Combination(index, trials[0].trial.values, trials, self._median(trials))
            for index, trials in sorted(rows.items())
        ]

    def best(self) -> Combination | None:
        """The best combination with an objective; the first of equals."""
        known = [found for found in self.combinations() if found.objective is not None]
        return max(known, key=lambda found: self._sign * (found.objective or 0.0), default=None)

    def _plan(self) -> Iterator[list[Trial]]:
        """Batches of trials that may run concurrently; each depends on the results of the previous ones.

        With early stopping, only combinations that finish with the first seed are repeated with the others.
        """
        seeds = range(self.config.seed, self.config.seed + self.config.sweep.seeds)
        first = seeds[:1] if self._rungs else seeds
        count = 0
        for batch in self._batches():
            yield [
                make_trial(self.config, count + index, values, seed)
                for index, values in enumerate(batch)
                for seed in first
            ]
            count += len(batch)
        survivors = [found for found in self.combinations() if found.objective is not None]
        if first != seeds:
            yield [make_trial(self.config, one.number, one.values, seed) for one in survivors for seed in seeds[1:]]

    def _batches(self) -> Iterator[list[Values]]:
        settings = self.config.sweep
        if settings.strategy != "bayesian":
            yield self._combinations
            return
        while (left := (settings.trials or 0) - len(self.combinations())) > 0:
            tried = [(found.values, found.so_far) for found in self.combinations()]
            count = min(left, settings.batch or BATCH)
            yield propose(self.axes, tried, count, seed=self.config.seed, direction=self.direction)

    @property
    def _rungs(self) -> list[float]:
        return self.config.sweep.rungs(self.config.training.epochs)

    def _stopped(self) -> list[int | None]:
        """Per trial the index into its curve at which it is stopped; only trials with the first seed ever are."""
        mine = [index for index, trial in enumerate(self.trials) if trial.seed == self.config.seed]
        curves = [[(epoch, self._sign * value) for _, epoch, value in self._curve(self.trials[i])] for i in mine]
        over = [bool(self.histories[self.trials[index].name].outcome) for index in mine]
        found: list[int | None] = [None] * len(self.trials)
        places = decide(curves, over, rungs=self._rungs, reduction=self.config.sweep.reduction or 3.0)
        for index, place in zip(mine, places, strict=True):
            found[index] = place
        return found

    def _curve(self, trial: Trial) -> list[tuple[int, float, float]]:
        """(round, epoch, objective) of the rounds whose objective is a number."""
        records = self.histories[trial.name].records
        points = ((index, records[index]["epoch"], number(records[index], self.objective)) for index in sorted(records))
        return [(index, epoch, value) for index, epoch, value in points if value is not None]

    def _place(self, name: str) -> int:
        return next(index for index, trial in enumerate(self.trials) if trial.name == name)

    def _is_over(self, trial: Trial, place: int | None) -> bool:
        settled = place is not None or bool(self.histories[trial.name].outcome)
        return settled and trial.name not in self._started

    def _row(self, trial: Trial, place: int | None) -> Row:
        history, curve = self.histories[trial.name], self._curve(trial)
        records = [history.records[index] for index in sorted(history.records)]
        workers = max(1, trial.config.run.workers_wanted()[1])
        seconds = workers * sum(number(record, f"seconds_{phase}") or 0.0 for record in records for phase in PHASES)
        if place is not None:
            curve = curve[: place + 1]
            records = [record for record in records if record["round"] <= curve[-1][0]]
        active = "running" if trial.name in self._started else "waiting"
        status = "stopped" if place is not None else history.outcome or active
        evaluated = [record for record in records if self.objective in record]
        objective = number(evaluated[-1], self.objective) if evaluated else None
        return Row(trial, status, records, objective, seconds, history.reason, history.skipped_lines)

    def _median(self, rows: Sequence[Row]) -> float | None:
        wanted = self.config.sweep.seeds
        early = bool(self._rungs) and len(rows) == 1  # the other seeds follow later
        found = [row.objective for row in rows if row.status == "finished" and row.objective is not None]
        return median(found) if len(found) == len(rows) and (early or len(rows) == wanted) else None


def identical_pairs(rows: Sequence[Row]) -> list[tuple[Row, Row]]:
    """(earlier, later) finished trials with the same clusters in every round: their differences had no effect."""
    found, seen = [], dict[str, Row]()
    for row in rows:
        clusters = repr((row.trial.seed, *(record.get("assignments") for record in row.records)))
        if row.status == "finished" and seen.setdefault(clusters, row) is not row:
            found.append((seen[clusters], row))
    return found
