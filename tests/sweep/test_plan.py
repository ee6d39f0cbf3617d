"""The course of a sweep, played through with made-up results: the table never depends on who was faster."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from raycluster.sweep.config import SweepConfig
from raycluster.sweep.open import open_sweep
from raycluster.sweep.outputs import as_json, summary
from raycluster.sweep.plan import Sweep, twins
from raycluster.sweep.ranking import rankings
from raycluster.sweep.trials import Trial
from raycluster.types import UserError

TinySweep = Callable[..., SweepConfig]
EPOCHS = 9
SEARCH = "{method.num_clusters: {log_int: [2, 512], steps: 9}}"


def record(trial: Trial, number: int) -> dict[str, float | str]:
    k = trial.config.method.num_clusters
    good = 1 / (1 + (np.log(k / 30)) ** 2) + 0.001 * trial.seed
    return {
        "round": number,
        "epoch": number + 1.0,
        "knn_accuracy": good * (1 - 0.5 ** (number + 1)),
        "intra_cluster_edges": -good,
        "loss_over_chance": float(k),
        "seconds_training": 2.0,
        "assignments": str(min(k, 4)),
    }


def scenario(sweep: Sweep, seed: int, side_by_side: int = 3) -> list[str]:
    """Run trials in a random interleaving; the names of those that were started, in order."""
    rng = np.random.default_rng(seed)
    running: list[tuple[Trial, int]] = []
    started = []
    while True:
        while len(running) < side_by_side and (trial := sweep.next()):
            started.append(trial.name)
            running.append((trial, 0))
        if not running:
            assert sweep.done
            return started
        trial, number = running.pop(int(rng.integers(len(running))))
        if sweep.tell(trial.name, record(trial, number)) or number + 1 == EPOCHS:
            sweep.close(trial.name)
        else:
            running.append((trial, number + 1))


def without_seconds(table: dict) -> dict:
    for row in table["trials"]:
        row.pop("worker_seconds")
    return table


@pytest.mark.parametrize(
    "overrides",
    [
        ["sweep.early_stopping=none"],
        ["sweep.early_stopping=asha"],
        ["sweep.early_stopping=asha", "sweep.seeds=3"],
        ["sweep.seeds=3", "sweep.strategy=random", "sweep.trials=5"],
        ["sweep.strategy=bayesian", "sweep.trials=10", "sweep.batch=3"],
        ["sweep.strategy=bayesian", "sweep.trials=10", "sweep.early_stopping=asha", "sweep.seeds=2"],
    ],
)
def test_the_table_never_depends_on_who_was_faster(tiny_sweep: TinySweep, tmp_path: Path, overrides: list[str]) -> None:
    tables = []
    for seed, side_by_side in ((0, 1), (1, 4)):
        sweep = open_sweep(tiny_sweep(tmp_path, SEARCH, f"training.epochs={EPOCHS}", *overrides))
        scenario(sweep, seed, side_by_side)
        tables.append(without_seconds(as_json(sweep)))
        assert sweep.best() is not None and "best.yaml" in summary(sweep)
    assert tables[0] == tables[1]


def test_early_stopping_saves_work_and_keeps_the_best(tiny_sweep: TinySweep, tmp_path: Path) -> None:
    spent: dict[str, float] = {}
    best: dict[str, object] = {}
    for kind in ("none", "asha"):
        sweep = open_sweep(
            tiny_sweep(tmp_path / kind, SEARCH, f"training.epochs={EPOCHS}", f"sweep.early_stopping={kind}")
        )
        scenario(sweep, 0)
        spent[kind] = sum(row.worker_seconds for row in sweep.rows())
        found = sweep.best()
        assert found is not None
        best[kind] = found.values
    assert spent["none"] == 9 * EPOCHS * 2.0
    assert spent["asha"] <= 0.6 * spent["none"] and best["asha"] == best["none"] == {"method.num_clusters": 32}


def test_the_median_of_the_seeds_counts(tiny_sweep: TinySweep, tmp_path: Path) -> None:
    sweep = open_sweep(tiny_sweep(tmp_path, SEARCH, f"training.epochs={EPOCHS}", "sweep.seeds=3"))
    scenario(sweep, 0)
    assert len(sweep.trials) == 27 and sweep.trials[1].name == "000-seed1"
    for one in sweep.combinations():
        assert one.objective == sorted(row.objective or 0 for row in one.rows)[1]


def test_with_early_stopping_only_survivors_are_repeated(tiny_sweep: TinySweep, tmp_path: Path) -> None:
    sweep = open_sweep(
        tiny_sweep(tmp_path, SEARCH, f"training.epochs={EPOCHS}", "sweep.seeds=3", "sweep.early_stopping=asha")
    )
    scenario(sweep, 0)
    for one in sweep.combinations():
        statuses = [row.status for row in one.rows]
        assert statuses in (["stopped"], ["finished"] * 3)
        assert (one.objective is None) == (statuses == ["stopped"])


def test_failed_trials_are_named_and_never_best(tiny_sweep: TinySweep, tmp_path: Path) -> None:
    sweep = open_sweep(tiny_sweep(tmp_path, "{method.num_clusters: [10, 20, 30]}"))
    for fails in (False, False, True):
        trial = sweep.next()
        assert trial is not None
        sweep.tell(trial.name, record(trial, 8))
        sweep.close(trial.name, "failed" if fails else "finished", "training diverged" * fails)
    assert [row.status for row in sweep.rows()] == ["finished", "finished", "failed"]
    best = sweep.best()
    assert best is not None and best.values == {"method.num_clusters": 20}
    assert as_json(sweep)["trials"][2]["reason"] == "training diverged"


def test_an_objective_that_does_not_exist_is_refused_with_those_that_do(tiny_sweep: TinySweep, tmp_path: Path) -> None:
    sweep = open_sweep(tiny_sweep(tmp_path, SEARCH, "sweep.objective=acuracy"))
    trial = sweep.next()
    assert trial is not None
    with pytest.raises(UserError, match=r"seen acuracy; wanted .*, here .*knn_accuracy"):
        sweep.tell(trial.name, record(trial, 1))


def test_the_rankings_and_the_twins(tiny_sweep: TinySweep, tmp_path: Path) -> None:
    sweep = open_sweep(tiny_sweep(tmp_path, SEARCH, f"training.epochs={EPOCHS}"))
    scenario(sweep, 0)
    found = {one.score: one for one in rankings(sweep.combinations())}
    assert found["intra_cluster_edges"].spearman == pytest.approx(-1) == found["intra_cluster_edges"].kendall
    assert -0.5 < found["loss_over_chance"].spearman < 0.5 and "nmi_previous" not in found
    assert [(one.trial.name, other.trial.name) for one, other in twins(sweep.rows())] == [
        ("001", f"{number:03d}") for number in range(2, 9)
    ]
