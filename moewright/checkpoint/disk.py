"""The operating system's part: its errors in one line, free disk space, and durable names."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from moewright.errors import ModelError, MoewrightError, ResourceError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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


def require_space(folder: Path, needed: int) -> None:
    """ResourceError unless the disk of ``folder`` has ``needed`` bytes to spare."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ResourceError(f"{folder}: {needed} bytes are needed, {free} are free; make room or choose another disk")


def sync(path: Path) -> None:
    """Bring a file's content, or a folder's entries (new, renamed and removed names), to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Delete a file, a link, or a folder with all its contents."""
    with contextlib.suppress(FileNotFoundError):  # another process has been quicker
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def overlap(first: str | Path, second: str | Path) -> bool:
    """Whether one of two folders is, or lies in, the other; links are followed, and neither needs to exist."""
    real, other = Path(os.path.realpath(first)), Path(os.path.realpath(second))
    return real.is_relative_to(other) or other.is_relative_to(real)
