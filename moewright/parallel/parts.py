"""Parts of tensors: the one that a rank holds, and the way of any part to the first rank.

A parameter that is divided among ranks is a DTensor; every other tensor is whole on every rank.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate

from moewright.backbone.slots import Box, Bring, Index, here
from moewright.parallel._torch import part_elsewhere
from moewright.parallel.experts import local_part
from moewright.parallel.ranks import Ranks

T = TypeVar("T")
DONE: Final = -1
MOST_DIMS: Final = 4


def boxes_of(tensor: Tensor) -> list[Box]:
    """What this rank holds of a tensor; several boxes where its part consists of rows that lie apart.

    A rank that holds nothing has one box, which is empty.
    """
    pieces = [[range(size)] for size in tensor.shape]
    if isinstance(tensor, DTensor):
        mesh, coordinate = tensor.device_mesh, tensor.device_mesh.get_coordinate()
        assert coordinate is not None, "a rank outside of the mesh"
        inner = [1] * tensor.dim()  # ranks of later axes that share a dim
        # From the last axis of the mesh to the first: experts and slices are divided first, then sharded.
        for axis, placement in reversed(list(enumerate(tensor.placements))):
            if not isinstance(placement, Replicate):
                dim: int = placement.dim  # type: ignore[attr-defined]  # Shard's and _StridedShard's
                # What is left of a split factor counts tensors that were joined, each of which is divided.
                joined = getattr(placement, "split_factor", 1) // inner[dim] or 1
                parts = pieces[dim] if joined == 1 else _cut(pieces[dim], joined)
                groups = [parts] if joined == 1 else [[part] for part in parts]
                pieces[dim] = [
                    piece for group in groups for piece in _chunk(group, ranks=mesh.size(axis), rank=coordinate[axis])
                ]
                inner[dim] *= mesh.size(axis)
    places = [_places(parts or [range(0)]) for parts in pieces]
    return [Box(tuple(w for w, _ in dims), tuple(h for _, h in dims)) for dims in itertools.product(*places)]


def _cut(parts: list[range], count: int) -> list[range]:
    """As many equal parts of one range."""
    (held,) = parts
    each, rest = divmod(len(held), count)
    assert rest == 0, "joined tensors have equally many rows"
    return [held[each * number : each * (number + 1)] for number in range(count)]


def _chunk(parts: list[range], *, ranks: int, rank: int) -> list[range]:
    """A rank's chunk, as `torch.chunk` makes them, of ranges one behind the other."""
    each = -(-sum(map(len, parts)) // ranks)
    first, mine = each * rank, []
    for part in parts:
        mine.append(part[max(0, first) : max(0, first + each)])
        first -= len(part)
    return [part for part in mine if part]


def _places(parts: list[range]) -> list[tuple[slice, slice]]:
    """Where each range lies in the whole dim, and where in the part that is here."""
    places, end = [], 0
    for part in parts:
        places.append((slice(part.start, part.stop), slice(end, end + len(part))))
        end += len(part)
    return places


def with_part(like: Tensor, part: Tensor) -> Tensor:
    """The tensor of the shape and placement of `like` of which this rank holds `part`."""
    if not isinstance(like, DTensor):
        return part
    if part.device.type not in (like.device_mesh.device_type, "meta"):
        return part_elsewhere(part, like)
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def slice_of(tensor: Tensor, mesh: DeviceMesh, placement: Placement) -> DTensor:
    """This rank's part of a tensor that is the same on all ranks, or on meta, divided on the one axis of `mesh`."""

    def with_local(part: Tensor) -> DTensor:
        return DTensor.from_local(part, mesh, [placement], run_check=False, shape=tensor.shape, stride=tensor.stride())

    boxes = boxes_of(with_local(tensor.new_empty(0)))
    part = tensor.new_empty([max(held.stop for held in dim) for dim in zip(*(b.local for b in boxes), strict=True)])
    for box in boxes:
        part[box.local] = tensor[box.whole]
    return with_local(part)


def copy_of(tensor: Tensor, ranks: Ranks) -> tuple[int, int]:
    """Which copy of its part this rank holds, counted from 0, and how many copies of it there are."""
    if not isinstance(tensor, DTensor):
        return ranks.rank, ranks.size
    mesh = tensor.device_mesh
    coordinate, siblings = mesh.get_coordinate(), ranks.size // mesh.size()
    assert coordinate is not None, "a rank outside of the mesh"
    # Without the axis `tp`, the last one, there is such a mesh for each place on it.
    mine, copies = int(mesh.mesh.min()) if siblings > 1 else 0, siblings
    assert mine < copies, "the mesh lacks another axis than the last"
    for placement, at, size in zip(tensor.placements, coordinate, tensor.device_mesh.shape, strict=True):
        if isinstance(placement, Replicate):
            mine, copies = mine * size + at, copies * size
    return mine, copies


def written_here(tensors: Mapping[str, Tensor], ranks: Ranks) -> list[str]:
    """The names of the tensors of which this rank writes what it holds, so that each part is written once.

    All ranks give the same names in the same order, and each its parts of the tensors. The ranks that hold copies of
    a part take turns, so that each writes about as many bytes.
    """
    names, loads = [], dict[int, list[int]]()
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].numel()):
        mine, copies = copy_of(tensor, ranks)
        load = loads.setdefault(copies, [0] * copies)
        chosen = load.index(min(load))
        load[chosen] += tensor.numel() * tensor.element_size()
        if chosen == mine:
            names.append(name)
    return names


