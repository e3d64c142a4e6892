"""Durable, hashed files, and JSON and names from folders that we do not trust."""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Protocol, Required, Self, TypedDict

from moewright.errors import ModelError, MoewrightError, ResourceError

MAX_JSON_BYTES = 64 * 2**20
CHUNK_BYTES = 2**24
LARGE_BYTES = 2**20
# Letters, digits and a few signs: a name can then hold neither a separator, nor "..", nor a NUL byte.
PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,199}")
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
HASHES: Final = ("sha256", "sha256_tree")


class FileRecord(TypedDict, total=False):
    """What is remembered of a file's content: its length in bytes, and one hash in hex."""

    bytes: Required[int]
    sha256: str
    """Of the whole file."""
    sha256_tree: str
    """Of a file of tensors, by `checkpoint/tree.py`."""


class Hasher(Protocol):
    """What hashes a file while it is written."""

    name: str
    """The key of `FileRecord` that the hash goes by."""

    def update(self, data: bytes | memoryview, /) -> object:
        """The next bytes."""

    def hexdigest(self) -> str:
        """The hash of all bytes."""


class HashedFile:
    """A new file, hashed while it is written and on the disk when the ``with`` block has ended.

    Creation is exclusive (FileExistsError), so a link planted under the name is never followed. What is large is hashed
    and written by two threads while the caller makes the next piece, and its way to the disk begins at once.

    ``hasher`` is SHA-256 over the whole file if it is left out.
    """

    def __init__(self, path: Path, hasher: Hasher | None = None) -> None:
        self._hasher = hashlib.sha256() if hasher is None else hasher
        self._file = path.open("xb")
        self._bytes = 0
        self._threads = ThreadPoolExecutor(3)
        self._on_its_way: list[Future[object]] = []
        self._advice: Future[None] | None = None

    def write(self, data: bytes | memoryview) -> None:
        """Append ``data``; a memoryview must be of bytes (format "B"), and must not change until the next call.

        An error may be that of the piece before; leaving the block raises that of the last.
        """
        self._wait()  # so that there are never more than two pieces in memory
        if len(data) < LARGE_BYTES:
            self._file.write(data)
            self._hasher.update(data)
        else:
            self._on_its_way = [
                self._threads.submit(self._hasher.update, data),
                self._threads.submit(self._store, data),
            ]
        self._bytes += len(data)

    def _wait(self) -> None:
        on_its_way, self._on_its_way = self._on_its_way, []
        for each in on_its_way:
            each.result()

    def _store(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        if self._advice is None or self._advice.done():
            self._advice = self._threads.submit(self._send_to_disk)

    def _send_to_disk(self) -> None:
        # Linux begins by itself only when a tenth of the memory waits to be written, or at the fsync. The advice sends
        # there what is not on the disk yet, and takes what is out of the page cache, which a model could fill.
        if sys.platform == "linux":
            with contextlib.suppress(OSError):  # a file system that takes no advice
                os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    @property
    def record(self) -> FileRecord:
        """Length and hash of what was written, after the block."""
        if self._hasher.name == "sha256_tree":
            return {"bytes": self._bytes, "sha256_tree": self._hasher.hexdigest()}
        return {"bytes": self._bytes, "sha256": self._hasher.hexdigest()}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file, self._threads:
            if kind is None:
                self._wait()
                self._file.flush()
                os.fsync(self._file.fileno())


def write_bytes(path: Path, data: bytes) -> FileRecord:
    """Write a new file and bring it to the disk."""
    with HashedFile(path) as file:
        file.write(data)
    return file.record


def copy_file(source: Path, target: Path) -> FileRecord:
    """Copy ``source`` to the new file ``target``, a chunk at a time."""
    with source.open("rb") as original, HashedFile(target) as copy:
        while chunk := original.read(CHUNK_BYTES):
            copy.write(chunk)
    return copy.record


def record_of(path: Path) -> FileRecord:
    """Length and hash of an existing file, read a chunk at a time."""
    with path.open("rb") as file:
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def parse_records(value: object) -> dict[str, FileRecord]:
    """Take the ``files`` table of a JSON record apart; ValueError if it is not one."""
    if not isinstance(value, dict):
        raise ValueError("its 'files' is not a table")
    for name, entry in value.items():
        known = isinstance(entry, dict) and type(entry.get("bytes")) is int
        hashed = known and any(isinstance(entry.get(key), str) for key in HASHES)
        if not (hashed and PLAIN_NAME.fullmatch(name)):
            raise ValueError(f"its entry for the file {name!r} is malformed")
    return value


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """The one way we write JSON: sorted keys, indent 2, a newline at the end; ValueError for NaN and Inf."""
    return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of at most ``MAX_JSON_BYTES``; ModelError if it is something else."""
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise ModelError(f"{path}: {size} bytes, at most {MAX_JSON_BYTES} are read; is it the right file?")
    try:
        value = json.loads(path.read_bytes(), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not valid JSON ({error}); copy or download the file again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: holds a JSON {type(value).__name__}, an object {{...}} is needed")
    return value


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number")  # Python reads what the format does not have


def file_inside(folder: Path, name: object) -> Path:
    """The path of a file that a folder, or something written in it, names.

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


def overlap(first: str | Path, second: str | Path) -> bool:
    """Whether one of two folders is, or lies in, the other; links are followed, and neither needs to exist."""
    real, other = Path(os.path.realpath(first)), Path(os.path.realpath(second))
    return real.is_relative_to(other) or other.is_relative_to(real)


def replace_text(path: Path, text: str) -> None:
    """Put ``text`` into the file at ``path``: a crash leaves what it held before or all of it, on the disk."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync(path.parent)


def some(names: list[str]) -> str:
    """The first five names, and how many more there are."""
    more = len(names) - 5
    return ", ".join(names[:5]) + (f" and {more} more" if more > 0 else "")


def sync(path: Path) -> None:
    """Bring a file's content, or a folder's entries (new, renamed and removed names), to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Delete a file, a link, or a folder with all that it holds."""
    with contextlib.suppress(FileNotFoundError):  # another process has been quicker
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def require_space(folder: Path, needed: int) -> None:
    """ResourceError unless the disk of ``folder`` has ``needed`` bytes to spare."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ResourceError(f"{folder}: {needed} bytes are needed, {free} are free; make room or choose another disk")


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn the operating system's errors while reading below ``path`` (permissions, a bad disk) into ModelError."""
    try:
        yield
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.filename or path}: {error.strerror})") from error


@contextlib.contextmanager
def writing(path: Path, refusal: type[MoewrightError] = ModelError) -> Iterator[None]:
    """Turn the operating system's errors while writing below ``path`` into ours.

    A full disk, quota or file-size limit becomes ResourceError, any other OSError becomes ``refusal``.
    """
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM:
            there = next(folder for folder in path.absolute().parents if folder.exists())
            free = shutil.disk_usage(there).free
            raise ResourceError(
                f"{path}: {error.strerror} ({free} bytes free); make room or choose another disk"
            ) from error
        where = error.filename or path
        raise refusal(f"{path}: cannot be written ({where}: {error.strerror}); choose another place") from error
