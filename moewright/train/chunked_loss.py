"""The loss of a language model without its logits: rows of them at a time, and their gradients with them.

Letters: N tokens, n of a chunk, D model width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from moewright.moe.precision import autocast_dtype, no_autocast


def chunked_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    *,
    chunk: int,
    ignored: int,
    logits_of: Callable[[Tensor], Tensor],
) -> Tensor:
    """Minus the log-probability of all targets together, 0-dim, float32 (float64 with float64).

    `logits_of` is applied to the products, element by element. No more than `chunk` rows of logits are there at any
    time. The gradients of hidden states, weight and bias are computed in the forward pass, where the logits are, and
    the one of the weight is summed up in float32; they take the memory of these three until the backward pass, of
    which there can be one. Products are in the dtype of autocast.
    """
    loss: Tensor = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
        hidden_ND, weight_VD, bias_V, targets_N, chunk, ignored, logits_of, torch.is_grad_enabled()
    )
    return loss


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        chunk: int,
        ignored: int,
        logits_of: Callable[[Tensor], Tensor],
        graded: bool,
    ) -> Tensor:
        wanted = [graded and needed for needed in ctx.needs_input_grad[:3]]
        dtype = autocast_dtype(hidden_ND) or hidden_ND.dtype
        wide = torch.promote_types(dtype, torch.float32)
        x_ND, w_VD = hidden_ND.to(dtype), weight_VD.to(dtype)
        b_V = None if bias_V is None else bias_V.to(dtype)
        d_x_ND = torch.empty_like(x_ND) if wanted[0] else None
        d_w_VD = torch.zeros_like(w_VD, dtype=wide) if wanted[1] else None
        d_b_V = torch.zeros_like(b_V, dtype=wide) if b_V is not None and wanted[2] else None
        loss = torch.zeros((), dtype=wide, device=hidden_ND.device)
        for first in range(0, len(x_ND), chunk):
            rows = slice(first, first + chunk)
            with no_autocast(hidden_ND.device):
                part, d_nV = _part(
                    functional.linear(x_ND[rows], w_VD, b_V), targets_N[rows], ignored, logits_of, graded=any(wanted)
                )
                loss += part
                if d_x_ND is not None:
                    torch.mm(d_nV, w_VD, out=d_x_ND[rows])
                if d_w_VD is not None and dtype == wide:
                    d_w_VD.addmm_(d_nV.T, x_ND[rows])
                elif d_w_VD is not None:
                    d_w_VD += d_nV.T @ x_ND[rows]
                if d_b_V is not None:
                    d_b_V += d_nV.sum(dim=0, dtype=wide)
        ctx.gradients = [d_x_ND, d_w_VD, d_b_V]
        ctx.dtypes = [hidden_ND.dtype, weight_VD.dtype, None if bias_V is None else bias_V.dtype]
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        # With one dim the factor takes part in type promotion: rounded to bfloat16, 1 / targets would be off by 0.2%.
        gradients = [None if g is None else torch.mul(g, d_loss.reshape(1), out=g) for g in ctx.gradients]
        ctx.gradients = []  # changed in place, and not kept
        typed = (None if g is None else g.to(dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True))
        return *typed, None, None, None, None, None


def _part(
    products_nV: Tensor, targets_n: Tensor, ignored: int, logits_of: Callable[[Tensor], Tensor], *, graded: bool
) -> tuple[Tensor, Tensor]:
    """The loss of these rows and, if `graded`, its gradient for their products."""
    wide = torch.promote_types(products_nV.dtype, torch.float32)
    with torch.set_grad_enabled(graded):
        logits_nV = logits_of(products_nV.requires_grad_(graded).to(wide))
        loss = functional.cross_entropy(logits_nV, targets_n, ignore_index=ignored, reduction="sum")
    if not graded:
        return loss, loss
    (gradient_nV,) = torch.autograd.grad(loss, products_nV)
    return loss.detach(), gradient_nV
