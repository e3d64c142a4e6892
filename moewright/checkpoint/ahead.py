"""Hashes that are computed while other things are done."""

import contextlib
import threading
from collections.abc import Iterable
from pathlib import Path

from moewright.checkpoint.files import FileRecord, record_of


class HashesAhead:
    """SHA-256 of files, computed in a thread that does not keep the process alive.

    Imports no torch, so that the files of a model can be hashed while torch and transformers are imported.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._found: dict[Path, tuple[object, FileRecord]] = {}
        self._thread = threading.Thread(target=self._work, args=(list(files),), daemon=True)
        self._thread.start()

    def _work(self, files: list[Path]) -> None:
        for file in files:
            with contextlib.suppress(OSError):  # it will come again, and in the caller's thread
                if file.is_file():
                    state = _state(file)
                    self._found[file] = state, record_of(file)

    def record_of(self, file: Path) -> FileRecord:
        """Length and hash of a file, computed now if it was not, or if it has changed. OSError as the system's."""
        self._thread.join()
        if file in self._found and self._found[file][0] == _state(file):
            return self._found[file][1]
        return record_of(file)


def hash_ahead(folder: Path) -> HashesAhead:
    """Begin to hash the files of a model folder that `ModelFolder.fingerprint` will ask for."""
    return HashesAhead([folder / "config.json", *sorted(folder.glob("*.safetensors"))])


def _state(file: Path) -> object:
    found = file.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
