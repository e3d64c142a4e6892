"""The report of `moewright export`: the folder written, and its proof."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moewright.export.runtimes import Runtime
from moewright.export.verify import Proof


@dataclass(frozen=True)
class ExportReport:
    """The folder written, and the proof."""

    target: Path
    format: str
    parameters: dict[str, int]
    bytes: int
    proof: Proof
    runtimes: list[Runtime]

    def as_dict(self) -> dict[str, Any]:
        """Everything, in plain types."""
        return {
            "target": str(self.target),
            "format": self.format,
            "parameters": self.parameters,
            "bytes": self.bytes,
            "proof": self.proof.as_dict(),
            "runtimes": [row.as_dict() for row in self.runtimes],
        }
