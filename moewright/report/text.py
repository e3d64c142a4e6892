"""Values as people read them, and text that every page can hold."""

import math
import re
from collections.abc import Mapping
from typing import Any, Final

UNPRINTABLE: Final = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
"""Not to be had in HTML and SVG: control characters (a model may well generate them), halves of surrogate pairs."""


def format_value(value: Any) -> str:
    """A number with thousands separators or four significant digits; yes, no, or a dash for None.

    Of a list longer than eight values only the first and the last are shown, and how many there are.
    """
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}" if not 10_000 <= abs(value) < math.inf else f"{value:,.0f}"
    if isinstance(value, list | tuple) and len(value) > 8:
        return f"{format_value(value[0])} ... {format_value(value[-1])} ({len(value)} values)"
    if isinstance(value, list | tuple):
        return ", ".join(format_value(item) for item in value)
    return str(value)


def printable(value: Any) -> Any:
    """A text with U+FFFD for each unprintable character, also inside mappings and lists; other values as they are."""
    if type(value) is str:
        return UNPRINTABLE.sub("\ufffd", value)
    if isinstance(value, Mapping):
        return {key: printable(item) for key, item in value.items()}
    return [printable(item) for item in value] if isinstance(value, list | tuple) else value
