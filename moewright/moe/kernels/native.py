"""All experts on a CPU in C++ (native.cpp): one expert at a time on each thread, its rows staying in the cache.

Letters: T tokens, K experts a token, N = T * K assignments sorted by expert, R rows of all experts, which are N but
for padding, D model width, E experts, F expert width, H width of the first product (2F when gated, else F).

Fine-grained experts are small matrix products, and a matrix library that spreads each of them over all cores
loses more than it wins. So threads take experts, not rows. What lies between the two products of an expert is
read while it is still in the cache, no permuted copy of the tokens is kept, and large results go into memory
that was used before. Kept for backward: the tokens, and what came out of the first product, (R, H).
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from moewright.errors import UsageError
from moewright.moe.activations import activation_named
from moewright.moe.exchange import Permutation
from moewright.moe.experts import ExpertWeights
from moewright.moe.kernels import build
from moewright.moe.kernels.memory import empty


def native(x_TD: Tensor, weights_TK: Tensor, permutation: Permutation, experts: ExpertWeights) -> Tensor:
    """Any floating dtype, on CPU; whole-graph under `torch.compile`. See `moewright.moe.experts.Kernel`.

    A processor without instructions for bfloat16 or float16 products computes them in float32, under autocast with
    weights that are not rounded before. The sum of a token
    is taken in the order of its choices. There are no second derivatives. Raises `UsageError` on another device,
    and where the kernel cannot be compiled.
    """
    if x_TD.device.type not in ("cpu", "meta"):
        raise UsageError(f"kernel 'native' runs on CPU, the tokens are on {x_TD.device}: use 'grouped' or 'triton'")
    activation_named(experts.activation, gated=experts.gated)
    experts = experts.biases_to(x_TD.dtype)  # matrices are cast in the cache, expert by expert, and their gradients too
    tensors = [x_TD, weights_TK, *(t for t in experts[:4] if isinstance(t, Tensor))]
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    weight_N = weights_TK.flatten().gather(0, permutation.order_N)
    routes = (weight_N, permutation.token_N, permutation.order_N, permutation.ends_E)
    y_TD: Tensor = _forward(x_TD, *routes, *experts, keep)[0]
    return y_TD


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the products: float32 where the processor has no instructions for a shorter one."""
    return torch.float32 if dtype.itemsize < 4 and not _has_products_of(dtype) else dtype


@lru_cache
def _has_products_of(dtype: torch.dtype) -> bool:
    names = ("avx512_bf16", "amx_bf16", "bf16") if dtype == torch.bfloat16 else ("avx512_fp16", "amx_fp16", "fp16")
    if torch.backends.cpu.get_cpu_capability() == "AVX2":  # torch may be told to use no more: ATEN_CPU_CAPABILITY=avx2
        return False
    return any(torch.cpu.get_capabilities().get(name, False) for name in names)


def _multiple(dtype: torch.dtype) -> int:
    """The multiple to which an expert's rows are padded: `plan_of` in native.cpp says why."""
    return 16 if _compute_dtype(dtype).itemsize < 4 else 1


def _padded(assignments: int, experts: int, dtype: torch.dtype) -> int:
    """R: as many as there may be, whatever the loads of the experts."""
    if (multiple := _multiple(dtype)) == 1:
        return assignments
    return assignments + assignments // 16 + (multiple - 1) * experts


def _sums(x_TD: Tensor, assignments: int, experts: int) -> tuple[Tensor, Tensor]:
    """Room for the rows (R, D) of all experts and for each token's sum of them (T, D)."""
    compute = _compute_dtype(x_TD.dtype)
    stored = torch.float32 if compute == torch.float16 else compute
    rows_RD = empty(_padded(assignments, experts, x_TD.dtype), x_TD.shape[1], dtype=stored)
    return rows_RD, empty(*x_TD.shape, dtype=stored)


def _library() -> Any:
    if (reason := build.problem()) is not None:
        raise UsageError(f"kernel 'native' cannot be compiled ({reason}): use kernel 'grouped'")
    return torch.ops.moewright_native


