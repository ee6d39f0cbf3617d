"""Charts as SVG from plain data; page.css defines colours and fonts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from raycluster.sweep.axes import Scale, tick_label

Point = tuple[float, float]
_ROW = 18  # height of a bar with its gap


@dataclass(frozen=True)
class Mark:
    """A trial in a chart. look: CSS classes. tooltip: shown on hover."""

    trial: str
    look: str
    tooltip: str
    points: Sequence[Point]


@dataclass(frozen=True)
class Frame:
    """The size of a chart and its margins, in pixels."""

    width: int
    height: int
    left: int = 52
    right: int = 16
    top: int = 12
    bottom: int = 40

    def at(self, x: float, y: float) -> Point:
        """The pixel of a position: shares of the width from the left and of the height from the bottom."""
        across, down = self.width - self.left - self.right, self.height - self.top - self.bottom
        return self.left + x * across, self.top + (1 - y) * down


def dots(marks: Sequence[Mark], links: Sequence[Mark], *, axes: tuple[Scale, Scale], titles: tuple[str, str]) -> str:
    """A scatter plot of the marks, and labelled lines for the links; points are in the units of the axes."""
    frame = Frame(400, 270, right=18 + 7 * max((len(link.trial) for link in links), default=0))
    body = _axes(frame, axes, titles)
    body += "".join(_polyline(frame, axes, link) for link in links)
    ends = sorted((*_pixel(frame, axes, link.points[-1])[::-1], link.trial) for link in links)
    for (_, x, name), y in zip(ends, _separate([y for y, _, _ in ends]), strict=True):
        body += f'<text x="{x + 11:.1f}" y="{y + 4:.1f}">{escape(name)}</text>' if name else ""
    for mark in marks:
        for point in mark.points:
            x, y = _pixel(frame, axes, point)
            body += f'<circle {_attributes(mark, "dot")} cx="{x:.1f}" cy="{y:.1f}" r="5">{_title(mark)}</circle>'
    return _svg(frame, body)


def curves(marks: Sequence[Mark], *, axes: tuple[Scale, Scale], titles: tuple[str, str]) -> str:
    """A line chart of the marks, with a dot at the end of each line."""
    frame = Frame(960, 340)
    body = _axes(frame, axes, titles)
    for mark in marks:
        x, y = _pixel(frame, axes, mark.points[-1])
        body += _polyline(frame, axes, mark)
        body += f'<circle {_attributes(mark, "dot")} cx="{x:.1f}" cy="{y:.1f}" r="3.5">{_title(mark)}</circle>'
    return _svg(frame, body)


def parallel(marks: Sequence[Mark], scales: Sequence[Scale], *, titles: Sequence[str]) -> str:
    """Parallel coordinates: one axis per scale, one line per mark; points are (index of the axis, position)."""
    frame = Frame(960, 320, left=70, right=70, top=34, bottom=14)
    body = ""
    for index, (scale, title) in enumerate(zip(scales, titles, strict=True)):
        share = index / max(1, len(scales) - 1)
        (x, low), (_, high) = frame.at(share, 0), frame.at(share, 1)
        body += f'<line class="axis" x1="{x:.1f}" y1="{low:.1f}" x2="{x:.1f}" y2="{high:.1f}"/>'
        anchor = "start" if index == 0 else "end" if index == len(scales) - 1 else "middle"
        edge = {"start": 4, "end": frame.width - 4, "middle": x}[anchor]
        body += f'<text class="title" x="{edge:.1f}" y="16" text-anchor="{anchor}">{escape(title)}</text>'
        for position, text in scale.ticks():
            y = frame.at(share, position)[1]
            body += f'<text class="halo" x="{x - 7:.1f}" y="{y + 4:.1f}" text-anchor="end">{escape(text)}</text>'
            body += f'<line class="axis" x1="{x - 4:.1f}" y1="{y:.1f}" x2="{x:.1f}" y2="{y:.1f}"/>'
    unit = (Scale(0, max(1, len(scales) - 1)), Scale())
    return _svg(frame, "".join(_polyline(frame, unit, mark) for mark in marks) + body)


def bars(marks: Sequence[Mark], title: str) -> str:
    """A horizontal bar per mark, of the length x of its only point."""
    frame = Frame(960, _ROW * len(marks) + 46, left=86, right=64, top=4)
    longest = max((mark.points[0][0] for mark in marks), default=1.0) or 1.0
    body = f'<text class="title" x="{frame.left}" y="{frame.height - 8}">{escape(title)}</text>'
    for index, mark in enumerate(marks):
        y, length = frame.top + index * _ROW, mark.points[0][0]
        x = frame.at(length / longest, 0)[0]
        middle = y + _ROW / 2 + 3
        body += (
            f'<text x="{frame.left - 8}" y="{middle:.1f}" text-anchor="end">{escape(mark.trial)}</text>'
            f'<rect {_attributes(mark, "bar")} x="{frame.left}" y="{y + 2}" width="{max(x - frame.left, 1):.1f}" '
            f'height="{_ROW - 4}" rx="2">{_title(mark)}</rect>'
            f'<text x="{x + 6:.1f}" y="{middle:.1f}">{tick_label(round(length))}</text>'
        )
    return _svg(frame, body)


def _separate(positions: Sequence[float], distance: float = 13.0) -> list[float]:
    """Ascending positions, increased where necessary to be at least `distance` apart."""
    found: list[float] = []
    for position in positions:
        found.append(max(position, found[-1] + distance) if found else position)
    return found


def _axes(frame: Frame, axes: tuple[Scale, Scale], titles: tuple[str, str]) -> str:
    body = ""
    for position, text in axes[1].ticks():
        (x, y), (end, _) = frame.at(0, position), frame.at(1, position)
        body += f'<line class="grid" x1="{x:.1f}" y1="{y:.1f}" x2="{end:.1f}" y2="{y:.1f}"/>'
        body += f'<text x="{x - 7:.1f}" y="{y + 4:.1f}" text-anchor="end">{escape(text)}</text>'
    (left, low), (right, _) = frame.at(0, 0), frame.at(1, 0)
    body += f'<line class="axis" x1="{left:.1f}" y1="{low:.1f}" x2="{right:.1f}" y2="{low:.1f}"/>'
    for position, text in axes[0].ticks():
        x = frame.at(position, 0)[0]
        body += f'<line class="axis" x1="{x:.1f}" y1="{low:.1f}" x2="{x:.1f}" y2="{low + 4:.1f}"/>'
        body += f'<text x="{x:.1f}" y="{low + 17:.1f}" text-anchor="middle">{escape(text)}</text>'
    middle = (left + right) / 2
    body += (
        f'<text class="title" x="{middle:.1f}" y="{frame.height - 5}" text-anchor="middle">{escape(titles[0])}</text>'
    )
    return body + (f'<text class="title" x="4" y="{frame.top - 1}">{escape(titles[1])}</text>' if titles[1] else "")


def _pixel(frame: Frame, axes: tuple[Scale, Scale], point: Point) -> Point:
    return frame.at(axes[0].position(point[0]), axes[1].position(point[1]))


def _polyline(frame: Frame, axes: tuple[Scale, Scale], mark: Mark) -> str:
    pixels = (_pixel(frame, axes, point) for point in mark.points)
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in pixels)
    return f'<polyline {_attributes(mark, "line")} points="{path}">{_title(mark)}</polyline>'


def _attributes(mark: Mark, kind: str) -> str:
    identity = f' data-trial="{escape(mark.trial)}"' if mark.look != "link" else ""
    return f'class="{kind} {mark.look}"{identity}'


def _title(mark: Mark) -> str:
    return f"<title>{escape(mark.tooltip)}</title>"


def _svg(frame: Frame, body: str) -> str:
    return f'<svg viewBox="0 0 {frame.width} {frame.height}" role="img">{body}</svg>\n'
