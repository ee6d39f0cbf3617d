"""What a run shows while it goes on and when it ends: a live line, a line a round, TensorBoard, a short table."""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter
from tqdm import tqdm

from raycluster.events import Event, FailureEvent, Finished, Progress, Round, Started, StatusNote
from raycluster.io import storage
from raycluster.run.state import Config
from raycluster.types import UserError

BAR = "{desc} {percentage:3.0f}% |{bar:30}| {n_fmt}/{total_fmt} {elapsed}<{remaining} {postfix}"
SECONDS_BETWEEN_LINES = 30  # in a log file, where a live line would be thousands
TENSORBOARD_SECONDS = 30.0  # that a round may take to be written


class ConsoleReporter:
    """Listens to the events of one run and shows them. `summary` is what to print at the end."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.summary = ""
        self._round = ""
        self._num_rounds = 0
        self._bar: tqdm[Any] | None = None
        self._phase = ""
        self._last_line = time.monotonic()
        self._live = sys.stderr.isatty()
        self._tensorboard = TensorBoard(storage.join(config.run.dir, "tensorboard"))

    def handle(self, event: Event) -> None:
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
        self._close_bar()
        self._tensorboard.close()


class TensorBoard:
    """Event files through the standard writer; for a bucket they are written beside and copied after each round.

    The writer waits for its own thread, which dies of a full disk: it is waited for a while, and then done without.
    """

    def __init__(self, uri: str) -> None:
        filesystem, path = storage.filesystem(uri)
        self._target = None if filesystem.type_name == "local" else uri
        self._folder = Path(path if self._target is None else tempfile.mkdtemp(prefix="tensorboard-"))
        self._writer: SummaryWriter | None = None
        self._works = True

    def write(self, record: dict[str, Any]) -> None:
        """Add the figures of a round."""
        self._within_seconds(lambda: self._write(record))

    def _within_seconds(self, task: Callable[[], None]) -> None:
        done = threading.Event()

        def attempt() -> None:
            with suppress(OSError):
                task()
                done.set()

        if self._works:
            threading.Thread(target=attempt, name="tensorboard", daemon=True).start()
            self._works = done.wait(TENSORBOARD_SECONDS)

    def _write(self, record: dict[str, Any]) -> None:
        if self._writer is None:
            self._writer = SummaryWriter(str(self._folder), purge_step=record["step"])
        for name, value in record.items():
            if isinstance(value, (int, float)):
                self._writer.add_scalar(name, value, record["step"])
        self._writer.flush()
        self._copy()

    def _copy(self) -> None:
        if self._target is not None:
            with suppress(UserError):  # the next round copies everything again
                for file in self._folder.iterdir():
                    storage.write_bytes(storage.join(self._target, file.name), file.read_bytes())

    def close(self) -> None:
        """End the files."""
        if self._writer is not None:
            self._within_seconds(self._writer.close)


def started_line(event: Started, run_dir: str) -> str:
    """What begins, or where it goes on."""
    first, last = event.rounds[event.round]
    workers = f", {event.num_workers} workers" if event.num_workers > 1 else ""
    if event.round or event.step:
        where = f"round {event.round + 1} of {len(event.rounds)}, step {event.step} of {last - first}"
        return f"{run_dir}: going on in {where}{workers}"
    return f"{run_dir}: {event.num_samples} images, {len(event.rounds)} rounds, {event.rounds[-1][1]} steps{workers}"


def round_line(record: dict[str, Any]) -> str:
    """One round in one line."""
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
    """The short table at the end."""
    last = report["last_round"]
    lines = [
        f"{report['images']} images ({report['skipped']} skipped), {report['rounds']} rounds, loss {last['loss']:.3f}"
    ]
    accuracies: dict[str, dict[str, float]] = report.get("accuracies", {})
    if accuracies:
        lines += ["", table(accuracies)]
    if "nmi_labels" in last:
        lines += ["", f"NMI of the clusters with the true labels {last['nmi_labels']:.3f} (arithmetic)"]
    return "\n".join([*lines, "", f"run directory: {run_dir}"])


def table(rows: dict[str, dict[str, float]]) -> str:
    """Accuracies (shares) as percent: a row per network or layer, a column per probe."""
    percent = {
        row: {
            name.removesuffix("_accuracy").replace("_", " "): f"{100 * value:.1f}"
            for name, value in figures.items()
            if name.endswith("_accuracy") and "_train_" not in name
        }
        for row, figures in rows.items()
    }
    return grid("accuracy, %", percent)


def agreement_table(rows: dict[str, dict[str, float]]) -> str:
    """Agreement of each head's clusters with the true labels."""
    figures = {
        row: {name.replace("_", " "): f"{value:.3f}" for name, value in values.items()} for row, values in rows.items()
    }
    return (
        grid("agreement", figures)
        if figures
        else ("agreement: none of the run's pictures is among those evaluated, going by their paths")
    )


def grid(corner: str, rows: dict[str, dict[str, str]]) -> str:
    """Rows and columns of text, aligned."""
    names = list(next(iter(rows.values())))
    first = max(len(text) for text in (corner, *rows)) + 2
    widths = [max(len(name), *(len(row[name]) for row in rows.values())) + 2 for name in names]
    lines = [corner.ljust(first) + "".join(name.rjust(width) for name, width in zip(names, widths, strict=True))]
    for title, row in rows.items():
        lines.append(
            title.ljust(first) + "".join(row[name].rjust(width) for name, width in zip(names, widths, strict=True))
        )
    return "\n".join(lines)
