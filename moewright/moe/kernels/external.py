"""Expert kernels of other projects, usable by name where their packages are installed.

Both adapters were written from the source of the packages (ScatterMoE 0.3.0 at commit 2d15f31, sonic-moe
0.1.2.post1), and have not been run here: that needs a GPU. What they map is tested against recorders.

Letters: T tokens, K experts a token, N = T * K assignments sorted by expert, D model width, E experts, F expert
width, H width of the first product (2F when gated, the gate half first; else F).
"""

import importlib
import importlib.util
import inspect
from typing import Any, Final

import torch
from torch import Tensor

from moewright.errors import UsageError
from moewright.moe.activations import activation_named
from moewright.moe.dispatch import Permutation
from moewright.moe.kernels.base import ExpertWeights

_INSTALL: Final = {
    "scattermoe": "pip install --no-deps git+https://github.com/shawntan/scattermoe",
    # Its metadata asks for torch <= 2.9.1, which pip would install in place of the one there is.
    "sonicmoe": "pip install --no-deps sonic-moe quack-kernels nvidia-cutlass-dsl==4.4.2",
}

_INSTALLED: Final = {name: importlib.util.find_spec(name) is not None for name in _INSTALL}

_SONIC_ACTIVATIONS: Final = {
    "silu": "SWIGLU",
    "swish": "SWIGLU",
    "relu": "REGLU",
    "gelu_accurate": "GEGLU",
    "gelu_fast": "GEGLU",
    "gelu_new": "GEGLU",
    "gelu_python_tanh": "GEGLU",
    "gelu_pytorch_tanh": "GEGLU",
}
"""Its GEGLU is the tanh approximation, so the exact GELU is not among them."""


def require_scattermoe() -> None:
    """`UsageError` where ScatterMoE is not installed."""
    _require("scattermoe")


def require_sonicmoe() -> None:
    """`UsageError` where SonicMoE is not installed."""
    _require("sonicmoe")


def scattermoe(x_TD: Tensor, weights_TK: Tensor, permutation: Permutation, experts: ExpertWeights) -> Tensor:
    """ScatterMoE (arXiv 2403.08245): bfloat16 and float16 on a GPU. See `moewright.moe.kernels.base.Kernel`.

    It rounds the combine weights to the tokens' dtype, and would multiply float32 in TF32, which is refused.
    Assignments of no expert are computed with the last expert and the weight 0.
    """
    package = _package("scattermoe")
    _check("scattermoe", x_TD)
    if not len(x_TD):
        return x_TD.clone()
    activation, K = activation_named(experts.activation), weights_TK.shape[1]
    expert_N = _experts_of(torch.arange(len(permutation.order_N), device=x_TD.device), permutation)
    ends_E = permutation.ends_E.clone()
    ends_E[-1] = len(expert_N)
    sorted_ = (expert_N, permutation.order_N, ends_E)
    hidden_NH = package.parallel_linear(
        x_TD, experts.first_EHD.transpose(1, 2), K, *sorted_, expert_biases=experts.first_bias_EH, grouped_out=True
    )
    if experts.gated:
        gate_NF, up_NF = hidden_NH.chunk(2, dim=-1)
        hidden_NF = activation(gate_NF) * up_NF
    else:
        hidden_NF = activation(hidden_NH)
    y_TD: Tensor = package.parallel_linear(
        hidden_NF, experts.down_EDF.transpose(1, 2), 1, *sorted_, expert_biases=experts.down_bias_ED,
        gates=_kept_weights(weights_TK, permutation).to(x_TD.dtype), grouped_in=True,
    )  # fmt: skip
    return y_TD


def sonicmoe(x_TD: Tensor, weights_TK: Tensor, permutation: Permutation, experts: ExpertWeights) -> Tensor:
    """SonicMoE (arXiv 2512.14080): bfloat16 and float16 on Hopper and later. See `moewright.moe.kernels.base.Kernel`.

    Gated experts only, with SiLU, ReLU or GELU by tanh; it refuses to be traced by `torch.compile`. Assignments of no
    expert are computed with the last expert and the weight 0.
    """
    package = _package("sonicmoe")
    _check("sonicmoe", x_TD)
    if not experts.gated:
        raise UsageError("kernel 'sonicmoe' has only gated experts: use kernel 'triton' or 'grouped'")
    if experts.activation not in _SONIC_ACTIVATIONS:
        known = ", ".join(sorted(_SONIC_ACTIVATIONS))
        raise UsageError(f"kernel 'sonicmoe' has no activation {experts.activation!r}, only {known}: use 'triton'")
    if (experts.first_bias_EH is None) != (experts.down_bias_ED is None):
        raise UsageError("kernel 'sonicmoe' takes both biases or none: use kernel 'triton' or 'grouped'")
    if not len(x_TD):
        return x_TD.clone()
    T, K = weights_TK.shape
    kinds = importlib.import_module("sonicmoe.enums").ActivationType
    y_TD: Tensor = package.moe_general_routing_inputs(
        x_TD,
        _kept_weights(weights_TK, permutation).flatten(),
        torch.arange(T, device=x_TD.device, dtype=torch.int32).repeat_interleave(K),
        _experts_of(permutation.position_TK.flatten(), permutation).int(),
        experts.first_EHD.permute(1, 2, 0),
        experts.first_bias_EH,
        experts.down_EDF.permute(1, 2, 0),
        experts.down_bias_ED,
        E=len(permutation.ends_E),
        stream_id=None,
        activation_type=getattr(kinds, _SONIC_ACTIVATIONS[experts.activation]),
        is_inference_mode_enabled=not torch.is_grad_enabled(),
        concat_layout=True,
    )[0]
    return y_TD


def _require(name: str) -> None:
    if not _INSTALLED[name]:
        raise UsageError(f"kernel={name!r}: its package is not installed: run `{_INSTALL[name]}`, or use 'triton'")


def _package(name: str) -> Any:
    """The package, if it has the interface that was read."""
    _require(name)
    package = importlib.import_module(name)
    function, argument = {
        "scattermoe": ("parallel_linear", "expert_biases"),
        "sonicmoe": ("moe_general_routing_inputs", "concat_layout"),
    }[name]
    if argument not in inspect.signature(getattr(package, function, lambda: None)).parameters:
        raise UsageError(
            f"kernel={name!r}: the package installed has no {function}(..., {argument}=): run `{_INSTALL[name]}`"
        )
    return package


def _check(name: str, x_TD: Tensor) -> None:
    if x_TD.dtype not in (torch.bfloat16, torch.float16):
        raise UsageError(f"kernel {name!r} multiplies bfloat16 and float16, found {x_TD.dtype}: use kernel 'triton'")
    if x_TD.device.type == "cpu":
        raise UsageError(f"kernel {name!r} needs a GPU, and the tokens are on the CPU: use kernel 'grouped' or 'loop'")


def _experts_of(position_N: Tensor, permutation: Permutation) -> Tensor:
    """The expert at each sorted position; behind the last one's rows, the last one."""
    return torch.searchsorted(permutation.ends_E, position_N, right=True).clamp(max=len(permutation.ends_E) - 1)


def _kept_weights(weights_TK: Tensor, permutation: Permutation) -> Tensor:
    """The combine weights, 0 where an assignment belongs to no expert (and so is the gradient)."""
    if not permutation.partial:
        return weights_TK
    return torch.where(permutation.position_TK < permutation.ends_E[-1], weights_TK, 0)
