"""Private names of torch that other modules need, with the reason for each. Checked with torch 2.13."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Final

import torch
from torch import Tensor
from torch import distributed as dist
from torch._C._distributed_c10d import _resolve_process_group
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.distributed_c10d import GroupName, _set_pg_timeout
from torch.distributed.tensor import DTensor, Placement
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor.placement_types import _StridedShard
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode

REDUCTIONS: Final = ("sum", "avg", "product", "min", "max")


def joined_shard(dim: int, *, joined: int) -> Placement:
    """Of so many equally large tensors, joined along `dim`, each is divided: a rank holds its part of every one."""
    return _StridedShard(dim, split_factor=joined)  # the name that `fully_shard` uses, and parameters are saved under


@contextmanager
def simulated_ranks(ranks: int) -> Iterator[None]:
    """Make this process the first of so many whose collectives do nothing; there must be no process group yet."""
    # Not for every run: one registers the backend, the other what collectives return of tensors without memory.
    from torch.distributed._tools import fake_collectives  # noqa: F401
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def without_memory() -> FakeTensorMode:
    """A context in which tensors are made, and computed with, that have a device and no memory."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def group_name(argument: Any) -> str | None:
    """The name of the process group that is an argument of a collective operator; None for other arguments."""
    if isinstance(argument, str):
        return None if argument in REDUCTIONS else argument
    if isinstance(argument, torch.ScriptObject) and "ProcessGroup" in str(argument._type()):
        return str(dist.ProcessGroup.unbox(argument).group_name)
    return None


def set_timeout(group: dist.ProcessGroup, timeout: timedelta) -> None:
    """How long collectives of a group wait from now on; `init_device_mesh` cannot be told."""
    if dist.get_backend(group) != "fake":
        _set_pg_timeout(timeout, group)


def group_size(name: str) -> int:
    """The number of ranks of a group."""
    return int(_resolve_process_group(GroupName(name)).size())


def part_elsewhere(part: Tensor, like: DTensor) -> DTensor:
    """A DTensor of the shape and placement of `like` whose part stays on its device, which may not be the mesh's.

    `DTensor.from_local` would move it there. FSDP2 makes such tensors itself of parameters that it offloads.
    """
    meta = TensorMeta(like.shape, like.stride(), part.dtype)
    spec = DTensorSpec(like.device_mesh, tuple(like.placements), tensor_meta=meta)
    return DTensor(part, spec, requires_grad=False)
