"""Console output of a run: a progress bar, one line per round, warnings, and a table of results at the end."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm

from raycluster.evaluation.base import declared_metrics
from raycluster.events import Event, FailureEvent, Finished, Progress, Round, Started, StatusNote
from raycluster.io.run_paths import RunPaths
from raycluster.monitoring.tensorboard import TensorBoard
from raycluster.run.config import Config

BAR = "{desc} {percentage:3.0f}% |{bar:30}| {n_fmt}/{total_fmt} {elapsed}<{remaining} {postfix}"
SECONDS_BETWEEN_LINES = 30  # where stderr is no terminal, instead of a progress bar


class ConsoleReporter:
    """Prints the events of one run, and writes its rounds to TensorBoard. summary: to print at the end."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.summary = ""
        self._round = ""
        self._num_rounds = 0
        self._bar: tqdm[Any] | None = None
        self._phase = ""
        self._last_line = time.monotonic()
        self._live = sys.stderr.isatty()
        self._tensorboard = TensorBoard(RunPaths(config.run.dir).tensorboard)

    def handle(self, event: Event) -> None:
        """Print an event."""
        if isinstance(event, Progress):
            self._progress(event)
        elif isinstance(event, Started):
            self._close_bar()
            self._num_rounds = len(event.rounds)
            self._set_round(event.round)
            print(started_line(event, self.config.run.dir), flush=True)
        elif isinstance(event, Round):
            self._close_bar()
            self._set_round(event.record["round"] + 1)
            print(round_line(event.record), flush=True)
            for warning in warnings(event.record):
                print(f"  warning: {warning}", flush=True)
            self._tensorboard.write(event.record)
        elif isinstance(event, (FailureEvent, StatusNote)):
            text = event.what if isinstance(event, FailureEvent) else event.text
            if text:
                self._close_bar()
                print(f"  {text}", flush=True)
        elif isinstance(event, Finished):
            self._close_bar()
            self.summary = summary(event.report, self.config.run.dir)

    def _progress(self, event: Progress) -> None:
        if self._live:
            if event.phase != self._phase or self._bar is None:
                self._close_bar()
                self._bar = tqdm(
                    total=event.total,
                    leave=False,
                    desc=f"{self._round}{event.phase}",
                    dynamic_ncols=True,
                    bar_format=BAR if event.total > 1 else "{desc} {postfix}",
                )
            self._bar.set_postfix_str(event.note, refresh=False)
            self._bar.update(event.done - self._bar.n)
        elif time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            count = f"{event.done}/{event.total} " if event.total > 1 else ""
            print(f"{self._round}{event.phase} {count}{event.note}", flush=True)
        self._phase = event.phase

    def _set_round(self, done: int) -> None:
        self._round = f"round {done + 1}/{self._num_rounds} " if done < self._num_rounds else ""

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar = None

    def close(self) -> None:
        """Clear the progress bar and close TensorBoard."""
        self._close_bar()
        self._tensorboard.close()


def started_line(event: Started, run_dir: str) -> str:
    """What starts, or from where it resumes."""
    first, last = event.rounds[event.round]
    workers = f", {event.num_workers} workers" if event.num_workers > 1 else ""
    if event.round or event.step:
        where = f"round {event.round + 1} of {len(event.rounds)}, step {event.step} of {last - first}"
        return f"{run_dir}: resuming in {where}{workers}"
    return f"{run_dir}: {event.num_samples} images, {len(event.rounds)} rounds, {event.rounds[-1][1]} steps{workers}"


