"""Copies of tokens in the order of their experts, and their weighted sums, for kernels that need them.

Letters: T tokens, K experts a token, N = T * K assignments sorted by expert, D model width. Nothing here
is larger than (N, D): no tokens x experts x capacity one-hot. Every move in either direction of the
graph is a gather, so results do not depend on the order in which threads finish.
"""

from typing import Any

import torch
from torch import Tensor

from moewright.moe.exchange import Permutation


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
