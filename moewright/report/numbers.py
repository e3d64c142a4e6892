"""Numbers as people read them: values in tables, and the ticks of an axis."""

import math
from typing import Any

TINY = 1e-300
"""Below this, steps between ticks would run out of digits."""


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


def nice_ticks(low: float, high: float, *, count: int = 5, whole: bool = False) -> list[float]:
    """About ``count`` round numbers that cover [low, high]: the first is <= low and the last is >= high.

    They are multiples of 1, 2 or 5 times a power of ten, and of at least 1 if ``whole``. Bounds that are equal, or as
    good as equal, are widened first; there are always two ticks or more.

    ValueError if a bound is not finite or ``low > high``.
    """
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise ValueError(f"an axis from {low} to {high} has no ticks")
    largest = max(abs(low), abs(high))
    if high - low <= max(1e-9 * largest, TINY):
        margin = largest / 10 if largest > 10 * TINY else 1.0
        low, high = low - margin, high + margin
    rough = (high - low) / max(count - 1, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    if whole:
        step = max(step, 1.0)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, max(last, first + 1) + 1)]


def format_ticks(ticks: list[float]) -> list[str]:
    """All ticks with the same number of decimals, the fewest that tell them apart."""
    step = ticks[1] - ticks[0]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return [f"{tick:,.{decimals}f}" if round(tick, decimals) else f"{0:.{decimals}f}" for tick in ticks]
