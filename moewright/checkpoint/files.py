"""Durable files, hashed while they are written."""

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, Required, Self, TypedDict

from moewright.checkpoint.disk import sync
from moewright.checkpoint.tree import TreeHasher

CHUNK_BYTES: Final = 2**24
LARGE_BYTES: Final = 2**20


class FileRecord(TypedDict, total=False):
    """The fingerprint of a file: its length in bytes, and one hash in hex."""

    bytes: Required[int]
    sha256: str
    """Of the whole file."""
    sha256_tree: str
    """Of a file of tensors, by `checkpoint/tree.py`."""


class HashedFile:
    """A new file, hashed while it is written and on the disk when the ``with`` block has ended.

    Creation is exclusive (FileExistsError), so a link planted under the name is never followed. Large pieces are hashed
    and written by two threads while the caller makes the next one, and their way to the disk begins at once.

    Without a ``hasher`` the hash is SHA-256 over the whole file.
    """

    def __init__(self, path: Path, hasher: TreeHasher | None = None) -> None:
        self._hasher = hasher or hashlib.sha256()
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
        # Linux by itself begins only when a tenth of the memory waits to be written, or at the fsync. After this advice
        # it writes at once, and drops written pages from its cache, which a model could fill.
        if sys.platform == "linux":
            with contextlib.suppress(OSError):  # a file system that takes no advice
                os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    @property
    def record(self) -> FileRecord:
        """Length and hash of the file, after the block."""
        if isinstance(self._hasher, TreeHasher):
            return {"bytes": self._bytes, "sha256_tree": self._hasher.hexdigest()}
        return {"bytes": self._bytes, "sha256": self._hasher.hexdigest()}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
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


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """The one way we write JSON: sorted keys, indent 2, a newline at the end; ValueError for NaN and Inf."""
    return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def replace_text(path: Path, text: str) -> None:
    """Replace the content of the file at ``path`` by ``text``: after a crash it is the old or all of the new."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync(path.parent)