def whole(tensor: Tensor) -> Tensor:
    """A small tensor, whole on every rank; all must ask for it."""
    if not isinstance(tensor, DTensor):
        return tensor
    # Not `full_tensor`, which knows nothing of joined tensors once `fully_shard` has divided them further.
    joined = _own(tensor, [range(size) for size in tensor.shape])
    dist.all_reduce(_bits(joined))
    return joined


def on_first_rank(tensors: Iterable[Tensor], work: Callable[[Bring], T], *, ranks: Ranks) -> T | None:
    """Let the first rank do `work`, which can have any part of any of `tensors` brought there, one after the other.

    `tensors` are the same on all ranks and in the same order. The others send their parts until the work is done, and
    return None. If it fails, all ranks raise, and the first one's error is the one that tells.
    """
    if ranks.size == 1:
        return work(here)
    divided = [tensor for tensor in tensors if isinstance(tensor, DTensor)]
    result = None
    with ranks.agreeing():
        if not ranks.is_first:
            while (request := _broadcast(torch.empty(1 + 2 * MOST_DIMS, dtype=torch.int64), ranks))[0] != DONE:
                number, *bounds = request
                tensor = divided[number]
                _collect(tensor, [range(*bounds[2 * d : 2 * d + 2]) for d in range(tensor.dim())])
        else:
            try:
                result = work(_Bringer({id(tensor): n for n, tensor in enumerate(divided)}, ranks))
            finally:
                _broadcast(torch.full((1 + 2 * MOST_DIMS,), DONE), ranks)
    return result


@dataclass
class _Bringer:
    """The first rank's side: asks for a part, and joins those that come."""

    numbers: dict[int, int]
    ranks: Ranks

    def __call__(self, tensor: Tensor, index: Index) -> Tensor:
        if not isinstance(tensor, DTensor):
            return here(tensor, index)
        wanted, dropped = [range(size) for size in tensor.shape], []
        for dim, at in enumerate(index):
            if isinstance(at, int):
                wanted[dim] = range(at, at + 1)
                dropped.append(dim)
            else:
                wanted[dim] = wanted[dim][at]
        bounds = [bound for held in wanted for bound in (held.start, held.stop)]
        request = [self.numbers[id(tensor)], *bounds, *[0] * (2 * (MOST_DIMS - len(wanted)))]
        _broadcast(torch.tensor(request), self.ranks)
        whole = _collect(tensor, wanted)
        return whole[tuple(0 if dim in dropped else slice(None) for dim in range(whole.dim()))]


def _broadcast(request: Tensor, ranks: Ranks) -> list[int]:
    """The first rank's request, on all."""
    request = request.to(ranks.device)
    dist.broadcast(request, src=0)
    values: list[int] = request.tolist()
    return values


@torch.no_grad()
def _collect(tensor: DTensor, wanted: list[range]) -> Tensor:
    """On the first rank the part `wanted`, to which each rank gives what it holds of it."""
    joined = _own(tensor, wanted)
    dist.reduce(_bits(joined), dst=0)
    return joined


@torch.no_grad()
def _own(tensor: DTensor, wanted: list[range]) -> Tensor:
    """The part `wanted`, with zeros for what this rank does not hold, or a rank before it does."""
    local = local_part(tensor)
    joined = local.new_zeros([len(held) for held in wanted])
    is_copy = copy_of(tensor, Ranks(rank=dist.get_rank(), size=dist.get_world_size()))[0] > 0
    for box in [] if is_copy else boxes_of(tensor):
        meeting = [
            range(max(its.start, held.start), min(its.stop, held.stop))
            for its, held in zip(wanted, box.whole, strict=True)
        ]
        if all(meeting):
            to = tuple(slice(m.start - its.start, m.stop - its.start) for m, its in zip(meeting, wanted, strict=True))
            of = tuple(
                slice(m.start - held.start, m.stop - held.start) for m, held in zip(meeting, box.whole, strict=True)
            )
            joined[to] = local[box.local][of]
    return joined


def _bits(tensor: Tensor) -> Tensor:
    """Its memory as whole numbers, to be added up: one rank has the bits of an element, and all others have zeros."""
    bits = tensor.flatten().view(torch.uint8)
    return bits.view(torch.int32) if len(bits) % 4 == 0 else bits
