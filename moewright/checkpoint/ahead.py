"""Hashes computed beside other work."""

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
        self._records: dict[Path, tuple[object, FileRecord]] = {}
        self._thread = threading.Thread(target=self._work, args=(list(files),), daemon=True)
        self._thread.start()

    def _work(self, files: list[Path]) -> None:
        for file in files:
            with contextlib.suppress(OSError):  # `record_of` will meet it again, in the caller's thread
                if file.is_file():
                    state = _state(file)
                    self._records[file] = state, record_of(file)

    def record_of(self, file: Path) -> FileRecord:
        """Length and hash of a file, computed now if it has changed, or was not there before."""
        self._thread.join()
        if file in self._records and self._records[file][0] == _state(file):
            return self._records[file][1]
        return record_of(file)


def hash_ahead(folder: Path) -> HashesAhead:
    """Begin to hash the files of a model folder that `ModelFolder.fingerprint` will ask for."""
    return HashesAhead([folder / "config.json", *sorted(folder.glob("*.safetensors"))])


def _state(file: Path) -> object:
    stat = file.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns
