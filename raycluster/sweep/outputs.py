"""The outputs of a sweep: its table, its page, and the best configuration, ready to run."""

from __future__ import annotations

import json
import math
import os
from contextlib import suppress
from typing import Any

from raycluster.config.errors import format_value
from raycluster.io import storage
from raycluster.io.run_paths import RunPaths
from raycluster.monitoring.console import grid
from raycluster.sweep.page import page
from raycluster.sweep.plan import Combination, Row, Sweep
from raycluster.sweep.ranking import rankings
from raycluster.sweep.trials import Trial, ready_to_run


def write_outputs(sweep: Sweep) -> None:
    """Write sweep.json and sweep.html; best.yaml and the link `best` once a combination has finished."""
    paths = RunPaths(sweep.config.run.dir)
    storage.write_bytes(paths.sweep_table, json.dumps(as_json(sweep), indent=1).encode())
    storage.write_bytes(paths.sweep_page, page(sweep).encode())
    best = sweep.best()
    if best is not None:
        storage.write_bytes(paths.best_config, _best_yaml(sweep, best).encode())
        _link(paths, best.rows[0].trial)


def as_json(sweep: Sweep) -> dict[str, Any]:
    """The table as JSON; only keys with `seconds` in their name depend on timing."""
    best = sweep.best()
    return {
        "objective": sweep.objective,
        "direction": sweep.direction,
        "best": None if best is None else best.number,
        "combinations": [
            {"number": one.number, "values": one.values, "objective": one.objective} for one in sweep.combinations()
        ],
        "trials": [_row_json(row) for row in sweep.rows()],
        "rankings": [ranking._asdict() for ranking in rankings(sweep.combinations())],
    }


def _row_json(row: Row) -> dict[str, Any]:
    last = row.records[-1] if row.records else {}
    return {
        "name": row.trial.name,
        "number": row.trial.number,
        "seed": row.trial.seed,
        "values": row.trial.values,
        "status": row.status,
        **({"reason": row.reason} if row.reason else {}),
        "objective": row.objective,
        "worker_seconds": round(row.worker_seconds, 1),
        "last_round": {name: _finite(value) for name, value in last.items()},
        **({"skipped_lines": row.skipped_lines} if row.skipped_lines else {}),
    }


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value  # JSON has no NaN


def _best_yaml(sweep: Sweep, best: Combination) -> str:
    values = ", ".join(f"{key} = {format_value(value)}" for key, value in best.values.items())
    paths = RunPaths(sweep.config.run.dir)
    head = (
        f"# Best of {len(sweep.combinations())} combinations: {values}.\n"
        f"# Expected: {sweep.objective} {best.objective:.4f}"
        + (f", the median of {len(best.rows)} seeds" if len(best.rows) > 1 else "")
        + f".\n# Hardware, time: about {best.rows[0].worker_seconds / 60:.1f} worker minutes in the sweep.\n"
        f"# Run: python jobs/pretrain.py {paths.best_config}\n"
    )
    return ready_to_run(best.rows[0].trial, paths.best_rerun.directory, head)


def _link(paths: RunPaths, trial: Trial) -> None:
    """Link RUN/best to the best trial, on local file systems; sweep.json names it in any case."""
    filesystem, link = storage.filesystem(paths.best_link)
    if filesystem.type_name != "local":
        return
    target, temporary = os.path.relpath(storage.filesystem(trial.run_dir)[1], os.path.dirname(link)), f"{link}.part"
    with suppress(FileNotFoundError):
        os.unlink(temporary)
    os.symlink(target, temporary)
    os.replace(temporary, link)


def trial_line(sweep: Sweep, trial: Trial) -> str:
    """A trial on one line."""
    row = next(row for row in sweep.rows() if row.trial is trial)
    values = "  ".join(f"{key.rpartition('.')[2]}={format_value(value)}" for key, value in trial.values.items())
    figure = "" if row.objective is None else f"{sweep.objective} {row.objective:.4f}  "
    epoch = f" at epoch {row.records[-1]['epoch']:.3g}" if row.records else ""
    reason = f": {row.reason.splitlines()[0]}" if row.reason else ""
    return f"trial {trial.name}  {values}  {figure}{row.status}{epoch}{reason}  {row.worker_seconds:.0f} worker-seconds"


def summary(sweep: Sweep) -> str:
    """The final table: combinations from best to worst, then rank correlations of label-free scores."""
    sign = -1.0 if sweep.direction == "max" else 1.0
    ordered = sorted(
        sweep.combinations(), key=lambda one: (one.objective is None, sign * (one.so_far or 0.0), one.number)
    )
    rows = {
        f"{one.number:03d}": {
            **{key: format_value(value) for key, value in one.values.items()},
            sweep.objective: "" if one.so_far is None else f"{one.so_far:.4f}",
            "status": one.rows[0].status if one.objective is None else "finished",
            "worker-seconds": f"{sum(row.worker_seconds for row in one.rows):.0f}",
        }
        for one in ordered
    }
    found = rankings(sweep.combinations())
    ranked = {
        f"{one.score} by {one.accuracy}": {"Spearman": f"{one.spearman:+.2f}", "Kendall": f"{one.kendall:+.2f}"}
        for one in found
    }
    parts = [grid("trial", rows)] + ([grid(f"ranking of {found[0].combinations}", ranked)] if ranked else [])
    best, paths = sweep.best(), RunPaths(sweep.config.run.dir)
    conclusion = "no trial finished" if best is None else f"best: {paths.best_config}"
    return "\n\n".join(["", *parts, f"{conclusion}\npage: {paths.sweep_page}"])