@torch.library.custom_op("moewright::experts_forward", mutates_args=())
def _forward(
    x_TD: Tensor,
    weight_N: Tensor,
    token_N: Tensor,
    order_N: Tensor,
    ends_E: Tensor,
    first_EHD: Tensor,
    down_EDF: Tensor,
    first_bias_EH: Tensor | None,
    down_bias_ED: Tensor | None,
    activation: str,
    gated: bool,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """The weighted sums (T, D), and if `keep` the results of the first product, (R, H), else (0, H).

    Rows of no expert, and those that are only padding, hold nothing.
    """
    N, (E, H, _) = len(token_N), first_EHD.shape
    hidden_RH = empty(_padded(N, E, x_TD.dtype) if keep else 0, H, dtype=x_TD.dtype)
    rows_RD, y_TD = _sums(x_TD, N, E)
    weights = (first_EHD.contiguous(), down_EDF.contiguous(), first_bias_EH, down_bias_ED)
    source_TD = x_TD.to(_compute_dtype(x_TD.dtype)).contiguous()
    form = (activation, gated, _multiple(x_TD.dtype))
    routes, kept = (weight_N, token_N, order_N, ends_E), hidden_RH if keep else None
    _library().forward(source_TD, *routes, *weights, *form, rows_RD, y_TD, kept)
    return y_TD.to(x_TD.dtype), hidden_RH


@_forward.register_fake
def _(x: Tensor, weight: Tensor, token: Tensor, order: Tensor, ends: Tensor, first: Tensor, *rest: Any) -> Any:
    rows = _padded(token.shape[0], first.shape[0], x.dtype) if rest[-1] else 0
    return x.new_empty(x.shape), x.new_empty(rows, first.shape[1])


@torch.library.custom_op("moewright::experts_backward", mutates_args=())
def _backward(
    d_y_TD: Tensor,
    hidden_RH: Tensor,
    x_TD: Tensor,
    weight_N: Tensor,
    token_N: Tensor,
    order_N: Tensor,
    ends_E: Tensor,
    first_EHD: Tensor,
    down_EDF: Tensor,
    first_bias_EH: Tensor | None,
    down_bias_ED: Tensor | None,
    activation: str,
    gated: bool,
    trained: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x and weight, and of first, down and both biases where `trained` (empty where not)."""
    weights = (first_EHD.contiguous(), down_EDF.contiguous(), first_bias_EH, down_bias_ED)
    both = zip(weights, trained, strict=True)
    gradients = [empty(*p.shape, dtype=p.dtype) if p is not None and wanted else None for p, wanted in both]
    d_weight_N, compute = torch.zeros_like(weight_N), _compute_dtype(x_TD.dtype)
    rows_RD, d_x_TD = _sums(x_TD, len(token_N), len(first_EHD))
    inputs = (d_y_TD.to(compute).contiguous(), hidden_RH, x_TD.to(compute).contiguous())
    routes, form = (weight_N, token_N, order_N, ends_E), (activation, gated, _multiple(x_TD.dtype))
    _library().backward(*inputs, *routes, *weights, *form, rows_RD, d_x_TD, d_weight_N, *gradients)
    first, down, first_bias, down_bias = (x_TD.new_empty(0) if g is None else g for g in gradients)
    return d_x_TD.to(x_TD.dtype), d_weight_N, first, down, first_bias, down_bias


@_backward.register_fake
def _(d_y: Tensor, hidden: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> Any:
    both = zip(rest[3:7], rest[-1], strict=True)
    gradients = (p.new_empty(p.shape) if wanted else x.new_empty(0) for p, wanted in both)
    return x.new_empty(x.shape), torch.empty_like(weight), *gradients


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)  # nobody asks for that of `hidden`
    ctx.save_for_backward(output[1], *inputs[:9])
    ctx.form = inputs[9:11]


def _gradients(ctx: Any, d_y_TD: Tensor, d_hidden: None) -> tuple[Tensor | None, ...]:
    trained = list(ctx.needs_input_grad[5:9])
    d_x, d_weight, *of_parameters = _backward(d_y_TD, *ctx.saved_tensors, *ctx.form, trained)
    gradients = (gradient if wanted else None for gradient, wanted in zip(of_parameters, trained, strict=True))
    return d_x, d_weight, None, None, None, *gradients, None, None, None


_forward.register_autograd(_gradients, setup_context=_save)
