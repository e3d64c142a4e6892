"""Whether files still hold what was written."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path

from moewright.checkpoint.files import CHUNK_BYTES, FileRecord, record_of
from moewright.checkpoint.tensorfile import read_header
from moewright.checkpoint.tree import leaf_sizes, root
from moewright.errors import ModelError


def difference(path: Path, expected: FileRecord) -> str | None:
    """What is wrong with the file at ``path``, in words, or None if it holds what ``expected`` says.

    OSError as the system raises it.
    """
    if not path.is_file():
        return f"{path.name} is missing"
    size = path.stat().st_size
    if size != expected["bytes"]:
        return f"{path.name} has {size} bytes, {expected['bytes']} were written"
    if "sha256_tree" in expected:
        try:
            same = tree_hash(path) == expected["sha256_tree"]
        except ModelError:  # a header that is none any more
            same = False
    else:
        same = record_of(path)["sha256"] == expected["sha256"]
    return None if same else f"{path.name} has another SHA-256 than when it was written"


def tree_hash(path: Path) -> str:
    """The hash of a file of tensors by `tree.py`, a chunk of each leaf at a time, on all cores.

    ModelError if its header does not describe the file.
    """
    infos = read_header(path).values()
    first = min((info.start for info in infos), default=path.stat().st_size)
    sizes = [first, *(size for info in infos for size in leaf_sizes(info.shape, info.dtype.itemsize))]
    starts = accumulate(sizes, initial=0)

    def leaf(start: int, size: int) -> bytes:
        found = hashlib.sha256()
        with path.open("rb") as file:
            file.seek(start)
            while size and (chunk := file.read(min(CHUNK_BYTES, size))):
                found.update(chunk)
                size -= len(chunk)
        return found.digest()

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return root(threads.map(leaf, starts, sizes))
