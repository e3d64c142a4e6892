"""Tensors that lie in several files: pieces of them, and an index that says which box of which tensor is where.

A piece is a box of a tensor: with its bounds in its name, as ``model.w[0:2,0:8]``, it is a tensor of its own in one
file. The files are numbered; their numbers are no part of a tensor's name, so that any process can read any box,
whoever wrote it. The boxes of a tensor hold each of its elements exactly once: an index that says otherwise is refused.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from moewright.checkpoint.files import FileRecord
from moewright.checkpoint.tensorfile import (
    DTYPES,
    NAMES,
    LazyTensor,
    TensorInfo,
    memory,
    read_header,
    read_tensor,
    write_tensor_file,
)
from moewright.checkpoint.untrusted import read_json
from moewright.errors import CheckpointError

KEY: Final = re.compile(r"(.+)\[((?:\d+:\d+(?:,\d+:\d+)*)?)\]", re.DOTALL)


class Box(NamedTuple):
    """Where a piece lies: in which file, and the first place of each dim of its tensor, and the one after the last."""

    file: int
    start: tuple[int, ...]
    stop: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""
        return tuple(stop - start for start, stop in zip(self.start, self.stop, strict=True))

    @property
    def numel(self) -> int:
        """Its number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Piece:
    """A piece of a tensor that is to be written."""

    name: str
    start: tuple[int, ...]
    values: LazyTensor

    @property
    def key(self) -> str:
        """Its name in its file."""
        return _key(self.name, self.start, [a + b for a, b in zip(self.start, self.values.shape, strict=True)])


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of which pieces lie in files."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    boxes: tuple[Box, ...]


def write_pieces(path: Path, pieces: Iterable[Piece]) -> FileRecord:
    """Write one file of pieces, each made when its turn comes; OSError as the system raises it."""
    return write_tensor_file(path, {piece.key: piece.values for piece in pieces})


def index_of(files: Sequence[Path], shapes: Mapping[str, tuple[int, ...]]) -> bytes:
    """The index of the pieces that the headers of ``files`` name, of tensors of these shapes, as JSON.

    Tensors that are cut alike share their list of boxes, since a model has many of them.

    CheckpointError unless every tensor is there exactly once.
    """
    boxes: dict[str, list[Box]] = {name: [] for name in shapes}
    dtypes: dict[str, set[torch.dtype]] = {name: set() for name in shapes}
    for number, file in enumerate(files):
        for key, info in read_header(file).items():
            name, start, stop = _parsed(key)
            boxes[name].append(Box(number, start, stop))
            dtypes[name].add(info.dtype)
    layouts: dict[tuple[Box, ...], int] = {}
    tensors = {}
    for name, shape in shapes.items():
        _require_exact(name, shape, boxes[name])
        (dtype,) = dtypes[name]
        layout = layouts.setdefault(tuple(boxes[name]), len(layouts))
        tensors[name] = [NAMES[dtype], list(shape), layout]
    return (json.dumps({"layouts": list(layouts), "tensors": tensors}, separators=(",", ":")) + "\n").encode()


def read_index(path: Path, *, files: int) -> dict[str, StoredTensor]:
    """Read an index that `index_of` made, of so many files.

    CheckpointError if it is none, or does not have every element of every tensor exactly once; ModelError and OSError
    if it cannot be read.
    """
    index = read_json(path)
    try:
        layouts = [tuple(_box(entry, files) for entry in layout) for layout in index["layouts"]]
        tensors = {}
        for name, (dtype, shape, layout) in index["tensors"].items():
            _require_naturals(shape)
            tensors[name] = StoredTensor(tuple(shape), DTYPES[dtype], layouts[layout])
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path.name} is damaged ({type(error).__name__}: {error})") from error
    checked = set()
    for name, tensor in tensors.items():
        if (alike := (tensor.shape, id(tensor.boxes))) not in checked:
            _require_exact(name, tensor.shape, tensor.boxes)
            checked.add(alike)
    return tensors


