"""The experts as fused Triton kernels for GPUs.

Letters: T tokens, K experts a token, N = T * K assignments sorted by expert, D model width, E experts, F expert
width, H width of the first product (2F when gated, else F).

Forward: the first product gathers its tokens as it reads them, and applies the activation before it writes; the
second one weights its rows and writes each to the slot of its assignment; a sum over the K slots of a token ends it.
Backward does the same the other way round. So beside `x_TD` and the routing, nothing is kept but the hidden
states before the activation, (N, H): for a fixed K * F the kept memory does not depend on how fine the experts are.
(SonicMoE, arXiv 2512.14080, has the same aim.) For a moment there are also (N, F) activations
and (N, D) slots in either direction, and in backward the (N, H) gradient of the hidden states. No sum depends on the
order in which threads finish.
"""

import importlib.util
from typing import Any, Final

import torch
from torch import Tensor

from moewright.errors import UsageError
from moewright.moe.activations import activation_named
from moewright.moe.exchange import Permutation
from moewright.moe.experts import ExpertWeights

SAME: Final = {
    **dict.fromkeys(("gelu_accurate", "gelu_fast", "gelu_new", "gelu_python_tanh", "gelu_pytorch_tanh"), "gelu_tanh"),
    "gelu_python": "gelu",
    "swish": "silu",
}
"""Activations of several names -> their one name in `triton_activations`."""

_DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)


# Read once: who asks may be traced by `torch.compile`, which cannot look for modules.
_INSTALLED: Final = importlib.util.find_spec("triton") is not None


def require_triton() -> None:
    """`UsageError` where Triton is not installed."""
    if not _INSTALLED:
        raise UsageError("kernel='triton': Triton is not installed: run `pip install 'triton>=3.6'`, or use 'grouped'")


def triton(x_TD: Tensor, weights_TK: Tensor, permutation: Permutation, experts: ExpertWeights) -> Tensor:
    """float32 (products in IEEE precision, never TF32), bfloat16 and float16, summed in float32.

    See `moewright.moe.experts.Kernel`. Whole-graph under `torch.compile`; no second derivatives. Needs a GPU, or
    Triton's interpreter (TRITON_INTERPRET=1 before Triton is imported), which is slow. Raises `UsageError` without
    either, for other dtypes, and for an activation it does not know.
    """
    if x_TD.dtype not in _DTYPES:
        raise UsageError(f"kernel 'triton' has no product of {x_TD.dtype}: use kernel 'loop'")
    activation_named(experts.activation, gated=experts.gated)
    experts = experts.to(x_TD.dtype)
    tensors = (x_TD, weights_TK, *experts[:4])
    keep = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    token_N, position_TK, order_N, ends_E, partial = permutation
    y_TD: Tensor = _experts(
        x_TD, weights_TK, *experts[:4], token_N, order_N, position_TK, ends_E,
        SAME.get(experts.activation, experts.activation), experts.gated, partial, keep,
    )[0]  # fmt: skip
    return y_TD


