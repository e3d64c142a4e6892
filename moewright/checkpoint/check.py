"""The comparison of files with the records made when they were written."""

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

LEAVES_A_TASK: Final = 64
"""Leaves that a thread hashes in one go: a file may have a great many small ones."""


def difference(path: Path, expected: FileRecord) -> str | None:
    """How a file differs from its record, in words; None if it does not. OSError as the system raises it."""
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
    tasks = [leaves[at : at + LEAVES_A_TASK] for at in range(0, len(leaves), LEAVES_A_TASK)]

    def hashed(task: list[tuple[int, int]]) -> list[bytes]:
        with path.open("rb") as file:
            return [_leaf(file, start, size) for start, size in task]

    # The cores of this process, which a job may have been given few of.
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    with ThreadPoolExecutor(cores) as threads:
        return root(leaf for hashes in threads.map(hashed, tasks) for leaf in hashes)


def _leaf(file: BinaryIO, start: int, size: int) -> bytes:
    file.seek(start)
    sha256 = hashlib.sha256()
    while size and (chunk := file.read(min(LARGE_BYTES, size))):
        sha256.update(chunk)
        size -= len(chunk)
    return sha256.digest()
