"""One self-contained HTML file from results: no script, no font, no image, nothing that is fetched.

The pieces are pure functions that return HTML; ``write_report`` joins them and writes the file. Every text that is
handed in is escaped.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moewright.report.numbers import format_value
from moewright.report.style import STYLE
from moewright.report.svg import Series, heat_map, line_chart
from moewright.report.text import escape

__all__ = ["Section", "Series", "facts", "heat_map", "line_chart", "prose", "sample", "table", "write_report"]

# The browser is told what the file promises: it may not fetch or run anything.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading and what stands below it."""

    title: str
    pieces: Sequence[str]
    """HTML, as the functions of this module return it."""


def prose(text: str) -> str:
    """A paragraph; a blank line in ``text`` starts another."""
    return "".join(f"<p>{escape(part.strip())}</p>" for part in text.split("\n\n") if part.strip())


def facts(values: Mapping[str, Any]) -> str:
    """Names and values in two columns."""
    items = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(format_value(value))}</dd></div>" for name, value in values.items()
    )
    return f"<dl>{items}</dl>"


def table(caption: str, *, header: Sequence[str], rows: Sequence[Sequence[Any]], best: int | None = None) -> str:
    """Rows below a header; the first column names the row, columns of numbers stand right-aligned.

    ``best`` is the index of a row to set off from the others. ValueError if a row is shorter or longer than the header.
    """
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"table {caption!r}: a row has {len(row)} cells, the header {len(header)}")
    columns = [_column([row[index] for row in rows]) for index in range(len(header))]
    sides = [' class="number"' if numeric else "" for _, numeric in columns]
    head = "".join(f'<th scope="col"{side}>{escape(name)}</th>' for name, side in zip(header, sides, strict=True))
    body = ""
    for index in range(len(rows)):
        texts = [escape(column[index]) for column, _ in columns]
        cells = "".join(f"<td{side}>{text}</td>" for text, side in zip(texts[1:], sides[1:], strict=True))
        mark = ' class="best"' if index == best else ""
        body += f'<tr{mark}><th scope="row"{sides[0]}>{texts[0]}</th>{cells}</tr>'
    label = escape(caption)
    # A region that scrolls must be reachable by keyboard, hence tabindex and its name.
    return (
        f'<figure><figcaption>{label}</figcaption><div class="scroll" role="region" tabindex="0" aria-label="{label}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></figure>"
    )


def sample(caption: str, *, prompt: str, continuation: str) -> str:
    """Generated text, set apart from the prompt it continues; line breaks and spaces are kept."""
    return (
        f"<figure><figcaption>{escape(caption)}</figcaption>"
        f"<pre><b>{escape(prompt)}</b>{escape(continuation)}</pre></figure>"
    )


def render(title: str, *, summary: str, sections: Sequence[Section]) -> str:
    """The whole document, as text."""
    body = "".join(
        f"<section><h2>{escape(section.title)}</h2>{''.join(section.pieces)}</section>" for section in sections
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>"
        f"<body><main><header><h1>{escape(title)}</h1>{prose(summary)}</header>{body}</main></body></html>\n"
    )


def write_report(path: Path, *, title: str, summary: str, sections: Sequence[Section]) -> Path:
    """Write the report whole or not at all: a crash leaves the old file. OSError as the disk gives it."""
    text = render(title, summary=summary, sections=sections)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _column(cells: Sequence[Any]) -> tuple[list[str], bool]:
    """The cells as text, and whether they are numbers; decimals of one column are as many in each row."""
    texts = [format_value(cell) for cell in cells]
    numeric = all(cell is None or (isinstance(cell, int | float) and not isinstance(cell, bool)) for cell in cells)
    decimals = max((len(text.partition(".")[2]) for text in texts), default=0)
    if numeric and 0 < decimals <= 3 and not any("e" in text for text in texts):
        texts = [
            f"{cell:,.{decimals}f}" if isinstance(cell, float) else text
            for cell, text in zip(cells, texts, strict=True)
        ]
    return texts, numeric
