"""A sweep as it goes on: which trial is next, which one stops, what has come of all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from raycluster.sweep.bayesian import propose
from raycluster.sweep.config import SweepConfig
from raycluster.sweep.space import Axis, Values
from raycluster.sweep.stopping import decide
from raycluster.sweep.trials import History, Trial, make_trial, read_history
from raycluster.types import UserError

BATCH = 4
PHASES = ("extracting", "assigning", "training", "evaluating")


@dataclass(frozen=True)
class Row:
    """A trial in the table. status: waiting, running, finished, stopped (early) or failed.

    records: its rounds, those after an early stop left out. objective: at the last of them. worker_seconds: all that
    was spent, seconds of every worker added up.
    """

    trial: Trial
    status: str
    records: list[dict[str, Any]]
    objective: float | None
    worker_seconds: float
    reason: str = ""


@dataclass(frozen=True)
class Combination:
    """The trials of one combination. objective: the median over its seeds, None unless all of them finished."""

    number: int
    values: Values
    rows: list[Row]
    objective: float | None

    @property
    def so_far(self) -> float | None:
        """Like `objective`, but of all that did not fail, wherever they stand: what is known of a stopped one."""
        found = [row.objective for row in self.rows if row.status != "failed" and row.objective is not None]
        return median(found) if found else None

    def figure(self, name: str) -> float | None:
        """The median over its seeds of a number in their last records."""
        found = [row.records[-1][name] for row in self.rows if row.records and name in row.records[-1]]
        return median(found) if len(found) == len(self.rows) else None


class Sweep:
    """Hands out trials and hears what becomes of them. Whoever asks in which order, the table is the same in the end.

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
        self._stages = self._plan()
        self._sign = 1.0 if config.sweep.direction == "max" else -1.0

    def next(self) -> Trial | None:
        """A trial to start, or to go on with; None while others must end first, and when all is `done`."""
        while not self.done:
            stopped = self._stopped()
            for trial, place in zip(self.trials, stopped, strict=True):
                if place is None and not self.histories[trial.name].outcome and trial.name not in self._started:
                    self._started.add(trial.name)
                    return trial
            if not all(self._is_over(trial, place) for trial, place in zip(self.trials, stopped, strict=True)):
                return None
            test_cluster = next(self._stages, None)
            self.done = test_cluster is None
            self.trials += test_cluster or []
            self.histories |= {trial.name: read_history(trial) for trial in test_cluster or []}
        return None

    def tell(self, name: str, record: dict[str, Any]) -> bool:
        """A round of a trial is over; whether the trial must stop now. Raises UserError if it has no such objective."""
        self.histories[name].records[record["round"]] = record
        numbers = [key for key, value in record.items() if isinstance(value, (int, float))]
        # What compares a round with the one before is not there in the first.
        if self.objective not in numbers and record["round"] > 0:
            raise UserError(
                f"sweep.objective: seen {self.objective}; wanted a number of metrics.jsonl, here {', '.join(numbers)}"
            )
        return self._stopped()[self._place(name)] is not None

    def close(self, name: str, outcome: str = "finished", reason: str = "") -> None:
        """A trial is over: `finished`, `failed`, or, if it was told to stop, anything."""
        if self._stopped()[self._place(name)] is None:
            self.histories[name].outcome, self.histories[name].reason = outcome, reason
        self._started.discard(name)

    def rows(self) -> list[Row]:
        """The table so far, in the order of the trials."""
        return [self._row(trial, place) for trial, place in zip(self.trials, self._stopped(), strict=True)]

    def combinations(self) -> list[Combination]:
        """The trials by combination, in order."""
        rows: dict[int, list[Row]] = {}
        for row in self.rows():
            rows.setdefault(row.trial.number, []).append(row)
        return [
            Combination(number, mine[0].trial.values, mine, self._median(mine)) for number, mine in sorted(rows.items())
        ]

    def best(self) -> Combination | None:
        """The best combination of those whose trials all ran to the end; the first of equals."""
        known = [found for found in self.combinations() if found.objective is not None]
        return max(known, key=lambda found: self._sign * (found.objective or 0.0), default=None)

    def _plan(self) -> Iterator[list[Trial]]:
        """Trials that may run side by side; each list depends on what came of those before.

        With early stopping, only what survives under the first seed is repeated under the others.
        """
        seeds = range(self.config.seed, self.config.seed + self.config.sweep.seeds)
        first = seeds[:1] if self._rungs else seeds
        number = 0
        for batch in self._batches():
            yield [
                make_trial(self.config, number + index, values, seed)
                for index, values in enumerate(batch)
                for seed in first
            ]
            number += len(batch)
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
            yield propose(self.axes, tried, count, seed=self.config.seed, direction=settings.direction)

    @property
    def _rungs(self) -> list[float]:
        return self.config.sweep.rungs(self.config.training.epochs)

    def _stopped(self) -> list[int | None]:
        """Per trial the place in its curve where it is stopped; only trials under the first seed ever are."""
        mine = [index for index, trial in enumerate(self.trials) if trial.seed == self.config.seed]
        curves = [[(epoch, self._sign * value) for _, epoch, value in self._curve(self.trials[i])] for i in mine]
        over = [bool(self.histories[self.trials[index].name].outcome) for index in mine]
        found: list[int | None] = [None] * len(self.trials)
        places = decide(curves, over, rungs=self._rungs, reduction=self.config.sweep.reduction or 3.0)
        for index, place in zip(mine, places, strict=True):
            found[index] = place
        return found

    def _curve(self, trial: Trial) -> list[tuple[int, float, float]]:
        """(round, epoch, objective) of the rounds that have one."""
        records = self.histories[trial.name].records
        return [
            (number, records[number]["epoch"], records[number][self.objective])
            for number in sorted(records)
            if self.objective in records[number]
        ]

    def _place(self, name: str) -> int:
        return next(index for index, trial in enumerate(self.trials) if trial.name == name)

    def _is_over(self, trial: Trial, place: int | None) -> bool:
        settled = place is not None or bool(self.histories[trial.name].outcome)
        return settled and trial.name not in self._started

    def _row(self, trial: Trial, place: int | None) -> Row:
        history, curve = self.histories[trial.name], self._curve(trial)
        records = [history.records[number] for number in sorted(history.records)]
        workers = max(1, trial.config.run.workers_wanted()[1])
        seconds = workers * sum(record.get(f"seconds_{phase}", 0.0) for record in records for phase in PHASES)
        if place is not None:
            curve = curve[: place + 1]
            records = [record for record in records if record["round"] <= curve[-1][0]]
        going_on = "running" if trial.name in self._started else "waiting"
        status = "stopped" if place is not None else history.outcome or going_on
        return Row(trial, status, records, curve[-1][2] if curve else None, seconds, history.reason)

    def _median(self, rows: Sequence[Row]) -> float | None:
        wanted = self.config.sweep.seeds
        early = bool(self._rungs) and len(rows) == 1  # the other seeds may still come
        found = [row.objective for row in rows if row.status == "finished" and row.objective is not None]
        return median(found) if len(found) == len(rows) and (early or len(rows) == wanted) else None


def twins(rows: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Trials that found the same clusters in every round as another before them: what differs had no effect."""
    found, seen = [], dict[tuple[Any, ...], Row]()
    for row in rows:
        clusters = (row.trial.seed, *(record["assignments"] for record in row.records))
        if row.status == "finished" and seen.setdefault(clusters, row) is not row:
            found.append((seen[clusters], row))
    return found
