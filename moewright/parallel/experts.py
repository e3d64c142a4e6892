"""Experts divided among ranks: each holds its own, and tokens travel.

Letters: T tokens, K experts a token, D model width, E experts, e experts of this rank, N assignments that are computed,
sorted by expert, R rows that arrived here, n ranks.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn import functional

from moewright.moe.dispatch import combine, dispatch
from moewright.moe.exchange import Delivery, Permutation, sort_by_expert
from moewright.moe.layer import MoELayer
from moewright.moe.precision import autocast_dtype


class _AllToAll(torch.autograd.Function):
    """Rows to the ranks, so many to each, and so many from each; gradients go the way back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, to: list[int], back: list[int], group: ProcessGroup) -> Tensor:
        ctx.to, ctx.back, ctx.group = to, back, group
        received = rows.new_empty(sum(back), *rows.shape[1:])
        dist.all_to_all_single(received, rows.contiguous(), back, to, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        returned: Tensor = _AllToAll.apply(gradient, ctx.back, ctx.to, ctx.group)  # type: ignore[no-untyped-call]
        return returned, None, None, None


class _Ticket(NamedTuple):
    to: list[int]
    back: list[int]
    permutation: Permutation
    weights_TK: Tensor


class AllToAllExchange:
    """An `Exchange` over the ranks of a group, each of which holds equally many experts, in their order.

    A row for each assignment goes to the rank of its expert, and comes back as the expert's output; the sums over a
    token's choices are formed where the token is, in the precision of one process. Numbers of tokens may differ from
    rank to rank and be 0; all ranks of the group must come by equally often.
    """

    def __init__(self, num_experts: int, group: ProcessGroup) -> None:
        self.num_experts, self.group = num_experts, group
        self.ranks = group.size()
        assert num_experts % self.ranks == 0, "apply has refused it"

    def send(self, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, kept_TK: Tensor | None) -> Delivery:
        permutation = sort_by_expert(experts_TK, num_experts=self.num_experts, kept_TK=kept_TK)
        ends_E = permutation.ends_E.long()
        sent_ne = torch.diff(ends_E, prepend=ends_E.new_zeros(1)).view(self.ranks, -1)
        arriving_ne, to, back = self.counts(sent_ne)

        dtype = autocast_dtype(x_TD)  # the experts cast to it anyway, and fewer bytes travel
        rows_ND = dispatch(x_TD if dtype is None else x_TD.to(dtype), permutation)[: sum(to)]
        rows_RD: Tensor = _AllToAll.apply(rows_ND, to, back, self.group)  # type: ignore[no-untyped-call]

        e = arriving_ne.shape[1]
        expert_ne = torch.arange(e, device=x_TD.device).expand(self.ranks, e)
        expert_R = expert_ne.flatten().repeat_interleave(arriving_ne.flatten(), output_size=sum(back))
        return Delivery(
            rows_RD,
            weights_TK.new_ones(sum(back), 1),
            sort_by_expert(expert_R[:, None], num_experts=e),
            _Ticket(to, back, permutation, weights_TK),
        )

    def counts(self, sent_ne: Tensor) -> tuple[Tensor, list[int], list[int]]:
        """Of rows that go to each rank and its experts: those that arrive, (n, e), and the sums for each rank."""
        arriving_ne = torch.empty_like(sent_ne)
        dist.all_to_all_single(arriving_ne, sent_ne, group=self.group)
        # The sizes of what follows are needed on the host: the one point at which it waits for the device.
        to, back = torch.stack([sent_ne.sum(1), arriving_ne.sum(1)]).tolist()
        return arriving_ne, to, back

    def receive(self, ticket: _Ticket, y_RD: Tensor) -> Tensor:
        to, back, permutation, weights_TK = ticket
        y_ND: Tensor = _AllToAll.apply(y_RD, back, to, self.group)  # type: ignore[no-untyped-call]
        missing = weights_TK.numel() - len(y_ND)  # assignments of no expert, whose weight is 0
        return combine(functional.pad(y_ND, (0, 0, 0, missing)), weights_TK, permutation)


def divide_experts(layer: MoELayer, mesh: DeviceMesh) -> None:
    """Leave each rank of the one-dimensional `mesh` its part of the layer's experts, as DTensors.

    The parameters may be on meta, or hold the values of all experts, the same on all ranks.
    """
    for name, parameter in list(layer.experts.named_parameters()):
        e = len(parameter) // mesh.size()
        first = mesh.get_local_rank() * e
        part = parameter.detach()[first : first + e].clone()
        whole = DTensor.from_local(
            part, mesh, [Shard(0)], run_check=False, shape=parameter.shape, stride=parameter.stride()
        )
        layer.experts.register_parameter(name, nn.Parameter(whole, requires_grad=parameter.requires_grad))
    layer.experts.held = local_part
    if mesh.size() > 1:
        layer.exchange = AllToAllExchange(layer.config.num_experts, mesh.get_group())


def local_part(tensor: Tensor) -> Tensor:
    """The part of a tensor that is here: all of it unless it is a DTensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
