"""Tokens travel to the ranks that have their experts, and between ranks that have the same tokens.

Letters: T tokens, t tokens of this rank's share, K experts a token, D model width, E experts, e experts of this rank,
N assignments that are computed, sorted by rank and expert, R rows that arrived here, n ranks, s slices of an expert.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed import ProcessGroup
from torch.nn import functional

from moewright.moe.dispatch import combine, dispatch
from moewright.moe.exchange import Delivery, Exchange, Permutation, sort_by_expert
from moewright.moe.precision import autocast_dtype


class _Journey:
    """Rows on their way to the ranks of a group, so many `to` each, and so many `back` from each."""

    def __init__(self, to: list[int], back: list[int], group: ProcessGroup) -> None:
        self.to, self.back, self.group = to, back, group
        self._under_way: tuple[dist.Work | None, Tensor, Tensor] | None = None

    def begin(self, rows: Tensor, *, returning: bool = False) -> Tensor:
        """The rows that come, which are there only after `end`."""
        to, back = (self.back, self.to) if returning else (self.to, self.back)
        rows, received = rows.contiguous(), rows.new_empty(sum(back), *rows.shape[1:])
        work = dist.all_to_all_single(received, rows, back, to, group=self.group, async_op=True)
        self._under_way = work, rows, received  # the rows' memory is read until they are there
        return received

    def end(self) -> Tensor:
        """The same, once they are there."""
        assert self._under_way is not None, "it has begun"
        work, _, received = self._under_way
        if work is not None:
            work.wait()
        self._under_way = None
        return received


class _Depart(torch.autograd.Function):
    """Begins a journey; its backward waits for the gradients that `_Arrive` has sent back.

    What is computed between the two, in either direction, hides the time on the way: autograd goes from what was
    computed last to what was computed first.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, journey: _Journey) -> Tensor:
        ctx.journey = journey
        return journey.begin(rows)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.journey.end(), None


class _Arrive(torch.autograd.Function):
    """Ends a journey; its backward begins the way back, and what it returns only has the shape of a gradient."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, journey: _Journey) -> Tensor:
        ctx.journey = journey
        journey.end()
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.journey.begin(gradient, returning=True)
        return gradient, None


class _Ticket(NamedTuple):
    journey: _Journey
    permutation: Permutation
    weights_TK: Tensor


class AllToAllExchange:
    """An `Exchange` over the ranks of a group: each run of `slices` neighbours holds equally many experts, in their
    order, and each of the run its slice of their width.

    A row for each assignment goes to all ranks that have its expert, and comes back from each as the output of that
    slice; the sums over slices and over a token's choices are formed where the token is, in the precision of one
    process. Numbers of tokens may differ from rank to rank and be 0; all ranks of the group must come by equally often.
    """

    def __init__(self, num_experts: int, group: ProcessGroup, *, slices: int = 1) -> None:
        self.num_experts, self.group, self.slices = num_experts, group, slices
        self.ranks = group.size()
        assert num_experts * slices % self.ranks == 0, "apply has refused it"

    def send(self, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, kept_TK: Tensor | None) -> Delivery:
        experts_TK, weights_TK, kept_TK = self._for_each_slice(experts_TK, weights_TK, kept_TK)
        permutation = sort_by_expert(experts_TK, num_experts=self.num_experts * self.slices, kept_TK=kept_TK)
        ends = permutation.ends_E.long()
        sent_ne = torch.diff(ends, prepend=ends.new_zeros(1)).view(self.ranks, -1)
        arriving_ne, to, back = self.counts(sent_ne)

        dtype = autocast_dtype(x_TD)  # the experts cast to it anyway, and fewer bytes travel
        rows_ND = dispatch(x_TD if dtype is None else x_TD.to(dtype), permutation)[: sum(to)]
        journey = _Journey(to, back, self.group)
        rows_RD: Tensor = _Depart.apply(rows_ND, journey)  # type: ignore[no-untyped-call]

        e = arriving_ne.shape[1]
        expert_ne = torch.arange(e, device=x_TD.device).expand(self.ranks, e)
        expert_R = expert_ne.flatten().repeat_interleave(arriving_ne.flatten(), output_size=sum(back))
        return Delivery(
            rows_RD,
            weights_TK.new_ones(sum(back), 1),
            sort_by_expert(expert_R[:, None], num_experts=e),
            _Ticket(journey, permutation, weights_TK),
        )

    def counts(self, sent_ne: Tensor) -> tuple[Tensor, list[int], list[int]]:
        """Of rows that go to each rank and its experts: those that arrive, (n, e), and the sums for each rank."""
        arriving_ne = torch.empty_like(sent_ne)
        dist.all_to_all_single(arriving_ne, sent_ne, group=self.group)
        # The sizes of what follows are needed on the host: the one point at which it waits for the device.
        to, back = torch.stack([sent_ne.sum(1), arriving_ne.sum(1)]).tolist()
        return arriving_ne, to, back

    def _for_each_slice(
        self, experts_TK: Tensor, weights_TK: Tensor, kept_TK: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The same with a choice for each slice of an expert, numbered by rank, then by the place there: (T, K * s)."""
        if self.slices == 1:
            return experts_TK, weights_TK, kept_TK
        e = self.num_experts * self.slices // self.ranks
        slice_s = torch.arange(self.slices, device=experts_TK.device)
        owner_TK, place_TK = experts_TK // e, experts_TK % e
        numbered_TKs = (owner_TK[..., None] * self.slices + slice_s) * e + place_TK[..., None]
        return (
            numbered_TKs.flatten(1),
            weights_TK.repeat_interleave(self.slices, dim=1),
            None if kept_TK is None else kept_TK.repeat_interleave(self.slices, dim=1),
        )

    def arrive(self, delivery: Delivery) -> Delivery:
        rows_RD: Tensor = _Arrive.apply(delivery.rows_RD, delivery.ticket.journey)  # type: ignore[no-untyped-call]
        return delivery._replace(rows_RD=rows_RD)

    def receive(self, ticket: _Ticket, y_RD: Tensor) -> Tensor:
        journey, permutation, weights_TK = ticket
        back = _Journey(journey.back, journey.to, self.group)
        y_ND: Tensor = _Arrive.apply(_Depart.apply(y_RD, back), back)  # type: ignore[no-untyped-call]
        missing = weights_TK.numel() - len(y_ND)  # assignments of no expert, whose weight is 0
        return combine(functional.pad(y_ND, (0, 0, 0, missing)), weights_TK, permutation)


