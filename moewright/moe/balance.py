"""Auxiliary losses of the router, and how a loss travels with a layer's output.

Letters: T tokens, E experts, K experts a token. Masks are (T,) bool, True for a real token.
"""

from typing import Any

import torch
from torch import Tensor


def masked_mean(values_T: Tensor, mask_T: Tensor | None) -> Tensor:
    """Mean over dim 0 of the real tokens; 0 when there is none."""
    if mask_T is None:
        return values_T.sum(0) / max(values_T.shape[0], 1)
    shape = (-1,) + (1,) * (values_T.dim() - 1)
    return (values_T * mask_T.view(shape)).sum(0) / mask_T.sum().clamp(min=1)


def count_tokens(experts_TK: Tensor, *, num_experts: int, mask_T: Tensor | None) -> Tensor:
    """Assignments of real tokens to each expert, (E,) int64."""
    real_TK = torch.ones_like(experts_TK) if mask_T is None else mask_T[:, None].expand_as(experts_TK).long()
    counts_E = torch.zeros(num_experts, dtype=torch.int64, device=experts_TK.device)
    return counts_E.scatter_add(0, experts_TK.flatten(), real_TK.flatten())


def switch_loss(probabilities_TE: Tensor, tokens_per_expert: Tensor, mask_T: Tensor | None = None) -> Tensor:
    """Load-balancing loss of Switch Transformers (arXiv 2101.03961, equations 4-6), for any K.

    `E * sum_e f_e * P_e`, with f_e the share of the assignments that expert e got and P_e its mean
    probability over the real tokens. 1 when the load is even, whatever K. Only P has a gradient.
    """
    counts_E = tokens_per_expert.to(probabilities_TE.dtype)
    share_E = counts_E / counts_E.sum().clamp(min=1)
    return probabilities_TE.shape[1] * (share_E * masked_mean(probabilities_TE, mask_T)).sum()


def z_loss(logits_TE: Tensor, mask_T: Tensor | None = None) -> Tensor:
    """Router z-loss (ST-MoE, arXiv 2202.08906, equation 5): mean squared log-sum-exp of the logits."""
    return masked_mean(logits_TE.logsumexp(dim=-1).square(), mask_T)


class _AttachLoss(torch.autograd.Function):
    """Identity on a tensor; its backward gives the loss the gradient 1."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, loss: Tensor) -> Tensor:
        ctx.loss_shape, ctx.loss_dtype = loss.shape, loss.dtype
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, torch.ones(ctx.loss_shape, dtype=ctx.loss_dtype, device=gradient.device)


def attach_loss(tensor: Tensor, loss: Tensor) -> Tensor:
    """Return `tensor` unchanged, such that a backward pass through it also goes through the 0-dim `loss`.

    A block of a transformers model returns hidden states and nothing else; this is how a per-layer
    loss reaches the parameters all the same, under recomputation and in pipelines too.
    """
    attached: Tensor = _AttachLoss.apply(tensor, loss)  # type: ignore[no-untyped-call]
    return attached
