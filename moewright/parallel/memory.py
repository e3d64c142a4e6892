"""Where tensors can lie: in the memory of a device, in the host's, or in files."""

import ctypes
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from mmap import MADV_WILLNEED
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from moewright.checkpoint.disk import writing
from moewright.errors import ResourceError, UsageError

SMALLEST = 1 << 16
"""Bytes; smaller tensors stay in the host's memory, where a file would be little but rounding to whole pages."""


class Memory(Protocol):
    """A kind of memory."""

    @property
    def device(self) -> torch.device:
        """Of the tensors that lie in it."""

    @property
    def lasting(self) -> bool:
        """Whether its tensors are slow to make, and so used again from step to step."""

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor in it, whose values may be anything. Raises ResourceError where there is no room."""


@dataclass(frozen=True)
class DeviceMemory:
    """Of a device, as torch allocates it; with `pinned`, host memory that a GPU can copy from and to by itself."""

    device: torch.device
    pinned: bool = False

    @property
    def lasting(self) -> bool:
        return self.pinned

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(tuple(shape), dtype=dtype, device=self.device, pin_memory=self.pinned)


@dataclass(frozen=True)
class MappedFiles:
    """Files in a folder, a tensor each, mapped into memory: the system reads and writes them as they are used.

    A file loses its name as soon as it is mapped. So it goes away with its tensor, also with a process that is killed;
    nobody else can find it, and nothing is ever read from it later. All of its blocks are there before it is used: a
    full disk is an error here, and not the end of the process at some later write.
    """

    folder: Path
    device = torch.device("cpu")
    lasting = True

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        size = prod(shape) * dtype.itemsize
        if size < SMALLEST:
            return torch.empty(tuple(shape), dtype=dtype)
        with writing(self.folder, ResourceError), tempfile.NamedTemporaryFile(dir=self.folder, prefix=".offload-") as f:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(f.fileno(), 0, size)
            else:  # macOS
                os.truncate(f.fileno(), size)
            data: Tensor = torch.from_file(f.name, shared=True, size=size, dtype=torch.uint8)
        return data.view(dtype).view(tuple(shape))

    def require_space(self, needed: int) -> None:
        """Make the folder. Raises UsageError if that fails, ResourceError unless its disk has `needed` bytes."""
        with writing(self.folder, UsageError):
            self.folder.mkdir(parents=True, exist_ok=True)
            if not os.access(self.folder, os.W_OK):
                raise UsageError(f"offload_folder={self.folder}: no files can be made there; name another folder")
        if needed > (free := shutil.disk_usage(self.folder).free):
            raise ResourceError(
                f"{self.folder}: {needed} bytes are needed for what is offloaded there, {free} are free; make room, or "
                "name a folder on another disk"
            )


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where the tensors of one parameter lie beside the parameter itself; None: on its device."""

    states: Memory | None = None
    """Its moments, and the copy that is moved in its place where this is another device."""
    gradients: Memory | None = None
    """Its gradient."""


def expect(tensors: Iterable[Tensor]) -> None:
    """Tell the system that these tensors, each with a mapped file of its own, will be read soon; others do not mind."""
    for tensor in tensors:
        size = tensor.numel() * tensor.itemsize
        if tensor.device.type == "cpu" and size >= SMALLEST:
            first = tensor.data_ptr() - tensor.data_ptr() % os.sysconf("SC_PAGE_SIZE")
            _library().madvise(ctypes.c_void_p(first), ctypes.c_size_t(tensor.data_ptr() + size - first), MADV_WILLNEED)


@cache
def _library() -> Any:
    return ctypes.CDLL(None)
