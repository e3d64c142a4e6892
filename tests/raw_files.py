"""safetensors files with whatever header a test wants."""

import json
import struct
from pathlib import Path
from typing import Any


def write_raw(path: Path, header: Any, data: bytes, length: int | None = None) -> None:
    """A safetensors file with whatever header (bytes, or something to put as JSON)."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def entry(shape: Any, start: Any, end: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
