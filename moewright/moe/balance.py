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


def switch_loss(probabilities_TE: Tensor, counts_E: Tensor, mask_T: Tensor | None = None) -> Tensor:
    """Load-balancing loss of Switch Transformers (arXiv 2101.03961, equations 4-6), for any K.

    `E * sum_e f_e * P_e`, with f_e the share of the assignments that expert e got and P_e its mean
    probability over the real tokens. 1 when the load is even, whatever K. Only P has a gradient. The counts
    may be those of more tokens than this batch: of the whole step's batch (arXiv 2501.11873).
    """
    share_E, mean_E = _shares(counts_E, probabilities_TE), masked_mean(probabilities_TE, mask_T)
    return probabilities_TE.shape[1] * (share_E * mean_E).sum()


def sequence_switch_loss(probabilities_TE: Tensor, experts_TK: Tensor, *, length: int, mask_T: Tensor | None) -> Tensor:
    """The Switch loss of each sequence of `length` tokens by itself (arXiv 2412.19437, section 2.1.2), averaged.

    Sequences are weighed by their real tokens, so that one micro-batch or five give the same gradient.
    """
    T, E = probabilities_TE.shape
    if not T:
        return probabilities_TE.sum()
    mask_BS = torch.ones(T, device=experts_TK.device).bool() if mask_T is None else mask_T
    mask_BS = mask_BS.view(-1, length)
    experts_BN = experts_TK.reshape(len(mask_BS), -1)
    real_BN = mask_BS[..., None].expand(*mask_BS.shape, experts_TK.shape[1]).reshape_as(experts_BN).long()
    counts_BE = torch.zeros(len(mask_BS), E, dtype=torch.int64, device=experts_TK.device)
    counts_BE = counts_BE.scatter_add(1, experts_BN, real_BN)
    # The sum over a sequence's tokens, not their mean: dividing by all tokens at last weighs the sequences.
    sums_BE = (probabilities_TE.view(*mask_BS.shape, E) * mask_BS[..., None]).sum(dim=1)
    return E * (_shares(counts_BE, probabilities_TE) * sums_BE).sum() / mask_BS.sum().clamp(min=1)


def _shares(counts: Tensor, like: Tensor) -> Tensor:
    """Each expert's share of the counts, over the last dim."""
    counts = counts.to(like.dtype)
    return counts / counts.sum(dim=-1, keepdim=True).clamp(min=1)


def moved_bias(bias_E: Tensor, counts_E: Tensor, *, rate: float) -> Tensor:
    """The selection bias after a step with these loads: up by `rate` for experts below the mean, down above it.

    Balancing without a loss (arXiv 2408.15664, algorithm 1).
    """
    load_E = counts_E.double()
    return bias_E + rate * (load_E.mean() - load_E).sign().to(bias_E.dtype)


def moved_coefficient(coefficient: Tensor, dropped_share: Tensor, *, rate: float, most: float) -> Tensor:
    """The adaptive coefficient of the balance loss after a step: it follows `rate` times the dropped share.

    Skywork-MoE (arXiv 2406.06563, section 4.2), with its weight of 0.99 on what was before, but no further
    than `most`.
    """
    return 0.99 * coefficient + 0.01 * (rate * dropped_share.to(coefficient.dtype)).clamp(max=most)


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
