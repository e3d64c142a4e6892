"""The report: one file, safe with any text, well-formed, readable in light and dark."""

import itertools
import math
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moewright.report import html
from moewright.report.numbers import format_ticks, format_value, nice_ticks
from moewright.report.style import STYLE
from moewright.report.svg import WIDTHS
from moewright.report.text import escape

NASTY = "<script>alert('1')</script> & \"quotes\" ]]> \x00\x1b[0m \ud800 é 専門家"
LOSS = [(step, 4.0 / step) for step in range(1, 33)]
LOADS = {0: [0.0, 1.0, 2.0, 1.0], 3: [0.1, 9.0, 0.5, 1.5]}


def document(*pieces: str) -> ElementTree.Element:
    """The report with these pieces, through an XML parser: every tag must be closed and every text escaped."""
    text = html.render("title", summary="", sections=[html.Section(title="section", pieces=pieces)])
    return ElementTree.fromstring(text)


def texts(root: ElementTree.Element, tag: str) -> list[str]:
    return ["".join(element.itertext()) for element in root.iter(tag)]


def test_every_text_is_escaped() -> None:
    shown = "<script>alert('1')</script> & \"quotes\" ]]> \ufffd\ufffd[0m \ufffd é 専門家"
    sections = [
        html.Section(
            title=NASTY,
            pieces=[
                html.prose(NASTY),
                html.facts({NASTY: NASTY}),
                html.table(NASTY, header=[NASTY, NASTY], rows=[[NASTY, NASTY]]),
                html.sample(NASTY, prompt=NASTY, continuation=NASTY),
                html.line_chart(NASTY, series=[html.Series(name=NASTY, points=LOSS)], x_label=NASTY, y_label=NASTY),
                html.heat_map(NASTY, rows=LOADS, row_name=NASTY, column_name=NASTY),
            ],
        )
    ]
    text = html.render(NASTY, summary=NASTY, sections=sections)
    assert "<script" not in text
    root = ElementTree.fromstring(text)
    assert {texts(root, tag)[0] for tag in ("h1", "h2", "p", "dt", "dd", "td", "li")} == {shown}
    assert texts(root, "pre") == [shown + shown]
    assert set(texts(root, "figcaption")) == {shown}


@given(st.text(st.characters(codec=None)))
def test_escaped_text_can_be_parsed_and_encoded(text: str) -> None:
    element = ElementTree.fromstring(f'<a b="{escape(text)}">{escape(text)}</a>'.encode())
    assert element.text or not text
    assert escape(text).count("<") == 0


def test_nothing_is_fetched() -> None:
    text = html.render(
        "title",
        summary="summary",
        sections=[html.Section(title="s", pieces=[html.heat_map("load", rows=LOADS, row_name="r", column_name="c")])],
    )
    assert not re.search(r"https?:|//|url\(|@import|<script|<link|<img|<iframe| src=| href=| on[a-z]+=", text)
    assert "default-src 'none'" in text


def test_a_table_aligns_numbers() -> None:
    rows = [["base", 134515008, 14.2312, None], ["trained", 7, 12.1, 0.5]]
    root = document(html.table("results", header=["model", "parameters", "perplexity", "error"], rows=rows, best=1))
    assert texts(root, "td") == ["134,515,008", "14.23", "-", "7", "12.10", "0.5"]
    assert texts(root, "tr")[2].startswith("trained")
    assert [row.get("class") for row in root.iter("tr")] == [None, None, "best"]
    assert all(cell.get("class") == "number" for cell in root.iter("td"))
    assert [cell.get("class") for cell in root.iter("th")] == [None, "number", "number", "number", None, None]
    with pytest.raises(ValueError, match="a row has 1 cells, the header 2"):
        html.table("t", header=["a", "b"], rows=[["a"]])


def charts(root: ElementTree.Element) -> list[ElementTree.Element]:
    return [svg for svg in root.iter("svg") if (svg.get("class") or "").startswith("chart")]


def test_a_line_chart_stays_inside_its_frame() -> None:
    series = [
        html.Series(name="dense", points=LOSS),
        html.Series(name="held out", points=[(0, 4.5), (16, math.nan), (32, 1.0)], marks=True),
    ]
    root = document(html.line_chart("Loss", series=series, x_label="step", y_label="nats"))
    wide, narrow = charts(root)
    assert [int(svg.get("width", "0")) for svg in (wide, narrow)] == list(WIDTHS.values())
    for svg in (wide, narrow):
        assert texts(svg, "title")[0] == "Loss"
        assert texts(svg, "desc") == ["dense: from 4 at 1 to 0.125 at 32; held out: from 4.5 at 0 to 1 at 32"]
        width, height = int(svg.get("width", "0")), int(svg.get("height", "0"))
        paths = {path.get("class"): path.get("d", "") for path in svg.iter("path")}
        assert paths["line s0"].count("M") == 1
        assert paths["line s1"].count("M") == 2, "a value that is not finite leaves a gap"
        assert len(list(svg.iter("circle"))) == 2
        numbers = [tuple(map(float, pair)) for pair in re.findall(r"([\d.-]+) ([\d.-]+)", paths["line s0"])]
        assert len(numbers) == len(LOSS)
        assert all(0 <= x <= width and 0 <= y <= height for x, y in numbers)
        assert all(before[0] < after[0] and before[1] < after[1] for before, after in itertools.pairwise(numbers))


