"""What is private in torch, and of what use it is here. Checked with torch 2.13."""

from torch import Tensor
from torch.distributed.tensor import DTensor, Placement
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor.placement_types import _StridedShard


def joined_shard(dim: int, *, joined: int) -> Placement:
    """Of so many equally large tensors, joined along `dim`, each is divided: a rank holds its part of every one."""
    return _StridedShard(dim, split_factor=joined)  # the name that `fully_shard` uses, and parameters are saved under


def part_elsewhere(part: Tensor, like: DTensor) -> DTensor:
    """A DTensor of the shape and placement of `like` whose part stays on its device, which may not be the mesh's.

    `DTensor.from_local` would move it there. FSDP2 makes such tensors itself of parameters that it offloads.
    """
    meta = TensorMeta(like.shape, like.stride(), part.dtype)
    spec = DTensorSpec(like.device_mesh, tuple(like.placements), tensor_meta=meta)
    return DTensor(part, spec, requires_grad=False)
