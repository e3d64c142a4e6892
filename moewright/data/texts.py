"""Documents in files of text, one after the other, and the digest of the files.

Suffixes: `.jsonl`, `.ndjson` and `.json` hold one JSON object a line, `.parquet` a table; any other
file is one document of UTF-8 text.
"""

import glob
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from moewright.checkpoint.files import record_of
from moewright.errors import DataError


def expand(files: Sequence[str]) -> list[Path]:
    """The files that `files` names, each once: patterns in the order given, the matches of each sorted.

    Raises DataError for a pattern or a path that names no file.
    """
    paths: dict[Path, None] = {}
    for pattern in files:
        if Path(pattern).is_dir():
            raise DataError(f"{pattern} is a folder: name its files, for example {Path(pattern) / '**' / '*.txt'}")
        # A path that exists is itself, whatever brackets are in its name. Not Path.glob, which takes hidden
        # files and refuses absolute patterns.
        named = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207
        matches = [Path(name) for name in named if Path(name).is_file()]
        if not matches:
            reason = "the pattern matches no file" if glob.has_magic(pattern) else "there is no such file"
            raise DataError(f"{pattern}: {reason}")
        paths |= dict.fromkeys(matches)
    return list(paths)


def digest(files: Sequence[str]) -> str:
    """sha256 (hex) over the kind and the bytes of every file that `files` names, in the order of reading.

    Raises DataError as `expand`, and for a file that cannot be read.
    """
    whole = hashlib.sha256()
    for path in expand(files):
        with _readable(path):
            whole.update(f"{path.suffix.lower()} {record_of(path)['sha256']}\n".encode())
    return whole.hexdigest()


def texts_of(path: Path, field: str = "text") -> Iterator[str]:
    """The documents of one file, in order; DataError as `read_documents`."""
    readers: dict[str, Callable[[Path, str], Iterator[str]]] = {
        ".jsonl": _read_json_lines,
        ".ndjson": _read_json_lines,
        ".json": _read_json_lines,
        ".parquet": _read_parquet,
    }
    with _readable(path):
        yield from readers.get(path.suffix.lower(), _read_text)(path, field)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def _read_text(path: Path, field: str) -> Iterator[str]:
    yield _decode(path.read_bytes(), path)


def _read_json_lines(path: Path, field: str) -> Iterator[str]:
    offset = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            line = _decode(raw, path, offset=offset)
            offset += len(raw)
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:  # also numbers and nesting beyond what Python reads
                why = getattr(error, "msg", error)
                raise DataError(f"{path}:{number}: not JSON ({why}): one object a line is expected") from error
            if not isinstance(value, dict):
                raise DataError(f"{path}:{number}: a JSON {type(value).__name__}, where an object is expected")
            if field not in value:
                raise DataError(f"{path}:{number}: no field {field!r}; it has {_names(value)}: set data.text_field")
            yield _text(value[field], f"{path}:{number}", field)


def _read_parquet(path: Path, field: str) -> Iterator[str]:
    import pyarrow.parquet  # here, as it takes longer to import than most texts to read

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if field not in names:
                raise DataError(f"{path}: no column {field!r}; it has {_names(names)}: set data.text_field")
            row = 0
            for batch in file.iter_batches(batch_size=1024, columns=[field]):
                for value in batch.column(0):
                    yield _text(value.as_py(), f"{path}, row {row}", field)
                    row += 1
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a Parquet file that can be read ({str(error).splitlines()[0]})") from error


def _text(value: object, where: str, field: str) -> str:
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise DataError(f"{where}: field {field!r} is {kind}, where text is expected")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can say \ud800 alone, which UTF-8 cannot hold
        raise DataError(f"{where}: field {field!r} has half a surrogate pair at character {error.start}") from error
    return value


def _decode(raw: bytes, path: Path, *, offset: int = 0) -> str:
    """The text of `raw`, which begins at byte `offset` of its file; a byte order mark at the beginning is dropped."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        place = offset + error.start
        raise DataError(f"{path}: not UTF-8 at byte {place} (0x{raw[error.start]:02x}): convert the file") from error
    return text if offset else text.removeprefix("\ufeff")


def _names(names: Sequence[str] | dict[str, object]) -> str:
    return ", ".join(repr(name) for name in list(names)[:5]) or "none"
