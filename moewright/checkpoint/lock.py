"""A lock on a folder: held by one process at a time, and gone with it, however it ends."""

import fcntl
import os
from pathlib import Path

# The library filelock locks only files that it makes itself, not the folder whose owner is in question; it does not see
# that the path now leads to another one; and it knows file systems without locks by one of their errors (ENOSYS).


def lock_folder(path: Path) -> tuple[int, bool]:
    """Open a folder and lock it: the descriptor, to be closed by the caller, and whether it is locked.

    It is not where the file system has no such locks (NFS, for one). BlockingIOError if another process holds the lock,
    FileNotFoundError if there is no folder, or another process has removed or replaced it meanwhile.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:
            return descriptor, False
        # The owner may have renamed or removed the folder between our opening and our locking it.
        if not os.path.samestat(os.fstat(descriptor), os.lstat(path)):
            raise FileNotFoundError(path)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor, True
