"""JSON and file names from folders that we do not trust."""

import json
import os
import re
from pathlib import Path
from typing import Any, Final

from moewright.checkpoint.files import FileRecord
from moewright.errors import ModelError

MAX_JSON_BYTES: Final = 64 * 2**20
# Letters, digits and a few signs: a name can then hold neither a separator, nor "..", nor a NUL byte.
PLAIN_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,199}")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of at most ``MAX_JSON_BYTES``; ModelError if the file holds anything else."""
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise ModelError(f"{path}: {size} bytes, at most {MAX_JSON_BYTES} are read; is it the right file?")
    try:
        value = json.loads(path.read_bytes(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not valid JSON ({error}); copy or download the file again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: holds a JSON {type(value).__name__}, an object {{...}} is needed")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")  # Python reads NaN and Infinity, which JSON does not have


def file_inside(folder: Path, name: object) -> Path:
    """The path of a file named by a folder, or by a file in it.

    ModelError unless ``name`` is a plain file name and the file, links resolved, lies in ``folder``.
    """
    if not isinstance(name, str) or not PLAIN_NAME.fullmatch(name):
        raise ModelError(f"{folder}: {name!r} is not a plain file name; only files in the folder itself are read")
    path = folder / name
    if not path.is_file():
        raise ModelError(f"{path}: no such file, or not a regular one; copy or download the folder again")
    real = Path(os.path.realpath(path))
    if not real.is_relative_to(os.path.realpath(folder)):
        raise ModelError(
            f"{path}: a link that leads out of the folder; make a copy with the files (cp -rL) and use that"
        )
    return path


def parse_records(value: object) -> dict[str, FileRecord]:
    """Check the ``files`` table of a JSON record; ValueError if it is malformed."""
    if not isinstance(value, dict):
        raise ValueError("its 'files' is not a table")
    for name, entry in value.items():
        known = isinstance(entry, dict) and type(entry.get("bytes")) is int
        hashed = known and any(isinstance(entry.get(key), str) for key in ("sha256", "sha256_tree"))
        if not (hashed and PLAIN_NAME.fullmatch(name)):
            raise ValueError(f"its entry for the file {name!r} is malformed")
    return value