def round_line(record: dict[str, Any]) -> str:
    """The metrics of one round on one line."""
    parts = [
        f"round {record['round'] + 1:>3}",
        f"epoch {record['epoch']:.4g}",
        f"loss {record['loss']:.3f} ({record['loss_over_chance']:.2f} of chance)",
    ]
    if "nmi_previous" in record:
        parts.append(f"NMI with previous {record['nmi_previous']:.3f}")
    if "nmi_labels" in record:
        parts.append(f"NMI with labels {record['nmi_labels']:.3f}")
    seconds = [record[f"seconds_{phase}"] for phase in ("extracting", "assigning", "training")]
    parts.append(f"{record['images_per_second']:.0f} images/s")
    parts.append("extract/assign/train {:.1f}/{:.1f}/{:.1f} s".format(*seconds))
    if record["num_skipped"]:
        parts.append(f"{record['num_skipped']} images skipped")
    return "  ".join(parts)


def warnings(record: dict[str, Any]) -> list[str]:
    """Signs of collapse, with what to try."""
    found = _size_warnings(record) if "num_clusters" in record else []
    if record["round"] >= 3 and record["loss_over_chance"] > 0.98:
        found.append("the loss stays at chance: the labels are not being learned; try a higher lr or longer rounds")
    if record["round"] >= 3 and record["loss_over_chance"] < 0.02:
        found.append("the loss is near zero: the labels are trivial; try more clusters or stronger augmentation")
    return found


def _size_warnings(record: dict[str, Any]) -> list[str]:
    num_clusters, found = record["num_clusters"], []
    if record["largest_share"] > max(0.5, 10 / num_clusters):
        found.append(
            f"one cluster holds {record['largest_share']:.0%} of the images; try a lower lr or more augmentation"
        )
    if record["empty_clusters"] > 0.1 * num_clusters:
        found.append(f"{record['empty_clusters']:.0f} of {num_clusters:.0f} clusters are empty; try fewer clusters")
    if record["size_entropy"] < 0.5:
        found.append(f"cluster sizes are very uneven (entropy {record['size_entropy']:.2f} of 1); try fewer clusters")
    return found


def summary(report: dict[str, Any], run_dir: str) -> str:
    """Results of a finished run: images, loss, accuracies of the probes, agreement with the true labels."""
    last = report["last_round"]
    loss = f", loss {last['loss']:.3f}" if "loss" in last else ""
    lines = [f"{report['images']} images ({report['skipped']} skipped), {report['rounds']} rounds{loss}"]
    accuracies: dict[str, dict[str, float]] = report.get("accuracies", {})
    if accuracies:
        lines += ["", table(accuracies)]
    if "nmi_labels" in last:
        lines += ["", f"NMI between clusters and true labels {last['nmi_labels']:.3f} (arithmetic)"]
    return "\n".join([*lines, "", f"run directory: {run_dir}"])


def table(rows: dict[str, dict[str, float]]) -> str:
    """Headline metrics of the probes: a row per network or layer, a column per metric."""
    known = declared_metrics()
    shown = {
        row: {
            known[name].title: f"{100 * value:.1f}" if known[name].percent else f"{value:.3f}"
            for name, value in metrics.items()
            if name in known and known[name].headline
        }
        for row, metrics in rows.items()
    }
    return grid("accuracy, %", shown)


def agreement_table(rows: dict[str, dict[str, float]] | None) -> str:
    """Agreement of each head's clusters with the true labels. None: the images are not those of the run.

    Empty: the run has no labels of images.
    """
    if rows is None:
        return "agreement: not computed, these are other images than the run's, or those can no longer be read"
    if not rows:
        return "agreement: the run assigns no labels to images"
    return grid(
        "agreement",
        {head: {name.replace("_", " "): f"{value:.3f}" for name, value in row.items()} for head, row in rows.items()},
    )


def grid(corner: str, rows: dict[str, dict[str, str]]) -> str:
    """A table of text with aligned columns; corner: the title of the first one."""
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    first = max(len(text) for text in (corner, *rows)) + 2
    widths = [max(len(name), *(len(row.get(name, "")) for row in rows.values())) + 2 for name in names]
    lines = []
    for title, row in {corner: {name: name for name in names}, **rows}.items():
        cells = (row.get(name, "").rjust(width) for name, width in zip(names, widths, strict=True))
        lines.append(title.ljust(first) + "".join(cells))
    return "\n".join(lines)
