"""The safetensors format: headers checked before use, one tensor read at a time, files written as a stream.

A file is: the header's length (8 bytes, little-endian), the header (JSON: name -> dtype, shape, data_offsets),
the tensors' bytes without gaps. The ``safetensors`` library reads it, but writes only tensors that are all in memory
at once, and asks the operating system for whatever a header claims; hence these few functions of our own.
"""

import contextlib
import itertools
import json
import math
import mmap
import operator
import sys
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from moewright.checkpoint.files import LARGE_BYTES, FileRecord, HashedFile
from moewright.checkpoint.tree import Leaf, TreeHasher, leaf_sizes
from moewright.errors import ModelError

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: bytes ``start`` to ``end`` (absolute) of ``file``."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    start: int
    end: int


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is made when its turn to be written comes, whole or a piece at a time."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor | Iterable[Tensor]]
    """Makes exactly this shape and dtype, or pieces of the dtype that, one after the other, fill its memory.
    A piece is written while the next one is made: it must not be changed before the one after that is asked for."""
    keys: tuple[Hashable, ...] = ()
    """For each leaf of the file's hash (`tree.py`): leaves with an equal key hold equal bytes; None says nothing."""

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Names, shapes and places of a file's tensors, in the order of their bytes; nothing is allocated for them.

    ModelError if the file is truncated, too long, or its header is not one that describes the file exactly.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8:
            raise _damaged(path, f"expected at least 8 bytes, found {size}")
        if length > MAX_HEADER_BYTES:
            raise _damaged(path, f"its header claims {length} bytes, at most {MAX_HEADER_BYTES} are allowed")
        if 8 + length > size:
            raise _damaged(path, f"truncated: expected at least {8 + length} bytes, found {size}")
        text = file.read(length)
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not valid JSON ({error})") from error
    if not isinstance(header, dict):
        raise _damaged(path, f"its header is a JSON {type(header).__name__}, not an object")
    header.pop("__metadata__", None)
    infos = [_parse(path, name, entry, 8 + length) for name, entry in header.items()]
    infos.sort(key=lambda info: (info.start, info.end))
    position = 8 + length
    for info in infos:
        if info.start != position:
            raise _damaged(
                path, f"tensor {info.name} starts at byte {info.start}, the one before it ends at {position}"
            )
        position = info.end
    if position != size:
        raise _damaged(
            path, f"{'truncated' if size < position else 'too long'}: expected {position} bytes, found {size}"
        )
    return {info.name: info for info in infos}


def _parse(path: Path, name: str, entry: Any, base: int) -> TensorInfo:
    if not isinstance(entry, dict):
        raise _damaged(path, f"tensor {name} has no description")
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ModelError(f"{path}: tensor {name} is of dtype {dtype!r}; allowed are {', '.join(DTYPES)}")
    if not _naturals(shape) or len(shape) > 8:
        raise _damaged(path, f"tensor {name} has a malformed shape")
    if not _naturals(offsets) or len(offsets) != 2:
        raise _damaged(path, f"tensor {name} has malformed offsets")
    start, end = offsets
    needed = math.prod(shape) * DTYPES[dtype].itemsize
    if end - start != needed:
        raise _damaged(
            path, f"tensor {name} of shape {shape} and dtype {dtype} needs {needed} bytes, it has {end - start}"
        )
    return TensorInfo(name, tuple(shape), DTYPES[dtype], path, base + start, base + end)


def _naturals(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**48 for item in value)


def _damaged(path: Path, what: str) -> ModelError:
    return ModelError(f"{path}: {what}; copy or download the file again")


def read_tensor(info: TensorInfo, index: tuple[slice, ...] | None = None) -> Tensor:
    """Read one tensor into memory of its own, or the part ``index`` of it: then the bytes of that part and no others.

    ``index`` holds a slice without step for each dim, or for the first few. ModelError if the file has become shorter
    since its header was read.
    """
    parts = (*(index or ()), *(slice(None) for _ in info.shape[len(index or ()) :]))
    dims = [range(size)[part] for size, part in zip(info.shape, parts, strict=True)]
    assert all(dim.step == 1 for dim in dims), f"{info.name}: a slice of {index} has a step"
    shape = [len(dim) for dim in dims]
    data = memory(math.prod(shape) * info.dtype.itemsize)
    # Not mapped into memory: a file that shrinks meanwhile, or a bad disk, would then end the process with a signal.
    with info.file.open("rb", buffering=0) as file:
        rest = data.numpy().data
        for start, size in _stretches(info, dims) if len(rest) else ():
            file.seek(start)
            while size and (count := file.readinto(rest[:size])):
                rest, size = rest[count:], size - count
            if size:
                nbytes = len(data) - len(rest)
                raise _damaged(info.file, f"truncated: tensor {info.name} needs {len(data)} bytes, {nbytes} were found")
    return data.view(info.dtype).reshape(shape)


