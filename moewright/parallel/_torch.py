"""What of torch has no public name. Checked on 2.13.0."""

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta


def part_elsewhere(part: Tensor, like: DTensor) -> DTensor:
    """A DTensor of the shape and placement of `like` whose part stays on its device, which may not be the mesh's.

    `DTensor.from_local` would move it there. FSDP2 makes such tensors itself of parameters that it offloads.
    """
    meta = TensorMeta(like.shape, like.stride(), part.dtype)
    spec = DTensorSpec(like.device_mesh, tuple(like.placements), tensor_meta=meta)
    return DTensor(part, spec, requires_grad=False)
