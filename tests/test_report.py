"""The report: one file, safe with any text, that fetches nothing; its charts; values and progress on a terminal."""

import base64
import hashlib
import io
import itertools
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from moewright.report import page, progress
from moewright.report.charts import DASHES, SHADES, Chart, Series, heat_map, line_chart
from moewright.report.page import render, write_page
from moewright.report.progress import Progress
from moewright.report.text import format_value, printable

NASTY = "<script>alert('1')</script> & \"quotes\" ]]> \x00\x1b[0m \ud800 é 専門家"
SHOWN = "<script>alert('1')</script> & \"quotes\" ]]> \ufffd\ufffd[0m \ufffd é 専門家"
LOSS = [(step, 4.0 / step) for step in range(1, 33)]
LOADS = {0: [0.0, 1.0, 2.0, 1.0], 3: [0.1, 9.0, 0.5, 1.5]}
TEMPLATE = """
{% extends "base.html" %}
{% from "pieces.html" import facts, picture, sample, table %}
{% block title %}{{ text }}{% endblock %}
{% block summary %}<p>{{ text }}</p>{% endblock %}
{% block sections %}
{{ facts({text: text}) }}
{{ table(text, [text, text], [[text, text], ["second", "row"]], 1) }}
{{ sample(text, text, text) }}
{% for chart in charts.values() %}{{ picture(chart) }}{% endfor %}
{% endblock %}
"""


class Document(HTMLParser):
    """Every element with its attributes and the text directly in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[list[str]] = []
        self.open: list[int] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        self.texts.append([])
        if tag not in ("meta", "br"):
            self.open.append(len(self.elements) - 1)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        self.texts.append([])

    def handle_endtag(self, tag: str) -> None:
        assert self.elements[self.open.pop()][0] == tag, f"{tag} closes another element"

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts[self.open[-1]].append(data)

    def of(self, tag: str) -> list[str]:
        return ["".join(texts) for (name, _), texts in zip(self.elements, self.texts, strict=True) if name == tag]


@pytest.fixture
def template(tmp_path: Path) -> Path:
    path = tmp_path / "page.html"
    path.write_text(TEMPLATE, encoding="utf-8")
    return path


def charts(text: str) -> dict[str, Chart]:
    return {
        "loss": line_chart(text, series=[Series(name=text, points=LOSS)], x_label=text, y_label=text),
        "load": heat_map(text, rows=LOADS, row_name=text, column_name=text),
    }


def test_every_text_is_escaped(template: Path) -> None:
    text = render(template, charts=charts(NASTY), text=NASTY)
    document = Document(text)
    assert document.open == []
    for tag in ("title", "h1", "p", "dt", "dd", "b"):
        assert set(document.of(tag)) == {SHOWN}, tag
    assert SHOWN in document.of("th")
    assert document.of("td") == [SHOWN, "row"]
    assert [caption.removesuffix(" ") for caption in document.of("figcaption")] == [SHOWN] * 4
    assert SHOWN in document.of("text"), "the drawn charts have the text, too"
    text.encode("utf-8")


def test_nothing_is_fetched_and_one_script_runs(template: Path) -> None:
    document = Document(render(template, charts=charts("load"), text="text"))
    names = {name for _, attributes in document.elements for name in attributes}
    assert not names & {"src", "href", "xlink:href", "srcset", "action", "data"}
    assert not [name for name in names if name.startswith("on")]
    assert not {tag for tag, _ in document.elements} & {"link", "img", "iframe", "object", "embed", "form", "base"}
    [policy] = [attributes["content"] for tag, attributes in document.elements if "http-equiv" in attributes]
    [data, more_data, script] = document.of("script")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert "vegaEmbed" not in data + more_data


def test_a_page_without_charts_has_no_script(template: Path) -> None:
    text = render(template, charts={}, text="text")
    assert Document(text).of("script") == []
    assert len(text) < 10_000


@given(st.text(st.characters(codec=None)))
def test_what_is_printable_can_be_parsed_and_encoded(text: str) -> None:
    escaped = printable(text).replace("&", "&amp;").replace("<", "&lt;")
    element = ElementTree.fromstring(f"<a>{escaped}</a>".encode())
    assert len(element.text or "") == len(text)


def drawn(chart: Chart, *, width: int = 400) -> ElementTree.Element:
    return ElementTree.fromstring(chart.svg(width=width))


def marks(root: ElementTree.Element, kind: str) -> list[ElementTree.Element]:
    return [element for element in root.iter() if element.get("aria-roledescription") == kind]


def test_a_line_chart_draws_lines_gaps_and_marks_inside_its_frame() -> None:
    series = [
        Series(name="dense", points=LOSS),
        Series(name="held out", points=[(0, 4.5), (1, 4.0), (16, math.nan), (24, 2.0), (32, 1.0)], marks=True),
    ]
    chart = line_chart("Loss", series=series, x_label="step", y_label="nats")
    assert chart.spec["description"] == ("Loss. dense: from 4 at 1 to 0.125 at 32; held out: from 4.5 at 0 to 1 at 32")
    root = drawn(chart)
    dense, held_out = (line.get("d", "") for line in marks(root, "line mark"))
    assert dense.count("M") == 1
    assert held_out.count("M") == 2, "a value that is not finite leaves a gap"
    points = [tuple(map(float, point)) for point in re.findall(r"([\d.-]+),([\d.-]+)", dense)]
    assert len(points) == len(LOSS)
    assert all(0 <= x <= 400 and 0 <= y <= 300 for x, y in points)
    assert all(before[0] < after[0] and before[1] < after[1] for before, after in itertools.pairwise(points))
    seen = [mark.get("opacity", "1") for mark in marks(root, "point")]
    assert (seen.count("1"), seen.count("0")) == (4, len(LOSS))


def test_a_line_chart_of_one_point() -> None:
    root = drawn(line_chart("Loss", series=[Series(name="a", points=[(5, 2.0)])], x_label="x", y_label="y"))
    assert "NaN" not in ElementTree.tostring(root, encoding="unicode")


def test_a_line_chart_refuses_what_it_cannot_draw() -> None:
    with pytest.raises(ValueError, match="no series has a finite point"):
        line_chart("Loss", series=[Series(name="a", points=[(1, math.inf)])], x_label="x", y_label="y")
    with pytest.raises(ValueError, match="4 line colours, and 5 series"):
        line_chart("Loss", series=[Series(name="a", points=LOSS)] * 5, x_label="x", y_label="y")


def test_a_heat_map_shades_by_factors_of_the_even_load() -> None:
    chart = heat_map("Load", rows=LOADS, row_name="layer", column_name="expert")
    cells = {cell.get("aria-label"): cell.get("fill") for cell in marks(drawn(chart), "rect mark")}
    assert cells == {
        "layer 0, expert 0: 0": None,
        "layer 0, expert 1: 1": "var(--h3)",
        "layer 0, expert 2: 2": "var(--h5)",
        "layer 0, expert 3: 1": "var(--h3)",
        "layer 3, expert 0: 0.1": "var(--h0)",
        "layer 3, expert 1: 9": "var(--h6)",
        "layer 3, expert 2: 0.5": "var(--h2)",
        "layer 3, expert 3: 1.5": "var(--h4)",
    }
    assert chart.spec["description"] == "Load. Highest: layer 3, expert 1: 9; lowest: layer 0, expert 0: 0"


@pytest.mark.parametrize("rows", [{}, {0: []}, {0: [1.0], 1: [1.0, 2.0]}, {0: [math.nan]}, {0: [-1.0]}])
def test_a_heat_map_refuses_what_it_cannot_draw(rows: dict[int, list[float]]) -> None:
    with pytest.raises(ValueError, match="heat map 'Load'"):
        heat_map("Load", rows=rows, row_name="layer", column_name="expert")


def test_the_file_is_written_whole_or_not_at_all(
    tmp_path: Path, template: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run" / "report.html"
    assert write_page(path, template, charts={}, text="old text") == path
    before = path.read_bytes()

    def fail(self: Path, target: Path) -> Path:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            write_page(path, template, charts={}, text="new text")
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
    write_page(path, template, charts={}, text="new text")
    assert path.read_bytes() == before.replace(b"old text", b"new text")


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


# Colours


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_contrast(scheme: int) -> None:
    """WCAG 2: 4.5 for text, 3 for the lines of a chart and its marks."""
    style = (page.TEMPLATES / "style.css").read_text(encoding="utf-8")
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", re.findall(r":root \{(.*?)\}", style, re.DOTALL)[scheme]))
    for text in ("text", "soft", "accent"):
        for ground in ("page", "card", "tint"):
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    for index in range(len(DASHES)):
        assert contrast(colours[f"s{index}"], colours["card"]) >= 3, index
    assert len({colours[f"h{index}"] for index in range(len(SHADES))}) == len(SHADES)


def contrast(first: str, second: str) -> float:
    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(first), luminance(second)))
    return (light + 0.05) / (dark + 0.05)


# Progress


class Clock:
    """Stands for the time module: a time that the test sets."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def record(step: int) -> dict[str, float]:
    return {"step": step, "loss": 2.5, "tokens_per_second": 1234.5, "load_imbalance": 1.5}


