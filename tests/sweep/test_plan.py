"""Scheduling of trials, simulated with synthetic results: the table is independent of timing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from raycluster.sweep.config import SweepConfig
from raycluster.sweep.open import open_sweep
from raycluster.sweep.outputs import as_json, summary, write_outputs
from raycluster.sweep.plan import Sweep, identical_pairs
from raycluster.sweep.ranking import rankings
from raycluster.sweep.trials import Trial, ensure_prepared, make_trial
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


def simulate(sweep: Sweep, seed: int, concurrency: int = 3) -> list[str]:
    """Run trials in a random interleaving; the names of those that were started, in order."""
    rng = np.random.default_rng(seed)
    running: list[tuple[Trial, int]] = []
    started = []
    while True:
        while len(running) < concurrency and (trial := sweep.next()):
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
def test_the_table_is_independent_of_timing(tiny_sweep: TinySweep, tmp_path: Path, overrides: list[str]) -> None:
    tables = []
    for seed, concurrency in ((0, 1), (1, 4)):
        sweep = open_sweep(tiny_sweep(tmp_path, SEARCH, f"training.epochs={EPOCHS}", *overrides))
        simulate(sweep, seed, concurrency)
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
        simulate(sweep, 0)
        spent[kind] = sum(row.worker_seconds for row in sweep.rows())
        found = sweep.best()
        assert found is not None
        best[kind] = found.values
    assert spent["none"] == 9 * EPOCHS * 2.0
    assert spent["asha"] <= 0.6 * spent["none"] and best["asha"] == best["none"] == {"method.num_clusters": 32}


def test_the_objective_is_the_median_over_seeds(tiny_sweep: TinySweep, tmp_path: Path) -> None:
    sweep = open_sweep(tiny_sweep(tmp_path, SEARCH, f"training.epochs={EPOCHS}", "sweep.seeds=3"))
    simulate(sweep, 0)
    assert len(sweep.trials) == 27 and sweep.trials[1].name == "000-seed1"
    for one in sweep.combinations():
        assert one.objective == sorted(row.objective or 0 for row in one.rows)[1]


def test_with_early_stopping_only_survivors_are_repeated(tiny_sweep: TinySweep, tmp_path: Path) -> None:
    sweep = open_sweep(
        tiny_sweep(tmp_path, SEARCH, f"training.epochs={EPOCHS}", "sweep.seeds=3", "sweep.early_stopping=asha")
    )
    simulate(sweep, 0)
    for one in sweep.combinations():
        statuses = [row.status for row in one.rows]
        assert statuses in (["stopped"], ["finished"] * 3)
        assert (one.objective is None) == (statuses == ["stopped"])


def test_failed_trials_are_listed_and_never_best(tiny_sweep: TinySweep, tmp_path: Path) -> None:
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


def test_an_unknown_objective_is_refused(tiny_sweep: TinySweep, tmp_path: Path) -> None:
    sweep = open_sweep(tiny_sweep(tmp_path, SEARCH, "sweep.objective=acuracy"))
    trial = sweep.next()
    assert trial is not None
    with pytest.raises(UserError, match=r"seen acuracy; wanted .*, here .*knn_accuracy"):
        sweep.tell(trial.name, record(trial, 1))


def test_rankings_and_identical_pairs(tiny_sweep: TinySweep, tmp_path: Path) -> None:
    sweep = open_sweep(tiny_sweep(tmp_path, SEARCH, f"training.epochs={EPOCHS}"))
    simulate(sweep, 0)
    found = {one.score: one for one in rankings(sweep.combinations())}
    assert found["intra_cluster_edges"].spearman == pytest.approx(-1) == found["intra_cluster_edges"].kendall
    assert -0.5 < found["loss_over_chance"].spearman < 0.5 and "nmi_previous" not in found
    assert [(one.trial.name, other.trial.name) for one, other in identical_pairs(sweep.rows())] == [
        ("001", f"{number:03d}") for number in range(2, 9)
    ]


def test_odd_metrics_are_missing_values(tiny_sweep: TinySweep, tmp_path: Path) -> None:
    """NaN and text in metrics.jsonl are missing values; lines that are no records are skipped and counted."""
    config = tiny_sweep(tmp_path, "{method.num_clusters: [10, 20, 30, 40, 50]}")
    for trial in [make_trial(config, index, {"method.num_clusters": k}, 0) for index, k in enumerate([10, 20, 30])]:
        ensure_prepared(config, trial)
        lines = [json.dumps(record(trial, number)) for number in range(3)]
        broken = record(trial, 3) | {"effective_rank": "high", "seconds_training": "long", "nmi_previous": [1]}
        broken |= {"knn_accuracy": float("nan")} if trial.number == 0 else {}
        foreign = ["{", "[1, 2]", "null", '{"round": "x"}', '{"round": 9, "epoch": NaN}', "[" * 100_000, "\x00"]
        text = "\n".join([*lines, json.dumps(broken), *foreign])
        Path(trial.run_dir, "metrics.jsonl").write_text(text)
        Path(trial.run_dir, "report.json").write_text("{}")
    sweep = open_sweep(config)
    while trial := sweep.next():
        sweep.tell(trial.name, record(trial, 0) | {"knn_accuracy": float("inf"), "intra_cluster_edges": None})
        sweep.close(trial.name)
    first, second, *_, last = sweep.rows()
    assert first.objective is None and first.skipped_lines == 7 and first.worker_seconds == 3 * 2.0
    assert second.objective == record(second.trial, 3)["knn_accuracy"]
    assert last.objective is None
    write_outputs(sweep)
    page = (tmp_path / "sweep.html").read_text()
    assert (
        "Trial 000: skipped 7 lines of metrics.jsonl" in page
        and "nan" not in page.split("</style>")[1].split("<script>")[0]
    )
    table = json.loads((tmp_path / "sweep.json").read_text(), parse_constant=pytest.fail)
    assert table["trials"][0]["skipped_lines"] == 7 and table["trials"][0]["last_round"]["knn_accuracy"] is None
    assert "best.yaml" in summary(sweep)
