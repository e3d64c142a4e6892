"""Moving a payload into a folder that also holds other files: these stay, and nobody sees half a payload."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from moewright.checkpoint.check import difference
from moewright.checkpoint.disk import sync
from moewright.checkpoint.files import FileRecord
from moewright.checkpoint.untrusted import parse_records, read_json
from moewright.errors import ModelError


@dataclass(frozen=True)
class Move:
    """The way of a payload from ``work``, where it was written, into ``home``.

    ``home`` holds no payload while ``key`` is away, which leaves first and arrives last; ``marker``, the last file that
    was written, arrives just before it. A move that was interrupted is finished by being planned and done once more.
    """

    work: Path
    home: Path
    marker: str
    key: str
    """The file by which readers know such a payload."""
    replaced: Callable[[str], bool]
    """Whether a file of this name in ``home`` belongs to the old payload; marker and key do, in any case."""

    def plan(self) -> tuple[list[str], list[str]]:
        """Names of files to be deleted from ``home``, and to be moved there from ``work``, which is written whole.

        ModelError if a folder is in the way, or ``work`` is not as we left it.
        """
        files = _files(self.work / self.marker)
        order = (*sorted(files.keys() - {self.key, self.marker}), self.marker, self.key)
        moved = [name for name in order if (self.work / name).exists()]
        old = {file.name for file in self.home.iterdir() if self.replaced(file.name)}
        for name in (*moved, *old, self.marker, self.key):
            if (self.home / name).is_dir():
                raise ModelError(f"{self.home}: a folder {name} is in the way; choose another folder, or move it")
            if (self.work / name).is_symlink():
                raise ModelError(f"{self.work}: {name} is a link, which we did not leave there; remove the folder")
        return sorted({*old, self.marker} - files.keys()), moved

    def carry_out(self, deleted: list[str], moved: list[str]) -> None:
        """Delete and move the files that `plan` has named. OSError as the system raises it."""
        (self.home / self.key).unlink(missing_ok=True)
        sync(self.home)
        for name in deleted:
            (self.home / name).unlink(missing_ok=True)
        for name in moved:
            if name == self.key:
                sync(self.home)
            (self.work / name).rename(self.home / name)
        sync(self.home)

    def finish(self) -> None:
        """Finish a move that was interrupted, if ``work`` is the remains of one; ModelError as `plan`."""
        key = self.work / self.key
        if (self.home / self.key).exists():
            return
        if (self.work / self.marker).exists():
            self.carry_out(*self.plan())
        elif key.is_file() and (self.home / self.marker).exists():
            record = _files(self.home / self.marker).get(self.key)
            if record is not None and not key.is_symlink() and difference(key, record) is None:
                key.rename(self.home / self.key)
                sync(self.home)


def _files(marker: Path) -> dict[str, FileRecord]:
    try:
        return parse_records(read_json(marker).get("files"))
    except ValueError as error:
        raise ModelError(f"{marker}: {error}; we did not leave it like that: remove the file") from error