class Share(torch.autograd.Function):
    """This rank's share along a dim of what all have; its gradient is put together from theirs."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, dim: int, group: ProcessGroup) -> Tensor:
        ctx.size, ctx.dim, ctx.group = whole.shape[dim], dim, group
        return _share(whole, dim, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _gathered(gradient, ctx.size, ctx.dim, ctx.group), None, None


class Gather(torch.autograd.Function):
    """What all shares make up, `size` along a dim; all ranks have the same gradient, and each takes its share."""

    @staticmethod
    def forward(ctx: Any, share: Tensor, size: int, dim: int, group: ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _gathered(share, size, dim, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _share(gradient, ctx.dim, ctx.group), None, None, None


def _share(whole: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """Shares are as DTensor makes them: equally large, but for the last ones."""
    size = whole.shape[dim]
    each = -(-size // group.size())
    first = min(each * group.rank(), size)
    return whole.narrow(dim, first, min(each, size - first)).contiguous()


def _gathered(share: Tensor, size: int, dim: int, group: ProcessGroup) -> Tensor:
    if not size:
        return share.clone()
    missing = list(share.shape)
    missing[dim] = -(-size // group.size()) - share.shape[dim]
    padded = torch.cat([share, share.new_zeros(missing)], dim).contiguous()
    shares = [torch.empty_like(padded) for _ in range(group.size())]
    dist.all_gather(shares, padded, group=group)
    joined = torch.cat(shares, dim)
    # All padding stands at the end. A copy, for FSDP2 wants no view as the output of a module.
    return joined if joined.shape[dim] == size else joined.narrow(dim, 0, size).clone()


class SharedTokens:
    """An `Exchange` where the ranks of a group have the same tokens: each sends its share through another exchange.

    So an expert computes a token once (the dropping of duplicates in DeepSpeed-TED, arXiv 2303.06318, section 5.1).
    Afterwards all have the outputs of all again.
    """

    def __init__(self, exchange: Exchange, group: ProcessGroup) -> None:
        self.exchange, self.group = exchange, group

    def send(self, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, kept_TK: Tensor | None) -> Delivery:
        x_tD: Tensor = Share.apply(x_TD, 0, self.group)  # type: ignore[no-untyped-call]
        weights_tK: Tensor = Share.apply(weights_TK, 0, self.group)  # type: ignore[no-untyped-call]
        experts_tK = _share(experts_TK, 0, self.group)
        kept_tK = None if kept_TK is None else _share(kept_TK, 0, self.group)
        delivery = self.exchange.send(x_tD, experts_tK, weights_tK, kept_tK)
        return delivery._replace(ticket=(len(x_TD), delivery.ticket))

    def arrive(self, delivery: Delivery) -> Delivery:
        tokens, inner = delivery.ticket
        return self.exchange.arrive(delivery._replace(ticket=inner))._replace(ticket=(tokens, inner))

    def receive(self, ticket: tuple[int, Any], y_RD: Tensor) -> Tensor:
        tokens, inner = ticket
        y_tD = self.exchange.receive(inner, y_RD)
        y_TD: Tensor = Gather.apply(y_tD, tokens, 0, self.group)  # type: ignore[no-untyped-call]
        return y_TD