def test_a_log_tells_a_run_at_once_and_then_now_and_then(clock: Clock) -> None:
    log = io.StringIO()
    with Progress(Console(file=log, width=200)) as shown:
        shown.note("resuming after step 10")
        shown.begin(step=10, steps=20)
        for step in range(11, 21):
            clock.now += 10.0
            shown.stepped(record(step))
            if step == 13:
                shown.evaluated({"step": 13, "loss": 2.25, "tokens": 4096})
    start, held_out = "loss 2.5000  ", "loss 2.5000  held-out 2.2500  "
    rate = "1,234 tokens/s  load max/mean 1.50  ETA 0:0"
    assert log.getvalue().splitlines() == [
        "resuming after step 10",
        f"step 11/20  {start}{rate}1:30",
        "step 13: held-out loss 2.2500 over 4,096 tokens",
        f"step 14/20  {held_out}{rate}1:00",
        f"step 17/20  {held_out}{rate}0:30",
        f"step 20/20  {held_out}{rate}0:00",
    ]


def test_a_log_tells_of_other_tasks_only_if_they_take_long(clock: Clock) -> None:
    log = io.StringIO()
    with Progress(Console(file=log, width=200), task="writing") as shown:
        advance = shown.track(100)
        clock.now += 20.0
        advance(25)
        assert log.getvalue() == ""
        clock.now += 20.0
        advance(25)
        clock.now += 5.0
        advance(50)
    assert log.getvalue().splitlines() == ["writing 50 %  ETA 0:00:40", "writing 100 %  ETA 0:00:00"]


def test_a_terminal_has_one_live_line() -> None:
    terminal = io.StringIO()
    with Progress(Console(file=terminal, force_terminal=True, width=200), task="scoring") as shown:
        shown.track(4)(2)
    assert "scoring" in terminal.getvalue()
    assert "50%" in terminal.getvalue()
    assert "\x1b[" in terminal.getvalue()


def test_without_a_console_nothing_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(None) as shown:
        shown.begin(step=0, steps=1)
        shown.stepped(record(1))
        shown.note("done")
    assert capsys.readouterr() == ("", "")
