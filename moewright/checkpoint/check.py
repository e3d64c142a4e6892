"""Whether files still hold what was written."""

import hashlib
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO, Final

from moewright.checkpoint.files import LARGE_BYTES, FileRecord, record_of
from moewright.checkpoint.tensorfile import read_header
from moewright.checkpoint.tree import leaf_sizes, root
from moewright.errors import ModelError

RUN: Final = 64
"""Leaves that a thread hashes in one go: a file may have a great many small ones."""


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
    leaves = list(zip(accumulate(sizes, initial=0), sizes, strict=False))
    runs = [leaves[at : at + RUN] for at in range(0, len(leaves), RUN)]

    def hashed(run: list[tuple[int, int]]) -> list[bytes]:
        with path.open("rb") as file:
            return [_leaf(file, start, size) for start, size in run]

    # Not all that the machine has: a job may have been given few of them.
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    with ThreadPoolExecutor(cores) as threads:
        return root(leaf for found in threads.map(hashed, runs) for leaf in found)


def _leaf(file: BinaryIO, start: int, size: int) -> bytes:
    file.seek(start)
    found = hashlib.sha256()
    while size and (chunk := file.read(min(LARGE_BYTES, size))):
        found.update(chunk)
        size -= len(chunk)
    return found.digest()
