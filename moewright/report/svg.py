"""Charts as inline SVG: pure functions from numbers to an HTML ``<figure>``.

A chart is drawn twice, for a wide and for a narrow page, and the style sheet of ``moewright.report.html`` shows one
of the two: scaling one drawing would make its text unreadable on a telephone. All colours are classes of that style
sheet, which has a light and a dark set.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from moewright.report.numbers import format_ticks, format_value, nice_ticks
from moewright.report.text import escape

WIDTHS = {"wide": 820, "narrow": 350}  # pixels of the two drawings
CHARACTER = 7.0  # width in pixels of a digit at the font size of the charts (12 px), rounded up
SERIES = 4  # line colours in the style sheet

# Shades of the heat map: the load is a factor of the ideal, and a shade is half a doubling wide.
SHADES = (-4, -3, -2, -1, 0, 1, 2, 3, 4)


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a chart."""

    name: str
    points: Sequence[tuple[float, float]]
    """(x, y), in the order of x. A y that is not finite leaves a gap."""
    marks: bool = False
    """Draw a dot at each point: for the few points of an evaluation."""


def line_chart(title: str, *, series: Sequence[Series], x_label: str, y_label: str) -> str:
    """A chart of up to four lines that share both axes. ValueError if no point is finite or there are more lines."""
    if len(series) > SERIES:
        raise ValueError(f"a chart has {SERIES} line colours, and {len(series)} series were given")
    finite = [point for line in series for point in line.points if math.isfinite(point[1])]
    if not finite:
        raise ValueError(f"chart {title!r}: no series has a finite point")
    xs, ys = [x for x, _ in finite], [y for _, y in finite]
    y_ticks = nice_ticks(min(ys), max(ys))
    whole = all(x == int(x) for x in xs)

    def draw(width: int) -> tuple[int, str]:
        x_ticks = nice_ticks(min(xs), max(xs), count=9 if width == WIDTHS["wide"] else 5, whole=whole)
        frame = _Frame.around(width, (min(xs), max(xs)), x_ticks, y_ticks)
        lines = "".join(_line(line, index, frame) for index, line in enumerate(series))
        return frame.height, _axes(frame, x_label, y_label) + lines

    description = "; ".join(_course(line) for line in series)
    legend = "".join(
        f'<li><svg class="swatch" viewBox="0 0 28 10" width="28" height="10" aria-hidden="true">'
        f'<path class="line s{index}" d="M0 5H28"/>'
        + (f'<circle class="mark s{index}" cx="14" cy="5" r="4"/>' if line.marks else "")
        + f"</svg>{escape(line.name)}</li>"
        for index, line in enumerate(series)
    )
    return _figure(title, description, f'<ul class="legend">{legend}</ul>', draw)


def heat_map(title: str, *, rows: Mapping[int, Sequence[float]], row_name: str, column_name: str) -> str:
    """Loads as factors of the ideal 1.0: one row for each key, one cell for each value; 0 is drawn as an empty cell.

    ValueError if there is no cell, if rows differ in length, or if a value is negative or not finite.
    """
    columns = len(next(iter(rows.values()), ()))
    cells = [(row, column, load) for row, loads in rows.items() for column, load in enumerate(loads)]
    if not cells or any(len(loads) != columns for loads in rows.values()):
        raise ValueError(f"heat map {title!r}: every row needs the same number of cells, at least one")
    for row, column, load in cells:
        if not (math.isfinite(load) and load >= 0):
            raise ValueError(f"heat map {title!r}: {row_name} {row}, {column_name} {column} is {load}")

    def draw(width: int) -> tuple[int, str]:
        left, top = 12 + CHARACTER * max(len(str(row)) for row in rows), 36
        cell_width = min(44.0, (width - left - 4) / columns)
        cell_height = 16 if len(rows) > 12 else 26
        every = math.ceil((CHARACTER * len(str(columns)) + 6) / cell_width)
        parts = [f'<text x="0" y="12">{escape(row_name)} (down), {escape(column_name)} (across)</text>']
        for column in range(0, columns, every):
            x = left + (column + 0.5) * cell_width
            parts.append(f'<text class="tick" x="{x:.1f}" y="{top - 5}" text-anchor="middle">{column}</text>')
        for index, (row, loads) in enumerate(rows.items()):
            y = top + index * cell_height
            middle = y + cell_height / 2 + 4
            parts.append(f'<text class="tick" x="{left - 6:.1f}" y="{middle:.1f}" text-anchor="end">{row}</text>')
            for column, load in enumerate(loads):
                parts.append(
                    f'<rect class="{_shade(load)}" x="{left + column * cell_width:.1f}" y="{y}"'
                    f' width="{cell_width - 1:.1f}" height="{cell_height - 1}"><title>'
                    f"{escape(row_name)} {row}, {escape(column_name)} {column}: {format_value(float(load))}"
                    f" of the ideal share</title></rect>"
                )
        return top + len(rows) * cell_height + 4, "".join(parts)

    extremes = (("Highest", max(cells, key=lambda cell: cell[2])), ("lowest", min(cells, key=lambda cell: cell[2])))
    description = ", ".join(
        f"{which} {format_value(float(load))} ({row_name} {row}, {column_name} {column})"
        for which, (row, column, load) in extremes
    )
    return _figure(title, description, _scale(), draw)