def test_a_line_chart_of_one_point() -> None:
    svg = document(html.line_chart("Loss", series=[html.Series(name="a", points=[(5, 2.0)])], x_label="x", y_label="y"))
    assert all("nan" not in (path.get("d") or "") for path in svg.iter("path"))


def test_a_line_chart_refuses_what_it_cannot_draw() -> None:
    with pytest.raises(ValueError, match="no series has a finite point"):
        html.line_chart("Loss", series=[html.Series(name="a", points=[(1, math.inf)])], x_label="x", y_label="y")
    with pytest.raises(ValueError, match="4 line colours, and 5 series"):
        html.line_chart("Loss", series=[html.Series(name="a", points=LOSS)] * 5, x_label="x", y_label="y")


def test_a_heat_map_shades_by_factors_of_the_ideal() -> None:
    root = document(html.heat_map("Load", rows=LOADS, row_name="layer", column_name="expert"))
    for svg in charts(root):
        cells = {texts(cell, "title")[0]: cell.get("class") for cell in svg.iter("rect")}
        assert cells == {
            "layer 0, expert 0: 0 of the ideal share": "cell empty",
            "layer 0, expert 1: 1 of the ideal share": "cell h0",
            "layer 0, expert 2: 2 of the ideal share": "cell h2",
            "layer 0, expert 3: 1 of the ideal share": "cell h0",
            "layer 3, expert 0: 0.1 of the ideal share": "cell h-4",
            "layer 3, expert 1: 9 of the ideal share": "cell h4",
            "layer 3, expert 2: 0.5 of the ideal share": "cell h-2",
            "layer 3, expert 3: 1.5 of the ideal share": "cell h1",
        }
        assert texts(svg, "desc") == ["Highest 9 (layer 3, expert 1), lowest 0 (layer 0, expert 0)"]
        right = max(float(cell.get("x", "0")) + float(cell.get("width", "0")) for cell in svg.iter("rect"))
        assert right <= int(svg.get("width", "0"))


@pytest.mark.parametrize("rows", [{}, {0: []}, {0: [1.0], 1: [1.0, 2.0]}, {0: [math.nan]}, {0: [-1.0]}])
def test_a_heat_map_refuses_what_it_cannot_draw(rows: dict[int, list[float]]) -> None:
    with pytest.raises(ValueError, match="heat map 'Load'"):
        html.heat_map("Load", rows=rows, row_name="layer", column_name="expert")


def test_the_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run" / "report.html"
    assert html.write_report(path, title="first", summary="", sections=[]) == path
    before = path.read_bytes()

    def fail(self: Path, target: Path) -> Path:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            html.write_report(path, title="second", summary="", sections=[])
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
    html.write_report(path, title="second", summary="", sections=[])
    assert path.read_bytes() == before.replace(b"first", b"second")


@given(low=st.floats(-1e9, 1e9), span=st.floats(0, 1e9), count=st.integers(2, 10), whole=st.booleans())
def test_ticks_cover_the_data_with_round_numbers(low: float, span: float, count: int, whole: bool) -> None:
    high = low + span
    ticks = nice_ticks(low, high, count=count, whole=whole)
    step = ticks[1] - ticks[0]
    assert 2 <= len(ticks) <= count + 2
    assert ticks[0] <= low + 1e-6 * step
    assert ticks[-1] >= high - 1e-6 * step
    assert f"{step:.0e}"[0] in "125"
    assert not whole or step >= 1 - 1e-9
    labels = format_ticks(ticks)
    assert len(set(labels)) == len(labels)
    for label, tick in zip(labels, ticks, strict=True):
        assert math.isclose(float(label.replace(",", "")), tick, abs_tol=1e-6 * step)


def test_ticks_by_example() -> None:
    assert nice_ticks(0, 32, count=9) == [0, 5, 10, 15, 20, 25, 30, 35]
    assert nice_ticks(1, 3, whole=True) == [1, 2, 3]
    assert format_ticks(nice_ticks(2.5, 3.7)) == ["2.5", "3.0", "3.5", "4.0"]
    assert format_ticks(nice_ticks(-0.02, 0.02, count=3)) == ["-0.02", "0.00", "0.02"]
    with pytest.raises(ValueError, match="has no ticks"):
        nice_ticks(0.0, math.inf)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (134515008, "134,515,008"),
        (14.2312, "14.23"),
        (3.2e-6, "3.2e-06"),
        (123456.7, "123,457"),
        (math.inf, "inf"),
        (True, "yes"),
        (None, "-"),
        ((0, 2.5), "0, 2.5"),
        ([3.5, *[3.0] * 7, 2.25], "3.5 ... 2.25 (9 values)"),
        (Path("a/b"), "a/b"),
    ],
)
def test_values_as_text(value: object, text: str) -> None:
    assert format_value(value) == text


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_contrast(scheme: int) -> None:
    """WCAG 2: 4.5 for text, 3 for the lines of a chart and its marks."""
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)[scheme]))
    for text in ("text", "soft", "accent"):
        for ground in ("page", "card", "tint"):
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    for line in ("s0", "s1", "s2", "s3"):
        assert contrast(colours[line], colours["card"]) >= 3, line


def contrast(first: str, second: str) -> float:
    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(first), luminance(second)))
    return (light + 0.05) / (dark + 0.05)
