"""Facts as lines and tables on a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from moewright.report.text import format_value


def layout(values: Mapping[str, Any]) -> RenderableType:
    """Scalars as ``name  value`` lines, a mapping indented below its name, a list of mappings as a table.

    The columns of a table are the keys of its first row; every row has the same keys.
    """
    blocks: list[RenderableType] = []
    lines = _grid()
    for name, value in values.items():
        label = name.replace("_", " ")
        if isinstance(value, Mapping):
            block: RenderableType = Padding(layout(value), (0, 0, 0, 2), expand=False)
        elif isinstance(value, list | tuple) and value and isinstance(value[0], Mapping):
            block = _table(value)
        else:
            empty = isinstance(value, list | tuple) and not value
            lines.add_row(Text(label), Text("none" if empty else format_value(value)))
            continue
        blocks += [lines, Text(f"{label}:", style="bold"), block]
        lines = _grid()
    return Group(*(block for block in [*blocks, lines] if not (isinstance(block, Table) and not block.row_count)))


def _grid() -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    return grid


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=SIMPLE_HEAD)
    for name, value in rows[0].items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        table.add_column(Text(name.replace("_", " ")), justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(format_value(row[name])) for name in rows[0]))
    return table