@dataclass(frozen=True, kw_only=True)
class _Frame:
    """The rectangle that the axes enclose, in pixels, and the numbers at its edges."""

    width: int
    height: int
    left: float
    right: float
    top: float
    bottom: float
    first: float
    last: float
    x_ticks: list[float]
    y_ticks: list[float]

    @staticmethod
    def around(width: int, ends: tuple[float, float], x_ticks: list[float], y_ticks: list[float]) -> "_Frame":
        """The x axis runs from end to end of the data (over its ticks, for a single x), the y axis over its ticks."""
        first, last = ends if ends[0] < ends[1] else (x_ticks[0], x_ticks[-1])
        height = 320 if width == WIDTHS["wide"] else 260
        left = 12 + CHARACTER * max(len(label) for label in format_ticks(y_ticks))
        # Half of the last tick's label stands to the right of the axis.
        right = width - 6 - CHARACTER * len(format_ticks(x_ticks)[-1]) / 2
        return _Frame(
            width=width,
            height=height,
            left=left,
            right=right,
            top=30,
            bottom=height - 44,
            first=first,
            last=last,
            x_ticks=x_ticks,
            y_ticks=y_ticks,
        )

    def x(self, value: float) -> float:
        return self.left + (value - self.first) / (self.last - self.first) * (self.right - self.left)

    def y(self, value: float) -> float:
        first, last = self.y_ticks[0], self.y_ticks[-1]
        return self.bottom - (value - first) / (last - first) * (self.bottom - self.top)


def _axes(frame: _Frame, x_label: str, y_label: str) -> str:
    parts = [f'<text x="0" y="14">{escape(y_label)}</text>']
    for tick, label in zip(frame.y_ticks, format_ticks(frame.y_ticks), strict=True):
        y = frame.y(tick)
        parts.append(f'<path class="grid" d="M{frame.left:.1f} {y:.1f}H{frame.right:.1f}"/>')
        parts.append(f'<text class="tick" x="{frame.left - 6:.1f}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    for tick, label in zip(frame.x_ticks, format_ticks(frame.x_ticks), strict=True):
        if not frame.first <= tick <= frame.last:
            continue
        x = frame.x(tick)
        parts.append(f'<path class="axis" d="M{x:.1f} {frame.bottom:.1f}v5"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{frame.bottom + 18:.1f}" text-anchor="middle">{label}</text>')
    parts.append(f'<path class="axis" d="M{frame.left:.1f} {frame.bottom:.1f}H{frame.right:.1f}"/>')
    middle = (frame.left + frame.right) / 2
    parts.append(f'<text x="{middle:.1f}" y="{frame.height - 6}" text-anchor="middle">{escape(x_label)}</text>')
    return "".join(parts)


def _line(line: Series, index: int, frame: _Frame) -> str:
    path = ""
    for finite, run in itertools.groupby(line.points, key=lambda point: math.isfinite(point[1])):
        if finite:
            path += "M" + "L".join(f"{frame.x(x):.1f} {frame.y(y):.1f}" for x, y in run)
    marks = "".join(
        f'<circle class="mark s{index}" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="4"><title>'
        f"{escape(line.name)}, {format_value(x)}: {format_value(float(y))}</title></circle>"
        for x, y in line.points
        if line.marks and math.isfinite(y)
    )
    return (f'<path class="line s{index}" d="{path}"/>' if path else "") + marks


def _course(line: Series) -> str:
    """Where a line starts and ends, in words, for those who do not see it."""
    finite = [(x, y) for x, y in line.points if math.isfinite(y)]
    if not finite:
        return f"{line.name}: no finite value"
    (x_first, y_first), (x_last, y_last) = finite[0], finite[-1]
    return (
        f"{line.name}: from {format_value(float(y_first))} at {format_value(x_first)}"
        f" to {format_value(float(y_last))} at {format_value(x_last)}"
    )


def _shade(load: float) -> str:
    if load == 0:
        return "cell empty"
    return f"cell h{max(SHADES[0], min(SHADES[-1], round(2 * math.log2(load))))}"


def _scale() -> str:
    """The shades in a row, from half to double and beyond, and the cell of an expert that no token reached."""
    names = {-4: "≤ ¼", -2: "½", 0: "1", 2: "2", 4: "≥ 4"}
    parts = []
    for index, shade in enumerate(SHADES):
        x = 2 + 26 * index
        parts.append(f'<rect class="cell h{shade}" x="{x}" y="1" width="25" height="14"/>')
        if shade in names:
            parts.append(f'<text class="tick" x="{x + 12.5}" y="29" text-anchor="middle">{names[shade]}</text>')
    parts.append('<rect class="cell empty" x="262.5" y="1.5" width="25" height="13"/>')
    parts.append('<text class="tick" x="275" y="29" text-anchor="middle">no token</text>')
    return (
        '<svg class="scale" role="img" viewBox="0 0 306 34" width="306" height="34">'
        "<title>Colours: from a quarter of the ideal load or less (blue), over the ideal (grey), to four times"
        f" that or more (orange); an outlined cell got no token</title>{''.join(parts)}</svg>"
    )


def _figure(title: str, description: str, legend: str, draw: Callable[[int], tuple[int, str]]) -> str:
    drawings = ""
    for name, width in WIDTHS.items():
        height, content = draw(width)
        drawings += (
            f'<svg class="chart {name}" role="img" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
            f"<title>{escape(title)}</title><desc>{escape(description)}</desc>{content}</svg>"
        )
    return f"<figure><figcaption>{escape(title)}</figcaption>{legend}{drawings}</figure>"
