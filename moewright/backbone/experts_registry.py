"""Our expert kernels inside of transformers' own mixture-of-experts models.

transformers calls the experts of a block through a registry of functions, chosen by the name in
`config._experts_implementation`. Under the name "moewright" stands ours:

    import moewright.auto
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="moewright")

Letters: T tokens, K experts a token, D model width, E experts, F expert width.
"""

from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation

from moewright.errors import UsageError
from moewright.moe.activations import ACTIVATIONS
from moewright.moe.exchange import Permutation, sort_by_expert
from moewright.moe.experts import ExpertWeights
from moewright.moe.kernels import default_kernel, kernel_named

NAME: Final = "moewright"

_PLAIN: Final[Any] = use_experts_implementation(type("Plain", (nn.Module,), {}))
"""Experts without a way of their own to gate: transformers gives them `act(gate) * up`."""


def register() -> None:
    """Put our product into transformers' registry."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """(T, D), (T, K) experts, (T, K) weights -> (T, D), by the default kernel of the device.

    `self` is an experts module of transformers, E stacked blocks. Assignments to expert E or beyond, which is how
    transformers marks those of other ranks, add nothing. Raises `UsageError` as `sums` does.
    """
    num_experts = len(self.down_proj)  # type: ignore[arg-type]
    # Before transformers 5.23 or so a module does not say whether there may be such assignments.
    kept_TK = top_k_index < num_experts if getattr(self, "_is_expert_parallel", True) else None
    permutation = sort_by_expert(top_k_index, num_experts=num_experts, kept_TK=kept_TK)
    return sums(self, hidden_states, top_k_weights, permutation).to(hidden_states.dtype)


def sums(module: nn.Module, x_TD: Tensor, weights_TK: Tensor, permutation: Permutation) -> Tensor:
    """(T, D), (T, K) -> (T, D): the weighted sums over the experts of a module of transformers, in their dtype.

    Raises `UsageError` for a block that computes more than `down(act(gate) * up)` or `down(act(up))`.
    """
    experts = _weights(module)
    # As the other products of the registry do: under autocast a norm may hand over float32.
    x_TD = x_TD.to(experts.first_EHD.dtype)
    weights_TK = weights_TK.to(torch.promote_types(x_TD.dtype, torch.float32))
    return kernel_named(default_kernel(x_TD.device))(x_TD, weights_TK, permutation, experts)


def _weights(module: Any) -> ExpertWeights:
    gated = module.has_gate
    first_name = "gate_up_proj" if gated else "up_proj"
    if getattr(module, "has_post_expert_norm", False):
        raise _refusal(module, "normalises each expert's output")
    if gated and type(module)._apply_gate is not _PLAIN._apply_gate:
        raise _refusal(module, "gates in a way of its own")
    if gated and not getattr(module, "is_concatenated", True):
        raise _refusal(module, "interleaves the gate and the up projection")
    first, down = getattr(module, first_name), module.down_proj
    if module.is_transposed:
        first, down = first.transpose(1, 2), down.transpose(1, 2)
    return ExpertWeights(
        first,
        down,
        getattr(module, f"{first_name}_bias") if module.has_bias else None,
        module.down_proj_bias if module.has_bias else None,
        _activation_name(module),
        gated,
    )


def _activation_name(module: Any) -> str:
    name = _ACTIVATION_NAMES.get(_class_and_settings(module.act_fn))
    if name is None:
        raise _refusal(module, f"has the activation {module.act_fn!r}")
    return name


def _class_and_settings(activation: nn.Module) -> tuple[object, ...]:
    """The identity of an activation: its class, and the numbers it was made with."""
    settings = ("min", "max", "min_val", "max_val", "negative_slope")
    return type(activation), *(getattr(activation, name, None) for name in settings)


_ACTIVATION_NAMES: Final = {_class_and_settings(ACT2FN[name]): name for name in ACTIVATIONS if name in ACT2FN}
"""A block has an activation, but under which name its config had it depends on the family."""


def _refusal(module: object, why: str) -> UsageError:
    return UsageError(
        f"experts_implementation={NAME!r}: {type(module).__name__} {why}, which our kernels do not compute: "
        'use "eager" or "grouped_mm"'
    )