def _stretches(info: TensorInfo, dims: Sequence[range]) -> Iterator[tuple[int, int]]:
    """Start and size in bytes of each stretch of the file that a part consists of, in order."""
    sizes, dims = (1, *info.shape), (range(1), *dims)  # a scalar has a dim, too
    strides = [math.prod(sizes[dim + 1 :]) * info.dtype.itemsize for dim in range(len(sizes))]
    # From the last dim that is not whole on, the part lies in one piece.
    last = max((dim for dim, part in enumerate(dims) if len(part) < sizes[dim]), default=0)
    for place in itertools.product(*dims[:last], dims[last][:1]):
        yield info.start + sum(map(operator.mul, place, strides)), len(dims[last]) * strides[last]


def memory(size: int) -> Tensor:
    """Memory that goes back to the system when it is dropped: malloc would keep blocks of many megabytes."""
    if size < LARGE_BYTES:
        return torch.empty(size, dtype=torch.uint8)
    try:
        block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"a tensor of {size} bytes does not fit") from error
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # a kernel without pages of 2 MB, which make for fewer page faults
            block.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(block, dtype=torch.uint8)


def write_tensor_file(
    path: Path,
    tensors: Mapping[str, LazyTensor],
    *,
    on_tensor: Callable[[str, int], None] | None = None,
    known: dict[Hashable, bytes] | None = None,
) -> FileRecord:
    """Write ``tensors`` to the new file ``path``, making, writing and dropping one after the other.

    Same tensors, same bytes: in the order of the mapping, wide dtypes first. ``on_tensor(name, bytes)`` is called after
    each. ``known`` remembers the hashes of keys for the next file. OSError as the system raises it.
    """
    # Readers view the bytes in place, so each tensor must start at a multiple of its item size.
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
    header = _header(tensors)
    leaves = [Leaf(len(header)), *(leaf for lazy in tensors.values() for leaf in _leaves(lazy))]
    with HashedFile(path, TreeHasher(leaves, {} if known is None else known)) as file:
        file.write(header)
        for name, lazy in tensors.items():
            _write_tensor(file, name, lazy)
            if on_tensor is not None:
                on_tensor(name, lazy.nbytes)
    return file.record


def _leaves(lazy: LazyTensor) -> list[Leaf]:
    sizes = leaf_sizes(lazy.shape, lazy.dtype.itemsize)
    if not lazy.keys:
        return [Leaf(size) for size in sizes]
    return [Leaf(size, key) for size, key in zip(sizes, lazy.keys, strict=True)]


def _header(tensors: Mapping[str, LazyTensor]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, lazy in tensors.items():
        end = position + lazy.nbytes
        header[name] = {"dtype": NAMES[lazy.dtype], "shape": list(lazy.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    assert len(text) <= MAX_HEADER_BYTES, f"a header of {len(text)} bytes is not readable: write smaller shards"
    return len(text).to_bytes(8, "little") + text


def _write_tensor(file: HashedFile, name: str, lazy: LazyTensor) -> None:
    made = lazy.make()
    if isinstance(made, Tensor):
        actual, announced = (tuple(made.shape), made.dtype), (lazy.shape, lazy.dtype)
        assert actual == announced, f"{name}: {actual} was made, {announced} announced"
        made = (made,)
    pieces, written = iter(made), 0
    del made
    while (count := _write_piece(file, name, lazy, pieces)) is not None:
        written += count
    assert written == lazy.nbytes, f"{name}: {written} bytes were made, {lazy.nbytes} announced"


def _write_piece(file: HashedFile, name: str, lazy: LazyTensor, pieces: Iterator[Tensor]) -> int | None:
    # A function of its own, so that each piece is dropped before the next one is made.
    piece = next(pieces, None)
    if piece is None:
        return None
    assert piece.dtype == lazy.dtype, f"{name}: a piece of {piece.dtype} was made, {lazy.dtype} announced"
    data = piece.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    file.write(data.numpy().data)
    return len(data)
