"""A readable summary of status.json: progress, failures, cost, and whether the job is alive."""

from __future__ import annotations

from datetime import datetime

from raycluster.io import storage
from raycluster.monitoring.status import Loss, Status, read_status
from raycluster.types import UserError

SECONDS_UNTIL_DEAD = 60.0  # without a heartbeat; a live job sends one every 5 s
_SHOWN_LOSSES = 20
_OVER = {"finished": "finished", "stopped": "stopped; the same command resumes it", "failed": "failed"}


def overview(run_dir: str, *, now: float, price: float | None = None) -> str:
    """The status of a run in a few lines. now: seconds since 1970. price: of a worker-hour, in any currency.

    Raises UserError if there is no run, or its status.json is damaged.
    """
    status = read_status(run_dir)
    if status is None:
        held = "that folder holds no run" if storage.exists(run_dir) else "there is no such folder"
        raise UserError(
            f"no status.json in {run_dir}: {held}; wanted the run.dir of a run that has started (a job writes "
            "its status as soon as its settings are validated)"
        )
    lines = [f"{run_dir}: {_state(status, now)}", *_place(status), _times(status, now), *_cost(status, price)]
    if status.note:
        lines.append(f"note: {status.note}")
    if status.skipped:
        lines.append(f"{status.skipped} images skipped, named in skipped.jsonl")
    return "\n".join([*lines, *_losses(status, now)])


def _state(status: Status, now: float) -> str:
    if status.phase in _OVER:
        return f"{_OVER[status.phase]} {duration(now - status.updated_at)} ago"
    if now - status.updated_at > SECONDS_UNTIL_DEAD:
        job = ", ".join(status.processes.get("job", [])) or "its job"
        return (
            f"DEAD: no heartbeat of {job} for {duration(now - status.updated_at)}, while {status.phase}; "
            "run the same command again to resume"
        )
    done = f" {status.done} of {status.total}" if status.total > 1 and status.phase != "training" else ""
    return f"{status.phase}{done}, with {status.workers} worker{'s' * (status.workers != 1)}"


def _place(status: Status) -> list[str]:
    """Round and step, if known."""
    if not status.rounds or status.round >= status.rounds:
        return [f"all {status.rounds} rounds are complete"] if status.rounds else []
    return [f"round {status.round + 1} of {status.rounds}, step {status.step} of {status.steps}"]


def _times(status: Status, now: float) -> str:
    began = (
        f"started {datetime.fromtimestamp(status.started_at):%Y-%m-%d %H:%M}, {duration(now - status.started_at)} ago"
    )
    left = "" if status.seconds_left is None else f"; about {duration(status.seconds_left)} left"
    saved = "" if status.saved is None else f"; newest checkpoint {duration(now - status.saved['at'])} old"
    return began + left + saved


def _cost(status: Status, price: float | None) -> list[str]:
    per_epoch = status.worker_seconds_per_epoch
    epoch = "" if per_epoch is None else f", {_priced(per_epoch, price)} per epoch"
    return [f"cost {_priced(status.worker_seconds, price)}{epoch}"]


def _priced(worker_seconds: float, price: float | None) -> str:
    hours = worker_seconds / 3600
    return f"{hours:.3g} worker-hours" + ("" if price is None else f" ({hours * price:.2f})")


def _losses(status: Status, now: float) -> list[str]:
    if not status.lost:
        return ["no failures"]
    repeated = sum(loss.seconds_repeated for loss in status.lost)
    shown = status.lost[-_SHOWN_LOSSES:]
    title = f"{len(status.lost)} failure{'s' * (len(status.lost) != 1)}, {duration(repeated)} of work repeated:"
    earlier = [f"  ... {len(status.lost) - len(shown)} earlier"] if len(shown) < len(status.lost) else []
    return [title, *earlier, *(f"  {duration(now - loss.at)} ago: {_loss(loss)}" for loss in shown)]


def _loss(loss: Loss) -> str:
    parts = [loss.what]
    if loss.steps_repeated:
        parts.append(f"{loss.steps_repeated} steps repeated")
    if loss.shards_repeated:
        parts.append(f"{loss.shards_repeated} shards extracted again")
    if loss.recovery_seconds is None:
        parts.append("not yet recovered")
    else:
        parts.append(f"recovered after {duration(loss.recovery_seconds)}")
    return "; ".join(parts)


def duration(seconds: float) -> str:
    """The two largest units: 45 s, 12 min 30 s, 3 h 20 min, 2 d 4 h."""
    whole = max(0, round(seconds))
    for unit, name, smaller, next_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= unit:
            rest = whole % unit // smaller
            return f"{whole // unit} {name}" + (f" {rest} {next_name}" if rest else "")
    return f"{whole} s"
