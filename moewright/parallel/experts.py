"""Experts divided among ranks: each holds its own, or a slice of them.

Letters: D model width, E experts, F expert width, H width of the first product (2F when gated, the gate half first;
else F).
"""

from functools import partial

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Shard
from torch.nn import functional

from moewright.moe.exchange import Exchange, LocalExchange
from moewright.moe.experts import Experts
from moewright.moe.layer import MoELayer
from moewright.parallel._torch import joined_shard
from moewright.parallel.exchange import AllToAllExchange, SharedTokens
from moewright.parallel.mesh import Meshes


def divide_experts(layer: MoELayer, meshes: Meshes) -> None:
    """Leave each rank its part of the layer's experts, as DTensors on the axes `ep` and `etp` of the experts' mesh.

    | parameter | `ep` | `etp` |
    |---|---|---|
    | first (E, H, D), and its bias (E, H) | experts | units F: of gate and of up, the same |
    | down (E, D, F) | experts | units F |
    | bias of down (E, D) | experts | outputs D, so that the sum over slices adds it once |

    The parameters may be on meta, or hold the values of all experts, the same on all ranks.
    """
    degrees = meshes.degrees
    # fully_shard knows a mesh of one axis or two, and one is simpler to read where the other has one rank.
    mesh = meshes.experts["ep", "etp"] if degrees.etp > 1 else meshes.experts["ep"]
    for name, parameter in list(layer.experts.named_parameters()):
        part = _part(parameter.detach(), 0, degrees.ep, meshes.experts.get_local_rank("ep"))
        placements: list[Placement] = [Shard(0)]
        if degrees.etp > 1:
            dim, joined = _sliced(layer.experts, name)
            parts = part.unflatten(dim, (joined, -1))
            part = _part(parts, dim + 1, degrees.etp, meshes.experts.get_local_rank("etp")).flatten(dim, dim + 1)
            placements.append(joined_shard(dim, joined=joined) if joined > 1 else Shard(dim))
        whole = DTensor.from_local(
            part.clone(), mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
        )
        layer.experts.register_parameter(name, nn.Parameter(whole, requires_grad=parameter.requires_grad))
    layer.experts.held = partial(_held, slices=degrees.etp, number=meshes.experts.get_local_rank("etp"))

    exchange: Exchange = LocalExchange(layer.config.num_experts)
    if degrees.ep * degrees.etp > 1:
        exchange = AllToAllExchange(layer.config.num_experts, meshes.travel, slices=degrees.etp)
    layer.exchange = SharedTokens(exchange, meshes.dense.get_group("tp")) if degrees.tp > 1 else exchange


def _sliced(experts: Experts, name: str) -> tuple[int, int]:
    """The dim of a parameter that `etp` divides, and how many tensors are joined along it."""
    if name == "down_proj":
        return 2, 1
    return 1, 2 if experts.gated and name.startswith(experts.first_name) else 1


def _part(tensor: Tensor, dim: int, count: int, number: int) -> Tensor:
    """One of so many parts along a dim, as DTensor makes them: the last ones may be smaller, or empty."""
    size = tensor.shape[dim]
    each = -(-size // count)
    first = min(each * number, size)
    return tensor.narrow(dim, first, min(each, size - first))


def _held(name: str, parameter: Tensor, *, slices: int, number: int) -> Tensor:
    """What this rank computes with: the bias of down with zeros for the outputs that other slices add it to."""
    part = local_part(parameter)
    if slices == 1 or name != "down_proj_bias":
        return part
    D = parameter.shape[1]
    before = min(-(-D // slices) * number, D)
    return functional.pad(part, (before, D - before - part.shape[1]))


def local_part(tensor: Tensor) -> Tensor:
    """The part of a tensor that is here: all of it unless it is a DTensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
