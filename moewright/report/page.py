"""One self-contained HTML file from a template and the values it shows: nothing in it is fetched.

A page's template extends `templates/base.html` and takes its pieces (tables, facts, charts) from
`templates/pieces.html`. Every text is escaped.
"""

import base64
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from moewright.report import charts as drawing
from moewright.report.charts import Chart
from moewright.report.text import format_value, printable

TEMPLATES: Final = Path(__file__).with_name("templates")


def render(template: Path, *, charts: Mapping[str, Chart], **values: Any) -> str:
    """The document that a template makes of `charts` and `values`.

    A browser may run our one script, which it knows by its hash, and may fetch nothing. Unprintable characters become
    U+FFFD.
    """
    environment = Environment(
        loader=FileSystemLoader([template.parent, TEMPLATES]),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=printable,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["value"] = format_value
    script = drawing.script() if charts else ""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template(template.name).render(charts=charts, script=script, digest=digest, **values)


def write_page(path: Path, template: Path, *, charts: Mapping[str, Chart], **values: Any) -> Path:
    """Write the document whole or not at all: a crash leaves the old file. OSError as the disk gives it."""
    text = render(template, charts=charts, **values)
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
