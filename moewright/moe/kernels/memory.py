"""Large CPU buffers that are used again, without going back to the operating system in between.

A fresh allocation of tens of megabytes is mapped page by page when it is first written: on the machine this was
measured on (benchmarks/results/NOTES.md) that takes as long as the matrix product that fills it. GPUs have a
caching allocator for this reason; torch has none on CPU.
"""

import mmap
import weakref
from math import prod

import numpy as np
import torch
from torch import Tensor

SMALLEST = 1 << 20
"""Bytes; the C library keeps smaller buffers itself."""


class _Blocks:
    """Mappings that no tensor uses any more, the most recently used last."""

    def __init__(self) -> None:
        self.free: list[mmap.mmap] = []
        self.used_bytes = 0

    def take(self, size: int) -> mmap.mmap:
        """A mapping of exactly `size` bytes; its content is what was left there."""
        for position in reversed(range(len(self.free))):
            if len(self.free[position]) == size:
                block = self.free.pop(position)
                break
        else:
            # Sizes that are asked for no more: never keep more than is in use.
            while self.free and sum(map(len, self.free)) > self.used_bytes:
                self.free.pop(0)
            block = mmap.mmap(-1, size)
        self.used_bytes += size
        return block

    def give_back(self, block: mmap.mmap) -> None:
        self.used_bytes -= len(block)
        self.free.append(block)


_BLOCKS = _Blocks()


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """Like `torch.empty` on CPU. The memory is used again once no tensor refers to it."""
    size = prod(shape) * dtype.itemsize
    if size < SMALLEST:
        return torch.empty(shape, dtype=dtype)
    block = _BLOCKS.take(size)
    array = np.frombuffer(block, dtype=np.uint8)
    weakref.finalize(array, _BLOCKS.give_back, block)
    return torch.from_numpy(array).view(dtype).view(shape)
