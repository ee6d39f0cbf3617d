"""sweep.html: a self-contained report of a sweep, without network access or other files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from raycluster.config.errors import format_value
from raycluster.evaluation.base import label_free_metrics, labelled_metrics
from raycluster.sweep import charts
from raycluster.sweep.axes import Scale, categorical_scale, numeric_scale, tick_label
from raycluster.sweep.charts import Mark
from raycluster.sweep.plan import Row, Sweep, identical_pairs
from raycluster.sweep.ranking import rankings
from raycluster.sweep.space import Axis, Values
from raycluster.sweep.trials import number

NUM_COLOURS = 5  # by rank
MAX_LABELS, MAX_LABEL_LENGTH = 6, 10  # of the lines in a chart


class Page:
    """State shared by the sections: the rows with an objective, their ranks and colours."""

    def __init__(self, sweep: Sweep) -> None:
        self.sweep, self.rows = sweep, sweep.rows()
        self.best = sweep.best()
        self.evaluated = [row for row in self.rows if row.objective is not None]
        sign = 1 if sweep.direction == "max" else -1
        self.ranked = sorted(self.evaluated, key=lambda row: sign * (row.objective or 0.0))
        self.objectives = numeric_scale([row.objective or 0.0 for row in self.evaluated])

    def is_best(self, row: Row) -> bool:
        """Whether the row belongs to the best combination."""
        return self.best is not None and row.trial.number == self.best.number

    def look(self, row: Row) -> str:
        """CSS classes of a row: its rank and status."""
        if row.status == "failed":
            return "failed"
        rank = self.ranked.index(row) if row in self.ranked else 0
        colour = "best" if self.is_best(row) else f"q{rank * NUM_COLOURS // max(1, len(self.ranked))}"
        return f"{colour} {row.status}"

    def mark(self, row: Row, points: Sequence[tuple[Any, Any]]) -> Mark:
        """The mark of a row in a chart."""
        values = ", ".join(f"{key} = {format_value(value)}" for key, value in row.trial.values.items())
        figure = "" if row.objective is None else f"\n{self.sweep.objective} {row.objective:.4f}"
        return Mark(row.trial.name, self.look(row), f"trial {row.trial.name}: {values}{figure}, {row.status}", points)

    def scale(self, axis: Axis) -> Scale:
        """The scale of a searched key: its values in trials and in the search space."""
        if not axis.numeric:
            return categorical_scale(axis.values)
        tried = [row.trial.values[axis.key] for row in self.rows]
        return numeric_scale([*axis.examples(), *tried], log=axis.log, label_values=bool(axis.values))


def page(sweep: Sweep) -> str:
    """The page as HTML, with a light and a dark colour scheme."""
    view = Page(sweep)
    parts = [_head(view), _table(view)]
    if view.evaluated:
        parts += [_by_key(view), _parallel(view), _curves(view), _scores(view)]
    title = escape(f"Sweep {sweep.config.run.dir}")
    style, script = (files("raycluster.sweep").joinpath(f"page.{kind}").read_text("utf-8") for kind in ("css", "js"))
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<style>\n{style}</style>\n</head>\n<body>\n{''.join(parts)}{_costs(view)}<script>\n{script}</script>\n"
        "</body>\n</html>\n"
    )


def _section(title: str, explanation: str, body: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n<p>{explanation}</p>\n{body}</section>\n"


def _head(view: Page) -> str:
    sweep, settings = view.sweep, view.sweep.config.sweep
    states = [row.status for row in view.rows]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    how = f"{settings.strategy} search" + (", ASHA early stopping" if settings.early_stopping != "none" else "")
    cost = tick_label(round(sum(row.worker_seconds for row in view.rows)))
    text = f"{len(view.rows)} trials ({counts}), {how}, {cost} worker-seconds on {escape(sweep.config.data.uri)}."
    if view.best is not None:
        values = ", ".join(f"{key} = {format_value(value)}" for key, value in view.best.values.items())
        text += (
            f" Best: <b>{escape(sweep.objective)} {view.best.objective:.4f}</b> with <code>{escape(values)}</code>;"
            " <code>best.yaml</code> in the same folder runs it again."
        )
    notes = "".join(f"<p>{escape(note)}</p>\n" for note in _notes(view))
    keys = '<span class="key q0"></span>worst <span class="key q2"></span> <span class="key q4"></span>good '
    keys += '<span class="key best"></span>best combination <span class="key stopped"></span>stopped early (dashed)'
    return f"<h1>{escape(sweep.config.run.dir)}</h1>\n<p>{text}</p>\n{notes}<p>In all charts:{keys}</p>\n"


def _notes(view: Page) -> Iterator[str]:
    for one, other in identical_pairs(view.rows):
        keys = [key for key, value in one.trial.values.items() if other.trial.values[key] != value]
        yield (
            f"Trials {one.trial.name} and {other.trial.name} have identical clusters in every round: "
            f"{', '.join(keys)} had no effect."
        )
    for row in view.rows:
        if row.skipped_lines:
            yield f"Trial {row.trial.name}: skipped {row.skipped_lines} lines of metrics.jsonl that are not records."


def _table(view: Page) -> str:
    keys, objective = [axis.key for axis in view.sweep.axes], view.sweep.objective
    last = [row.records[-1] if row.records else {} for row in view.rows]
    wanted = [*label_free_metrics(), *labelled_metrics()]
    extra = [name for name in dict.fromkeys(wanted) if name != objective and any(name in record for record in last)]
    titles = ["trial", *keys, objective, *extra, "epoch", "status", "worker-seconds"]
    head = "".join(f"<th>{escape(title.replace('_', ' ').replace('.', '. '))}</th>" for title in titles)
    order = [*reversed(view.ranked), *(row for row in view.rows if row not in view.evaluated)]
    order.sort(key=lambda row: row.status == "stopped")  # finished trials first
    body = "".join(_table_row(view, row, keys, extra) for row in order)
    return _section(
        "Trials",
        "From best to worst; click on a column to sort by it. Each trial is a run directory.",
        f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>\n",
    )


def _table_row(view: Page, row: Row, keys: Sequence[str], extra: Sequence[str]) -> str:
    record = row.records[-1] if row.records else {}
    cells = [f'<td><a href="trials/{escape(row.trial.name)}">{escape(row.trial.name)}</a></td>']
    cells += [f"<td>{escape(format_value(row.trial.values[key]))}</td>" for key in keys]
    cells += [_number_cell(row.objective), *(_number_cell(number(record, name)) for name in extra)]
    cells += [f"<td>{tick_label(record['epoch']) if record else ''}</td>", f"<td>{row.status}</td>"]
    cells += [f'<td data-value="{row.worker_seconds:.1f}">{tick_label(round(row.worker_seconds))}</td>']
    looks = f"{row.status}{' best' * view.is_best(row)}"
    return f'<tr class="{looks}" data-trial="{escape(row.trial.name)}">{"".join(cells)}</tr>\n'


def _number_cell(value: float | None) -> str:
    return "<td></td>" if value is None else f'<td data-value="{value!r}">{value:.4f}</td>'


def _by_key(view: Page) -> str:
    panels = "".join(f"<figure>{_panel(view, axis)}</figure>\n" for axis in view.sweep.axes)
    return _section(
        f"{view.sweep.objective} by searched setting",
        "Lines join finished trials that differ in this setting only, and are labelled with their other settings.",
        f'<div class="panels">\n{panels}</div>\n',
    )


def _panel(view: Page, axis: Axis) -> str:
    marks = [view.mark(row, [(row.trial.values[axis.key], row.objective)]) for row in view.ranked]
    profiles = [(values, points) for values, points in _profiles(view, axis) if len(points) > 1]
    names = [", ".join(map(format_value, values.values())) for values, _ in profiles]
    label_values = len(names) <= MAX_LABELS and max(map(len, names), default=0) <= MAX_LABEL_LENGTH
    links = [
        Mark(name * label_values, "link", str(values), points)
        for name, (values, points) in zip(names, profiles, strict=True)
    ]
    axes, titles = (view.scale(axis), view.objectives), (axis.key, view.sweep.objective)
    return charts.dots(marks, links, axes=axes, titles=titles)


def _profiles(view: Page, axis: Axis) -> Iterator[tuple[Values, list[tuple[Any, float]]]]:
    """(all other settings, [(value of this key, objective, the median over seeds), ...] by value)."""
    found: dict[str, tuple[Values, list[tuple[Any, float]]]] = {}
    for one in view.sweep.combinations():
        others = {key: value for key, value in one.values.items() if key != axis.key}
        if one.objective is not None:
            found.setdefault(str(others), (others, []))[1].append((one.values[axis.key], one.objective))
    scale = view.scale(axis)
    for others, points in found.values():
        yield others, sorted(points, key=lambda point: scale.position(point[0]))


def _parallel(view: Page) -> str:
    scales = [*(view.scale(axis) for axis in view.sweep.axes), view.objectives]
    marks = []
    for row in view.ranked:
        values = [*(row.trial.values[axis.key] for axis in view.sweep.axes), row.objective]
        positions = [scale.position(value) for scale, value in zip(scales, values, strict=True)]
        marks.append(view.mark(row, list(enumerate(positions))))
    titles = [*(axis.key for axis in view.sweep.axes), view.sweep.objective]
    return _section(
        "All settings together",
        "One line per trial, through its settings and its objective.",
        f"<figure>{charts.parallel(marks, scales, titles=titles)}</figure>\n",
    )


def _curves(view: Page) -> str:
    objective = view.sweep.objective
    lines = [
        (row, [(record["epoch"], value) for record in row.records if (value := number(record, objective)) is not None])
        for row in view.ranked
    ]
    points = [point for _, curve in lines for point in curve]
    axes = numeric_scale([0.0, *(x for x, _ in points)], margin=0.02), numeric_scale([y for _, y in points])
    marks = [view.mark(row, curve) for row, curve in lines]
    return _section(
        "Learning curves",
        f"{escape(objective)} after each round of each trial.",
        f"<figure>{charts.curves(marks, axes=axes, titles=('epoch', objective))}</figure>\n",
    )


def _scores(view: Page) -> str:
    """How well label-free scores rank the combinations; empty without labels."""
    combinations = [one for one in view.sweep.combinations() if one.objective is not None]
    panels = ""
    for found in rankings(combinations):
        if found.accuracy != view.sweep.objective:
            continue
        points = [(one.figure(found.score) or 0.0, one.objective or 0.0) for one in combinations]
        marks = [view.mark(one.rows[0], [point]) for one, point in zip(combinations, points, strict=True)]
        axes = numeric_scale([x for x, _ in points]), numeric_scale([y for _, y in points])
        caption = f"Spearman {found.spearman:+.2f}, Kendall {found.kendall:+.2f} over {found.combinations} combinations"
        drawing = charts.dots(marks, [], axes=axes, titles=(found.score, found.accuracy))
        panels += f"<figure>{drawing}<figcaption>{caption}</figcaption></figure>\n"
    if not panels:
        return ""
    return _section(
        "Label-free scores",
        "Rank correlation of each score with the accuracy over finished combinations: +1 for equal order, -1 reversed.",
        f'<div class="panels">\n{panels}</div>\n',
    )


def _costs(view: Page) -> str:
    marks = [view.mark(row, [(row.worker_seconds, 0.0)]) for row in view.rows]
    return _section(
        "Cost",
        "Seconds times workers of each trial, in the order of the trials.",
        f"<figure>{charts.bars(marks, 'worker-seconds')}</figure>\n",
    )
