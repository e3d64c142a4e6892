"""Tokens to experts and back, by sorting.

Letters: T tokens, K experts a token, N = T * K assignments, D model width, E experts. Nothing here
is larger than (N, D): no tokens x experts x capacity one-hot. Every move in either direction of the
graph is a gather, so results do not depend on the order in which threads finish.

An assignment that belongs to no expert (its token is padding, or found no room) is sorted behind all
others, so shapes do not depend on how many there are.
"""

from typing import Any, NamedTuple

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


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, token_N: Tensor, position_TK: Tensor) -> Tensor:
        ctx.save_for_backward(position_TK)
        return x_TD[token_N]

    @staticmethod
    def backward(ctx: Any, gradient_ND: Tensor) -> tuple[Tensor, None, None]:
        (position_TK,) = ctx.saved_tensors
        return gradient_ND[position_TK].sum(dim=1), None, None


def dispatch(x_TD: Tensor, permutation: Permutation) -> Tensor:
    """Copy each token once for each of its experts: (T, D) -> (N, D), sorted by expert."""
    copies_ND: Tensor = _Dispatch.apply(x_TD, permutation.token_N, permutation.position_TK)  # type: ignore[no-untyped-call]
    return copies_ND


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y_ND: Tensor, weights_TK: Tensor, token_N: Tensor, position_TK: Tensor, order_N: Tensor
    ) -> Tensor:
        ctx.save_for_backward(y_ND, weights_TK, token_N, position_TK, order_N)
        return (y_ND[position_TK] * weights_TK[..., None]).sum(dim=1).to(y_ND.dtype)

    @staticmethod
    def backward(ctx: Any, gradient_TD: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        y_ND, weights_TK, token_N, position_TK, order_N = ctx.saved_tensors
        gradient_ND = gradient_TD[token_N]
        weight_N = weights_TK.flatten()[order_N]
        dot_N = (y_ND.to(weights_TK.dtype) * gradient_ND).sum(dim=-1)
        return (gradient_ND * weight_N[:, None]).to(y_ND.dtype), dot_N[position_TK], None, None, None


def combine(y_ND: Tensor, weights_TK: Tensor, permutation: Permutation) -> Tensor:
    """Weighted sum of each token's expert outputs: (N, D), (T, K) -> (T, D) in the dtype of `y_ND`.

    The sum runs in the weights' dtype (float32), in the fixed order of the token's choices.
    """
    output_TD: Tensor = _Combine.apply(  # type: ignore[no-untyped-call]
        y_ND, weights_TK, permutation.token_N, permutation.position_TK, permutation.order_N
    )
    return output_TD
