"""The commit protocol: a folder is written beside its target, hashed, and put in place by one rename.

The content of the files is the payload's affair: a model (``write.py``), a training state (``state.py``). In order:
make the temporary folder and lock it; write the files, each to the disk and with its hash; write the marker, which
lists them all; rename. So a reader that finds the marker knows that everything before it was written.
"""

import contextlib
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from moewright.checkpoint.disk import remove, sync
from moewright.checkpoint.files import FileRecord, json_bytes, record_of, replace_text
from moewright.checkpoint.into import Move
from moewright.checkpoint.lock import lock_folder
from moewright.errors import ModelError


@dataclass
class NewFolder:
    """A new folder on its way to ``home``, where at any moment the old one, nothing, or the whole new one lies.

    A context manager. Files are written into ``path``, the temporary folder, which is locked while we live, and their
    records added to ``records``; `commit` puts the folder in place. Leaving the block without it removes what was made.
    Several processes may write into ``path``: the one in the block gathers their records, and commits.

    The remains of a killed process (a temporary folder, a folder moved aside, an unfinished move) are cleaned up when
    the block is entered. ModelError if another process is writing to ``path``, or something else took the place of a
    folder moved aside; OSError as the system raises it.
    """

    home: Path
    path: Path
    aside: Path
    marker: str
    """Name of the file that is written last and lists the others."""
    target: Path
    """The place as the user knows it, for messages."""
    replace: bool = False
    """Whether a folder in place is moved ``aside`` and, once the new one has arrived, deleted."""
    into: Move | None = None
    """How the files are moved into a folder in place, which stays."""
    check: Callable[[], None] = lambda: None
    """Called after that clean-up; may refuse the folder in place with an error of its own."""
    records: dict[str, FileRecord] = field(default_factory=dict)
    locked: bool = field(init=False)
    """False on a file system without locks: there, two writers do not notice each other."""

    _committed = _moving = False

    def __enter__(self) -> Self:
        self._new_parents = [folder for folder in self.home.parents if not folder.exists()]
        self.home.parent.mkdir(parents=True, exist_ok=True)
        self._lock, self.locked = self._make_and_lock()
        try:
            self._mend()
            self.check()
            for leftover in self.path.iterdir():
                remove(leftover)
        except BaseException:
            self._give_up()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._committed:
            os.close(self._lock)
        else:
            self._give_up()

    def commit(self, content: Mapping[str, Any]) -> None:
        """Write the marker (``content``, and under ``files`` the records) and put the folder in place.

        Files without a record, written by others, are first brought to the disk and hashed.
        """
        for name in sorted({file.name for file in self.path.iterdir()} - self.records.keys()):
            sync(self.path / name)
            self.records[name] = record_of(self.path / name)
        sync(self.path)
        # Whole or not there: a move that was interrupted is known by it.
        replace_text(self.path / self.marker, json_bytes({**content, "files": self.records}).decode())
        if self.into is not None:
            old, new = self.into.plan()
            self._moving = True  # from here on the temporary folder may hold what the target lacks
            self.into.carry_out(old, new)
            remove(self.path)
            self._committed = True
        else:
            if self.replace and os.path.lexists(self.home):
                self.home.rename(self.aside)
            self.path.rename(self.home)
            self._committed = True
            sync(self.home.parent)
            remove(self.aside)

    def _make_and_lock(self) -> tuple[int, bool]:
        """Make the temporary folder, or take over one whose writer is dead; then as `lock_folder`."""
        while True:
            made = True
            try:
                self.path.mkdir()
            except FileExistsError:
                made = False
            try:
                descriptor, locked = lock_folder(self.path)
            except FileNotFoundError:
                continue  # its owner has just finished with it
            except BlockingIOError as error:
                raise ModelError(f"{self.target}: another process is writing it; wait for it or stop it") from error
            if not locked and not made:
                os.close(descriptor)
                raise ModelError(
                    f"{self.path}: left by another process, and this file system has no locks to tell whether it "
                    "still runs; remove the folder if it does not"
                )
            return descriptor, locked

    def _mend(self) -> None:
        """Finish or undo a commit that was interrupted between its renames."""
        if self.into is not None:
            self._moving = True
            self.into.finish()
            self._moving = False
        if not self.aside.exists():
            return
        if (self.home / self.marker).exists():  # the new folder arrived, and only the deletion is missing
            remove(self.aside)
        elif self.home.exists() and any(self.home.iterdir()):
            raise ModelError(f"{self.target}: something else took the place of {self.aside}; remove one of them")
        else:
            self.aside.rename(self.home)
            warnings.warn(
                f"{self.target}: an overwrite had been interrupted; the old folder is in place again", stacklevel=2
            )

    def _give_up(self) -> None:
        """Remove what we made. The lock is held to the end, so nobody takes the folder for a stale one."""
        if self.aside.exists() and not self.home.exists():
            self.aside.rename(self.home)
        if not self._moving:  # else it holds what the target lacks, for the next writer
            remove(self.path)
        os.close(self._lock)
        with contextlib.suppress(OSError):  # not empty: somebody else has found a use for it
            for folder in self._new_parents:
                folder.rmdir()
