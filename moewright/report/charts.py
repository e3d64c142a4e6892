"""Charts as Vega-Lite specifications: a browser draws them, to be zoomed and hovered over; a file can hold them drawn.

Colours are variables of the page's style sheet, which has a light and a dark set.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from moewright.report.text import format_value, printable

DASHES: Final = ([1, 0], [7, 4], [2, 4], [10, 4, 2, 4])
"""One for each line colour of the style sheet, so that lines can be told apart without colours."""

SHADES: Final = (
    (0.25, "under ¼"),
    (0.5, "¼ to ½"),
    (0.8, "½ to 0.8"),
    (1.25, "0.8 to 1.25"),
    (2.0, "1.25 to 2"),
    (4.0, "2 to 4"),
    (math.inf, "over 4"),
)
"""Upper end and name of each shade of the heat map: loads as factors of the even load."""

NO_TOKEN: Final = "no token"

CONFIG: Final = {
    "background": None,
    "font": "system-ui, sans-serif",
    "axis": {
        "labelColor": "var(--soft)",
        "titleColor": "var(--text)",
        "titleFontWeight": "normal",
        "gridColor": "var(--edge)",
        "domainColor": "var(--soft)",
        "tickColor": "var(--soft)",
        "labelFontSize": 12,
        "titleFontSize": 13,
    },
    "legend": {"labelColor": "var(--text)", "titleColor": "var(--text)", "labelFontSize": 13, "titleFontSize": 13},
    "view": {"stroke": None},
}

ZOOM: Final = {
    "name": "view",
    "select": {"type": "interval", "zoom": "wheel![event.ctrlKey || event.metaKey]"},
    "bind": "scales",
}
"""Drag to move, Ctrl and wheel or a pinch to zoom, double click to see all again; a wheel alone scrolls the page."""

SCRIPT: Final = """
for (const place of document.querySelectorAll(".chart")) {
  const spec = JSON.parse(place.nextElementSibling.textContent);
  const options = {mode: "vega-lite", renderer: "svg", ast: true, tooltip: {theme: "page"},
                   actions: {export: {svg: true, png: false}, source: false, compiled: false, editor: false}};
  vegaEmbed(place, spec, options);
}
"""


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a chart."""

    name: str
    points: Sequence[tuple[float, float]]
    """(x, y), in the order of x. A y that is not finite leaves a gap."""
    marks: bool = False
    """Draw a dot at each point: for the few points of an evaluation."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A picture with its title."""

    title: str
    spec: Mapping[str, Any]
    """Vega-Lite; its `description` says in words what the picture shows."""

    def svg(self, *, width: int = 820) -> str:
        """The picture, `width` pixels wide within its axes, for readers that run no script."""
        import vl_convert

        return vl_convert.vegalite_to_svg({**self.spec, "width": width})


@functools.cache
def script() -> str:
    """The program that draws the charts of a page, with all that it needs."""
    import vl_convert

    return vl_convert.javascript_bundle(SCRIPT)


def line_chart(title: str, *, series: Sequence[Series], x_label: str, y_label: str) -> Chart:
    """A chart of up to four lines that share both axes. ValueError if no point is finite or there are more lines."""
    if len(series) > len(DASHES):
        raise ValueError(f"a chart has {len(DASHES)} line colours, and {len(series)} series were given")
    rows = [
        {"series": line.name, "x": x, "y": y if math.isfinite(y) else None, "mark": line.marks}
        for line in series
        for x, y in line.points
    ]
    if all(row["y"] is None for row in rows):
        raise ValueError(f"chart {title!r}: no series has a finite point")
    names = [line.name for line in series]
    colours, dashes = [f"var(--s{index})" for index in range(len(series))], DASHES[: len(series)]
    x_axis = {"tickMinStep": 1} if all(float(x).is_integer() for line in series for x, _ in line.points) else {}
    shown = [{"field": name, "title": label} for name, label in (("series", " "), ("x", x_label), ("y", y_label))]
    spec = {
        "description": f"{title}. {'; '.join(map(_course, series))}",
        "width": "container",
        "height": 300,
        "data": {"values": rows},
        "encoding": {
            "x": _number("x", x_label, axis=x_axis, scale={"zero": False, "nice": False, "padding": 8}),
            "y": _number("y", y_label, scale={"zero": False}),
            "color": _colour("series", names, colours, symbolType="stroke", symbolSize=600, columns=2),
            "strokeDash": {"field": "series", "type": "nominal", "scale": {"domain": names, "range": dashes}},
        },
        "layer": [
            {"mark": {"type": "line", "clip": True}, "params": [ZOOM]},
            {
                # Each point can be hovered over; those without a mark are not seen.
                "mark": {"type": "point", "filled": True, "size": 70, "clip": True},
                "encoding": {
                    "strokeDash": {"value": [1, 0]},
                    "opacity": {"condition": {"test": "datum.mark", "value": 1}, "value": 0},
                    "tooltip": [field | {"type": "nominal"} for field in shown],
                },
            },
        ],
        "config": CONFIG,
    }
    return Chart(title=title, spec=printable(spec))


