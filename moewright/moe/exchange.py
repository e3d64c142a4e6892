"""The seam between routing and experts: assignments go to where their experts are, outputs come back.

Letters: T tokens, K experts a token, D model width, E experts, N = T * K assignments sorted by expert, R rows that
arrived here, L choices a row.

An assignment that belongs to no expert (its token is padding, or found no room) is sorted behind all others, so
shapes do not depend on how many there are.
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Permutation(NamedTuple):
    """Where each assignment stands once all are sorted by expert."""

    token_N: Tensor
    """Token of the n-th sorted assignment, int64."""
    position_TK: Tensor
    """Sorted position of a token's k-th choice, int64: the inverse."""
    order_N: Tensor
    """Flat index t * K + k of the n-th sorted assignment, int64."""
    ends_E: Tensor
    """Where each expert's assignments end, int32; expert e owns positions ends[e-1] to ends[e]."""
    partial: bool
    """Whether there may be positions from ends[E-1] on: assignments of no expert."""


def sort_by_expert(experts_TK: Tensor, *, num_experts: int, kept_TK: Tensor | None = None) -> Permutation:
    """Sort assignments by expert, those that are not kept last; within one expert tokens keep their order."""
    T, K = experts_TK.shape
    if kept_TK is not None:
        experts_TK = torch.where(kept_TK, experts_TK, num_experts)
    sorted_N, order_N = experts_TK.flatten().sort(stable=True)
    position_N = torch.empty_like(order_N)
    position_N[order_N] = torch.arange(T * K, device=order_N.device)
    experts_E = torch.arange(num_experts, device=sorted_N.device)
    ends_E = torch.searchsorted(sorted_N, experts_E, right=True, out_int32=True)
    return Permutation(order_N // K, position_N.view(T, K), order_N, ends_E, kept_TK is not None)


class Delivery(NamedTuple):
    """The rows for the experts that are here."""

    rows_RD: Tensor
    weights_RL: Tensor
    """Combine weights of each row's choices, as `send` was given them: float32, or float64 with float64 rows."""
    permutation: Permutation
    """Of the (R, L) choices, by the experts that are here."""
    ticket: Any
    """For `receive`, which only the exchange understands."""


class Exchange(Protocol):
    """Sends tokens to the experts that they chose, and receives the experts' outputs.

    A `MoELayer` has one as its attribute `exchange`. With all experts here it is a `LocalExchange`. Whoever divides the
    experts among processes puts another one in its place and changes nothing else: kernels see rows, choices among the
    experts that are here, and combine weights. Rows from other processes have one choice each; the sum over a token's
    choices is then `receive`'s. All methods are differentiable in all floating-point tensors.
    """

    def send(self, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, kept_TK: Tensor | None) -> Delivery:
        """`kept_TK`, bool, says which assignments are computed; None: all. The rows may still be on their way."""

    def arrive(self, delivery: Delivery) -> Delivery:
        """The same, with its rows here; what is computed between `send` and this hides the time that they take."""

    def receive(self, ticket: Any, y_RD: Tensor) -> Tensor:
        """The weighted sums of the rows' choices -> those of the tokens that `send` was given, (T, D)."""


class LocalExchange:
    """All experts are here: rows are tokens, and nothing is copied."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts

    def send(self, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, kept_TK: Tensor | None) -> Delivery:
        permutation = sort_by_expert(experts_TK, num_experts=self.num_experts, kept_TK=kept_TK)
        return Delivery(x_TD, weights_TK, permutation, None)

    def arrive(self, delivery: Delivery) -> Delivery:
        return delivery

    def receive(self, ticket: Any, y_RD: Tensor) -> Tensor:
        return y_RD
