"""The seam between routing and experts: free of cost at home, and wide enough for experts on other ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist

from moewright.moe.exchange import Delivery, LocalExchange, sort_by_expert
from tests.options import OPTIONS, Changes, D, E, layer_of
from tests.ranks import on_ranks

HERE = E // 2
"""Experts on each of the two ranks."""


class AllToAll(torch.autograd.Function):
    """Rows to the ranks, so many to each, and so many from each."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, to: list[int], back: list[int]) -> Tensor:
        ctx.to, ctx.back = to, back
        received = rows.new_empty(sum(back), *rows.shape[1:])
        dist.all_to_all_single(received, rows.contiguous(), back, to)
        return received

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return AllToAll.apply(gradient, ctx.back, ctx.to), None, None


class TwoRanks:
    """Experts in two halves: a row for each assignment goes to the rank of its expert, with its combine weight."""

    def __init__(self) -> None:
        self.sent: list[list[int]] = []

    def send(self, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, kept_TK: Tensor | None) -> Delivery:
        by_expert = sort_by_expert(experts_TK, num_experts=E, kept_TK=kept_TK)
        ends = by_expert.ends_E.tolist()
        to = [ends[HERE - 1], ends[-1] - ends[HERE - 1]]
        back = AllToAll.apply(torch.tensor(to), [1, 1], [1, 1]).tolist()
        token_N, order_N = by_expert.token_N[: ends[-1]], by_expert.order_N[: ends[-1]]
        expert_R = AllToAll.apply(experts_TK.flatten()[order_N], to, back)
        weights_R1 = AllToAll.apply(weights_TK.flatten()[order_N][:, None], to, back)
        rows_RD = AllToAll.apply(x_TD[token_N], to, back)
        permutation = sort_by_expert(expert_R[:, None] - HERE * dist.get_rank(), num_experts=HERE)
        self.sent.append(to)
        return Delivery(rows_RD, weights_R1, permutation, (to, back, token_N, len(x_TD)))

    def arrive(self, delivery: Delivery) -> Delivery:
        return delivery

    def receive(self, ticket: Any, y_RD: Tensor) -> Tensor:
        to, back, token_N, tokens = ticket
        y_ND = AllToAll.apply(y_RD, back, to)
        return y_ND.new_zeros(tokens, y_ND.shape[1]).index_add(0, token_N, y_ND)


CASES: dict[str, tuple[Changes, tuple[int, int]]] = {
    "uneven": ({"top_k": 3}, (9, 4)),
    "no token on one rank": ({}, (7, 0)),
    "no token anywhere": ({}, (0, 0)),
    "nothing to one rank": ({"router_bias": True}, (5, 6)),
    "biases and the compiled kernel": ({"expert_bias": True, "kernel": "native"}, (6, 11)),
    "dropped, masked, shared, with losses": (
        {**OPTIONS["capacity"], **OPTIONS["renormalize"], "shared_size": 5, "balance_loss": 0.25, "z_loss": 0.125},
        (13, 10),
    ),
    "experts choose": (OPTIONS["expert choice"], (8, 3)),
}


def passed(layer: nn.Module, x: Tensor, name: str) -> Tensor:
    """Output of one rank's tokens, after the backward pass of a loss that tells them apart."""
    if name.startswith("dropped"):
        layer.context.token_mask = torch.arange(len(x)) % 4 != 1
    y = layer(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return y.detach()


def split_layer_equals_whole(rank: int) -> None:
    for name, (changes, counts) in CASES.items():
        whole, split = layer_of(changes), layer_of(changes)
        if name == "nothing to one rank":
            for layer in (whole, split):
                layer.router.linear_bias.data[HERE:] = 100.0
        split.exchange = TwoRanks()
        mine = slice(rank * HERE, (rank + 1) * HERE)
        for experts in dict(split.experts.named_parameters()):
            setattr(split.experts, experts, nn.Parameter(getattr(split.experts, experts)[mine].detach().clone()))
        generator = torch.Generator().manual_seed(1)
        inputs = [torch.randn(n, D, generator=generator, dtype=torch.float64).requires_grad_() for n in counts]
        mine_x = inputs[rank].detach().clone().requires_grad_()

        outputs = [passed(whole, x, name) for x in inputs]
        y = passed(split, mine_x, name)

        close(y, outputs[rank], name)
        close(mine_x.grad, inputs[rank].grad, name)
        wanted = dict(whole.named_parameters())
        for parameter_name, parameter in split.named_parameters():
            right = wanted[parameter_name].grad
            if parameter_name.startswith("experts."):
                close(parameter.grad, right[mine], f"{name}: {parameter_name}")
            else:  # each rank has the part of its own tokens
                dist.all_reduce(parameter.grad)
                close(parameter.grad, right, f"{name}: {parameter_name}")
        (sent,) = split.exchange.sent
        if name == "nothing to one rank":
            assert sent == [0, 2 * counts[rank]]
        if name == "uneven":
            assert sent[0] != sent[1]
            assert min(sent) > 0


def close(actual: Tensor, right: Tensor, what: str) -> None:
    torch.testing.assert_close(actual, right, rtol=1e-10, atol=1e-12, msg=lambda text: f"{what}: {text}")


def test_experts_on_two_ranks_behind_another_exchange_compute_the_same(tmp_path: Path) -> None:
    on_ranks(split_layer_equals_whole, tmp_path)


@pytest.mark.parametrize("partial", [False, True])
def test_the_local_exchange_copies_nothing(partial: bool) -> None:
    x, weights = torch.randn(5, D), torch.rand(5, 2)
    experts = torch.randint(0, E, (5, 2))
    kept = torch.rand(5, 2) > 0.5 if partial else None
    exchange = LocalExchange(E)
    rows, sent_weights, permutation, ticket = exchange.send(x, experts, weights, kept)
    assert rows is x
    assert sent_weights is weights
    for one, other in zip(permutation, sort_by_expert(experts, num_experts=E, kept_TK=kept), strict=True):
        assert one is other if isinstance(one, bool) else torch.equal(one, other)
    y = torch.randn(5, D)
    assert exchange.receive(ticket, y) is y
