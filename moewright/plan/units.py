"""Numbers of bytes as people write and read them: decimal (GB = 10^9) and binary (GiB = 2^30)."""

import re
from typing import Final

from moewright.errors import UsageError

UNITS: Final = {"B": 1} | {
    unit: base**power
    for base, ending in ((1000, "B"), (1024, "iB"))
    for power, unit in enumerate((f"{prefix}{ending}" for prefix in "KMGT"), start=1)
}
"""Bytes of each unit; KB to TB are decimal, KiB to TiB binary."""


def to_bytes(text: str, *, name: str) -> int:
    """The bytes of `40GB` or `37.5 GiB`; UsageError, which names the setting, for all else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([A-Za-z]*)\s*", text)
    units = {unit.lower(): size for unit, size in UNITS.items()}
    if match is None or match[2].lower() not in units or not float(match[1]):
        raise UsageError(f"{name}={text}: write a number above 0 and a unit ({', '.join(UNITS)}), such as 40GB")
    return int(float(match[1]) * units[match[2].lower()])


def written(count: float) -> str:
    """Bytes in the decimal unit that suits them."""
    unit = next((unit for unit in ("TB", "GB", "MB", "KB") if abs(count) >= UNITS[unit]), "B")
    return f"{count / UNITS[unit]:.3g} {unit}"