def heat_map(title: str, *, rows: Mapping[int, Sequence[float]], row_name: str, column_name: str) -> Chart:
    """Loads as factors of the even load 1.0: one row for each key, one cell for each value; a cell of 0 is empty.

    ValueError if there is no cell, if rows differ in length, or if a value is negative or not finite.
    """
    columns = len(next(iter(rows.values()), ()))
    if not columns or any(len(loads) != columns for loads in rows.values()):
        raise ValueError(f"heat map {title!r}: every row needs the same number of cells, at least one")
    cells: list[dict[str, Any]] = []
    for row, loads in rows.items():
        for column, load in enumerate(loads):
            words = f"{row_name} {row}, {column_name} {column}: {format_value(float(load))}"
            if not (math.isfinite(load) and load >= 0):
                raise ValueError(f"heat map {title!r}: {words} is no load")
            cells.append({"row": row, "column": column, "load": load, "shade": _shade(load), "words": words})
    low, high = (end(cells, key=lambda cell: float(cell["load"])) for end in (min, max))
    spec = {
        "description": f"{title}. Highest: {high['words']}; lowest: {low['words']}",
        "width": "container",
        "height": max(120, 18 * (max(rows) - min(rows) + 1)),
        "data": {"values": cells},
        # Both axes are numbers, with cells from half below to half above, so that the picture can be zoomed.
        "transform": [
            {"calculate": f"datum.{axis} {sign} 0.5", "as": f"{axis}{end}"}
            for axis in ("row", "column")
            for sign, end in (("-", "_start"), ("+", "_end"))
        ],
        "params": [ZOOM],
        "mark": {"type": "rect", "clip": True, "strokeWidth": 1},
        "encoding": {
            "x": _cells("column", column_name, 0, columns - 1),
            "x2": {"field": "column_end"},
            "y": _cells("row", row_name, min(rows), max(rows), reverse=True),
            "y2": {"field": "row_end"},
            "color": _colour(
                "shade",
                [NO_TOKEN, *(name for _, name in SHADES)],
                ["transparent", *(f"var(--h{index})" for index in range(len(SHADES)))],
                symbolType="square",
                symbolSize=180,
                symbolStrokeColor="var(--soft)",
                columns=4,
            ),
            "stroke": {"value": "var(--card)"},
            "tooltip": {"field": "words", "type": "nominal"},
            "description": {"field": "words", "type": "nominal"},
        },
        "config": CONFIG,
    }
    return Chart(title=title, spec=printable(spec))


def _number(field: str, title: str, **settings: Any) -> dict[str, Any]:
    """An axis of numbers."""
    return {"field": field, "type": "quantitative", "title": title, **settings}


def _colour(field: str, names: Sequence[str], colours: Sequence[str], **legend: Any) -> dict[str, Any]:
    """A colour for each name, explained above the picture."""
    scale = {"domain": names, "range": colours}
    return {"field": field, "type": "nominal", "scale": scale, "legend": {"orient": "top", "title": None, **legend}}


def _cells(field: str, title: str, first: int, last: int, *, reverse: bool = False) -> dict[str, Any]:
    """The axis of cells numbered from `first` to `last`, each of length 1 around its number."""
    scale = {"domain": [first - 0.5, last + 0.5], "nice": False, "zero": False, "reverse": reverse}
    return _number(f"{field}_start", title, scale=scale, axis={"tickMinStep": 1, "grid": False, "format": "d"})


def _shade(load: float) -> str:
    return next((name for end, name in SHADES if load < end), "") if load else NO_TOKEN


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