@torch.library.custom_op("moewright::triton_experts", mutates_args=())
def _experts(
    x_TD: Tensor,
    weights_TK: Tensor,
    first_EHD: Tensor,
    down_EDF: Tensor,
    first_bias_EH: Tensor | None,
    down_bias_ED: Tensor | None,
    token_N: Tensor,
    order_N: Tensor,
    position_TK: Tensor,
    ends_E: Tensor,
    activation: str,
    gated: bool,
    partial: bool,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """`y_TD`, and for backward `h_NH` (no rows unless `keep`)."""
    routed = _routed(x_TD, token_N, order_N, position_TK, ends_E, partial)
    if not len(token_N):
        return torch.empty_like(x_TD), x_TD.new_empty(0, first_EHD.shape[1])
    x_TD, weights_N = x_TD.contiguous(), weights_TK.contiguous().flatten()
    with torch.cuda.device_of(x_TD):
        h_NH, a_NF = routed.first(x_TD, first_EHD, _dense(first_bias_EH), activation, gated=gated, keep=keep)
        slots_ND = routed.second(a_NF, down_EDF, _dense(down_bias_ED), weights_N)
        return routed.sum_choices(slots_ND, len(x_TD)), h_NH


@_experts.register_fake
def _(x_TD: Tensor, weights_TK: Tensor, first_EHD: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    keep = rest[-1]
    N = weights_TK.shape[0] * weights_TK.shape[1] if keep else 0
    return x_TD.new_empty(x_TD.shape), x_TD.new_empty(N, first_EHD.shape[1])


@torch.library.custom_op("moewright::triton_experts_backward", mutates_args=())
def _experts_backward(
    dy_TD: Tensor,
    x_TD: Tensor,
    weights_TK: Tensor,
    first_EHD: Tensor,
    down_EDF: Tensor,
    first_bias_EH: Tensor | None,
    down_bias_ED: Tensor | None,
    token_N: Tensor,
    order_N: Tensor,
    position_TK: Tensor,
    ends_E: Tensor,
    h_NH: Tensor,
    activation: str,
    gated: bool,
    partial: bool,
    needs: list[bool],
) -> list[Tensor]:
    """The gradients of the first six arguments of the forward; of no elements where `needs` says so."""
    T, N = len(x_TD), len(token_N)
    wanted = [x_TD, weights_TK, first_EHD, down_EDF, first_bias_EH, down_bias_ED]
    if not N:
        return [
            torch.zeros_like(like) if need and like is not None else x_TD.new_empty(0)
            for like, need in zip(wanted, needs, strict=True)
        ]
    routed = _routed(x_TD, token_N, order_N, position_TK, ends_E, partial)
    x_TD, dy_TD, weights_N = x_TD.contiguous(), dy_TD.contiguous(), weights_TK.contiguous().flatten()
    gradients: list[Tensor | None] = [None] * 6
    with torch.cuda.device_of(x_TD):
        dh_NH, aw_NF, dweights_N = routed.hidden_gradient(
            dy_TD, down_EDF, _dense(down_bias_ED), h_NH, weights_N, activation, gated=gated
        )
        gradients[1] = dweights_N.view_as(weights_TK)
        if needs[3] or needs[5]:
            gradients[3], gradients[5] = routed.outer(dy_TD, aw_NF, down_EDF, down_bias_ED, weights_N, gathered="a")
        del aw_NF
        if needs[2] or needs[4]:
            gradients[2], gradients[4] = routed.outer(dh_NH, x_TD, first_EHD, first_bias_EH, gathered="b")
        if needs[0]:
            gradients[0] = routed.sum_choices(routed.transposed(dh_NH, first_EHD), T)
    return [
        gradient if need and gradient is not None else x_TD.new_empty(0)
        for gradient, need in zip(gradients, needs, strict=True)
    ]


@_experts_backward.register_fake
def _(
    dy_TD: Tensor,
    x_TD: Tensor,
    weights_TK: Tensor,
    first_EHD: Tensor,
    down_EDF: Tensor,
    first_bias_EH: Tensor | None,
    down_bias_ED: Tensor | None,
    *rest: Any,
) -> list[Tensor]:
    wanted = [x_TD, weights_TK, first_EHD, down_EDF, first_bias_EH, down_bias_ED]
    dense = [x_TD.new_empty(0) if like is None else like.new_empty(like.shape) for like in wanted]
    dense[2], dense[3] = torch.empty_like(first_EHD), torch.empty_like(down_EDF)
    return [like if need else x_TD.new_empty(0) for like, need in zip(dense, rest[-1], strict=True)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:10], output[1])
    ctx.options = inputs[10:13]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy_TD: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy_TD is None:
        return (None,) * 14
    needs = list(ctx.needs_input_grad[:6])
    gradients = _experts_backward(dy_TD, *ctx.saved_tensors, *ctx.options, needs)
    return (*(gradient if need else None for gradient, need in zip(gradients, needs, strict=True)), *(None,) * 8)


_experts.register_autograd(_backward, setup_context=_save)


def _routed(x_TD: Tensor, token_N: Tensor, order_N: Tensor, position_TK: Tensor, ends_E: Tensor, partial: bool) -> Any:
    # Imported here: where Triton is missing this module must load, and its import is not free.
    from moewright.moe.kernels.triton_launch import INTERPRETED, Routed

    if not (x_TD.is_cuda or INTERPRETED):
        raise UsageError(f"kernel 'triton' needs a GPU, and the tokens are on {x_TD.device}: use 'grouped' or 'loop'")
    return Routed(token_N, order_N, position_TK.flatten(), ends_E, partial=partial)


def _dense(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.contiguous()
