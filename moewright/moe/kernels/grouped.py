"""All experts through torch's grouped matrix product.

Letters: T tokens, K experts a token, N = T * K assignments sorted by expert, D model width, I and O widths of a
product's input and output, E experts.

`torch.nn.functional.grouped_mm` is called inside custom operators with shape functions of their own:
its own, in torch 2.13, takes nothing but bfloat16, so that float32 fails under `torch.compile` and
on the meta device. Its backward on CPU refuses gradients of stride zero; ours makes them dense.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moewright.errors import UsageError
from moewright.moe.activations import activation_named
from moewright.moe.dispatch import combine, dispatch
from moewright.moe.exchange import Permutation
from moewright.moe.experts import ExpertWeights


@torch.library.custom_op("moewright::grouped_rows", mutates_args=())
def _grouped_rows(x_NI: Tensor, weight_EIO: Tensor, ends_E: Tensor) -> Tensor:
    """`y[n] = x[n] @ weight[e]` for the rows n of expert e."""
    if not len(x_NI):  # an empty tensor can have strides that torch's product refuses
        return x_NI.new_empty(0, weight_EIO.shape[2])
    return F.grouped_mm(x_NI, weight_EIO, offs=ends_E)


@_grouped_rows.register_fake
def _(x_NI: Tensor, weight_EIO: Tensor, ends_E: Tensor) -> Tensor:
    return x_NI.new_empty(x_NI.shape[0], weight_EIO.shape[2])


@torch.library.custom_op("moewright::grouped_outer", mutates_args=())
def _grouped_outer(a_NO: Tensor, b_NI: Tensor, ends_E: Tensor) -> Tensor:
    """`w[e] = a[rows of e].T @ b[rows of e]`, zero where expert e has no row."""
    if not len(a_NO):
        return a_NO.new_zeros(len(ends_E), a_NO.shape[1], b_NI.shape[1])
    return F.grouped_mm(a_NO.t(), b_NI, offs=ends_E)


@_grouped_outer.register_fake
def _(a_NO: Tensor, b_NI: Tensor, ends_E: Tensor) -> Tensor:
    return a_NO.new_empty(ends_E.shape[0], a_NO.shape[1], b_NI.shape[1])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _rows_backward(ctx: Any, gradient_NO: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x_NI, weight_EIO, ends_E = ctx.saved_tensors
    gradient_NO = gradient_NO.contiguous()
    needs_x, needs_weight, _ = ctx.needs_input_grad
    x_gradient = _grouped_rows(gradient_NO, weight_EIO.transpose(1, 2), ends_E) if needs_x else None
    # Written as (E, O, I), the layout of the parameter behind the transposed view, so that the
    # gradient needs no copy on its way there.
    weight_gradient = _grouped_outer(gradient_NO, x_NI, ends_E).transpose(1, 2) if needs_weight else None
    return x_gradient, weight_gradient, None


_grouped_rows.register_autograd(_rows_backward, setup_context=_save)


def grouped(x_TD: Tensor, weights_TK: Tensor, permutation: Permutation, experts: ExpertWeights) -> Tensor:
    """float32, bfloat16 and float16; whole-graph under `torch.compile`. See `moewright.moe.experts.Kernel`.

    Keeps for backward the permuted copies of the tokens, and each assignment's hidden states and output.
    Raises `UsageError` for float64.
    """
    if x_TD.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise UsageError(f"kernel 'grouped' has no product of {x_TD.dtype}: use kernel 'loop'")
    activation, ends_E = activation_named(experts.activation, gated=experts.gated), permutation.ends_E
    experts = experts.to(x_TD.dtype)
    # Both ways across the border of the experts' rows, what lies behind them is cut: torch's product leaves there
    # whatever the memory held.
    x_ND = _without_rest(dispatch(x_TD, permutation), permutation)
    hidden_NH = _product(x_ND, experts.first_EHD, ends_E)
    if experts.first_bias_EH is not None:
        hidden_NH = _without_rest(_with_bias(hidden_NH, experts.first_bias_EH, permutation), permutation)
    y_ND = _product(activation(hidden_NH), experts.down_EDF, ends_E)
    if experts.down_bias_ED is not None:
        y_ND = _with_bias(y_ND, experts.down_bias_ED, permutation)
    return combine(_without_rest(y_ND, permutation), weights_TK, permutation)


def _product(x_NI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """`y[n] = weight[e] @ x[n]` for the rows n of expert e.

    torch's product takes rows of a multiple of 16 bytes only: other widths are padded with zeros, at the price
    of a copy of the weights.
    """
    _, width_out, width_in = weight_EOI.shape
    more_out, more_in = (-width % (16 // x_NI.element_size()) for width in (width_out, width_in))
    if more_out or more_in:
        x_NI, weight_EOI = F.pad(x_NI, (0, more_in)), F.pad(weight_EOI, (0, more_in, 0, more_out))
    product: Tensor = _grouped_rows(x_NI, weight_EOI.transpose(1, 2), ends_E)
    return product[:, :width_out] if more_out else product


def _with_bias(y_NO: Tensor, bias_EO: Tensor, permutation: Permutation) -> Tensor:
    """Rows of no expert get the last one's: cut them afterwards."""
    rows_N = torch.arange(len(y_NO), device=y_NO.device)
    expert_N = torch.searchsorted(permutation.ends_E, rows_N, right=True).clamp(max=len(bias_EO) - 1)
    return y_NO + bias_EO[expert_N]


def _without_rest(rows_NI: Tensor, permutation: Permutation) -> Tensor:
    """Zeros, and a gradient of zero, in the rows that belong to no expert."""
    if not permutation.partial:
        return rows_NI
    rows_N = torch.arange(len(rows_NI), device=rows_NI.device)
    return torch.where((rows_N < permutation.ends_E[-1])[:, None], rows_NI, 0)
