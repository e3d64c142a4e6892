"""Large CPU buffers that are used again, without going back to the operating system in between.

A fresh allocation of tens of megabytes is mapped page by page when it is first written: on the machine this was
measured on (benchmarks/results/NOTES.md) that takes as long as the matrix product that fills it. GPUs have a
caching allocator for this reason; torch has none on CPU. Where Linux gives huge pages to who asks, it is asked
for them: a new block then takes a sixth of the time, and rows gathered from one miss fewer address translations.
"""

import mmap
import threading
import weakref
from contextlib import suppress
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
        # Tensors die in any thread, also in one that is just taking a block.
        self.lock = threading.RLock()

    def take(self, size: int) -> mmap.mmap:
        """A mapping of exactly `size` bytes; its content is what was left there."""
        with self.lock:
            self.used_bytes += size
            for block in reversed(self.free):
                if len(block) == size:
                    self.free.remove(block)
                    return block
            # Sizes that are asked for no more: never keep more than is in use.
            while self.free and sum(map(len, self.free)) > self.used_bytes:
                self.free.pop(0)
        # Private: a process that is forked must not share them.
        block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # Linux built without huge pages
                block.madvise(mmap.MADV_HUGEPAGE)
        return block

    def give_back(self, block: mmap.mmap) -> None:
        with self.lock:
            self.used_bytes -= len(block)
            self.free.append(block)


_BLOCKS = _Blocks()


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """Like `torch.empty` on CPU. The memory is used again once no tensor refers to it.

    Such a storage cannot be resized.
    """
    size = prod(shape) * dtype.itemsize
    if size < SMALLEST:
        return torch.empty(shape, dtype=dtype)
    block = _BLOCKS.take(size)
    array = np.frombuffer(block, dtype=np.uint8)
    weakref.finalize(array, _BLOCKS.give_back, block)
    # Detached it is no view in autograd's eyes, which FSDP2 wants of what a module returns.
    return torch.from_numpy(array).view(dtype).view(shape).detach()
