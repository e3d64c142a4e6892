"""A hash of a file of tensors that hashes equal matrices once, and can be checked on all cores.

The tree has two levels. Its leaves are the SHA-256 of the file's header and of each matrix: a tensor of one or two
dimensions, or one index of the first dimension of a larger one (a stack's expert). The root is the SHA-256 of the
leaves one after the other, 32 bytes each. SHA-256 over the whole file would be as safe, but reads eight copies of an
expert eight times, and is the slowest step of an upcycling at the speed of a disk.
"""

import hashlib
import math
from collections.abc import Hashable, Iterable
from typing import NamedTuple


class Leaf(NamedTuple):
    """A stretch of the file that is hashed by itself."""

    size: int
    key: Hashable = None
    """Leaves with an equal key hold equal bytes; None: nothing is known."""


def leaf_sizes(shape: tuple[int, ...], itemsize: int) -> list[int]:
    """The sizes in bytes of a tensor's leaves; none for a tensor without elements."""
    total = math.prod(shape) * itemsize
    if total == 0:
        return []
    return [total // shape[0]] * shape[0] if len(shape) > 2 else [total]


def root(leaves: Iterable[bytes]) -> str:
    """The hash of the file in hex, from the SHA-256 of its leaves in order."""
    return hashlib.sha256(b"".join(leaves)).hexdigest()


class TreeHasher:
    """The hash of a file whose leaves are known beforehand, fed with its bytes in order.

    `known` remembers the hashes of keys, and may be shared by the files of one folder.
    """

    def __init__(self, leaves: Iterable[Leaf], known: dict[Hashable, bytes]) -> None:
        self._leaves = iter(leaves)
        self._known = known
        self._done: list[bytes] = []
        self._next()

    def _next(self) -> None:
        self._leaf = next(self._leaves, None)
        self._left = self._leaf.size if self._leaf else 0
        self._hash = hashlib.sha256()

    def update(self, data: bytes | memoryview) -> None:
        """The next bytes of the file, of any number."""
        rest = memoryview(data)
        while len(rest):
            assert self._leaf is not None, "more bytes than the leaves have"
            part, rest = rest[: self._left], rest[self._left :]
            if self._leaf.key not in self._known:
                self._hash.update(part)
            self._left -= len(part)
            if not self._left:
                self._done.append(self._known.get(self._leaf.key) or self._hash.digest())
                if self._leaf.key is not None:
                    self._known[self._leaf.key] = self._done[-1]
                self._next()

    def hexdigest(self) -> str:
        """The hash of the file; all its bytes must have been there."""
        assert self._leaf is None, "fewer bytes than the leaves have"
        return root(self._done)