def whole_tensors(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a file that has them whole, under their own names."""
    return {
        name: StoredTensor(info.shape, info.dtype, (Box(0, (0,) * len(info.shape), info.shape),))
        for name, info in read_header(file).items()
    }


class ShardReader:
    """Reads boxes of tensors out of the files of a folder, and of these only the bytes that are needed."""

    def __init__(self, files: Sequence[Path], tensors: Mapping[str, StoredTensor], *, keyed: bool = True) -> None:
        """``keyed``: whether the names in files have bounds, as those of pieces do."""
        self.files, self.tensors, self.keyed = files, tensors, keyed
        self._headers: dict[int, dict[str, TensorInfo]] = {}

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> Tensor:
        """A tensor, or the part ``index`` of it (a slice for each of the first dims), in memory of its own.

        CheckpointError, ModelError or OSError if a file is not as the index says.
        """
        stored = self.tensors[name]
        slices = (*(index or ()), *(slice(None) for _ in stored.shape[len(index or ()) :]))
        wanted = [range(size)[part] for size, part in zip(stored.shape, slices, strict=True)]
        shape = tuple(len(held) for held in wanted)
        whole = None
        for box in stored.boxes:
            bounds = zip(wanted, box.start, box.stop, strict=True)
            met = [range(max(held.start, start), min(held.stop, stop)) for held, start, stop in bounds]
            if not all(met):
                continue
            part = read_tensor(self._info(name, box), _slices(met, box.start))
            if part.shape == shape:
                return part
            if whole is None:
                whole = memory(math.prod(shape) * stored.dtype.itemsize).view(stored.dtype).reshape(shape)
            whole[_slices(met, [held.start for held in wanted])] = part
        return torch.empty(shape, dtype=stored.dtype) if whole is None else whole

    def _info(self, name: str, box: Box) -> TensorInfo:
        file = self.files[box.file]
        if box.file not in self._headers:
            self._headers[box.file] = read_header(file)
        info = self._headers[box.file].get(_key(name, box.start, box.stop) if self.keyed else name)
        if info is None or (info.shape, info.dtype) != (box.shape, self.tensors[name].dtype):
            raise CheckpointError(f"{file.name} does not have the piece of {name} that the index says")
        return info


def _slices(met: Sequence[range], origin: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(held.start - at, held.stop - at) for held, at in zip(met, origin, strict=True))


def _key(name: str, start: Sequence[int], stop: Sequence[int]) -> str:
    return f"{name}[{','.join(f'{a}:{b}' for a, b in zip(start, stop, strict=True))}]"


def _parsed(key: str) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
    match = KEY.fullmatch(key)
    assert match is not None, f"{key} is not the name of a piece"
    bounds = [tuple(map(int, dim.split(":"))) for dim in match[2].split(",") if dim]
    return match[1], tuple(start for start, _ in bounds), tuple(stop for _, stop in bounds)


def _box(entry: Any, files: int) -> Box:
    number, start, stop = entry
    _require_naturals([number, *start, *stop])
    if number >= files or any(a > b for a, b in zip(start, stop, strict=True)):
        raise ValueError(f"{entry} is no box")
    return Box(number, tuple(start), tuple(stop))


def _require_naturals(values: Any) -> None:
    if not (isinstance(values, list) and all(type(value) is int and 0 <= value < 2**48 for value in values)):
        raise ValueError(f"{values} are not sizes")


def _require_exact(name: str, shape: tuple[int, ...], boxes: Sequence[Box]) -> None:
    """CheckpointError unless the boxes, put together, are the tensor."""
    for box in boxes:
        if len(box.stop) != len(shape) or any(stop > size for stop, size in zip(box.stop, shape, strict=True)):
            raise CheckpointError(f"{_key(name, box.start, box.stop)} does not lie in a tensor of shape {list(shape)}")
    filled = [box for box in boxes if box.numel]
    if double := _overlap(filled):
        first, second = double
        raise CheckpointError(
            f"{_key(name, first.start, first.stop)} of file {first.file} and "
            f"{_key(name, second.start, second.stop)} of file {second.file} have elements in common"
        )
    if (missing := math.prod(shape) - sum(box.numel for box in filled)) or not boxes:
        raise CheckpointError(f"{missing} of the {math.prod(shape)} elements of {name} are in no file")


def _overlap(boxes: Sequence[Box]) -> tuple[Box, Box] | None:
    """Two boxes that overlap, found by a sweep over the dim in which most of them begin at places of their own."""
    if len(boxes) < 2:
        return None
    if not boxes[0].start:
        return boxes[0], boxes[1]  # a number twice
    dim = max(range(len(boxes[0].start)), key=lambda dim: len({box.start[dim] for box in boxes}))
    open_: list[Box] = []
    for box in sorted(boxes, key=lambda box: box.start[dim]):
        open_ = [other for other in open_ if other.stop[dim] > box.start[dim]]
        for other in open_:
            bounds = zip(box.start, box.stop, other.start, other.stop, strict=True)
            if all(max(a, c) < min(b, d) for a, b, c, d in bounds):
                return other, box
        open_.append(box)
    return None
