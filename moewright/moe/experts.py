"""The experts: stacked weights and their activation.

Letters: N assignments sorted by expert, D model width, E experts, F expert width.
"""

from collections.abc import Callable
from functools import partial
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moewright.errors import UsageError
from moewright.moe.kernels import kernel_named
from moewright.moe.precision import autocast_dtype


def _squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _clipped_gelu(x: Tensor) -> Tensor:
    return F.gelu(x).clip(-10, 10)


def _laplace(x: Tensor) -> Tensor:
    # Mean and deviation at which it approximates squared ReLU best (Mega, arXiv 2209.10655).
    return 0.5 * (1 + torch.erf((x - 0.707107) / (0.282095 * 2**0.5)))


_tanh_gelu = partial(F.gelu, approximate="tanh")

ACTIVATIONS: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "gelu": F.gelu,
    "gelu_10": _clipped_gelu,
    "gelu_accurate": _tanh_gelu,
    "gelu_fast": _tanh_gelu,
    "gelu_new": _tanh_gelu,
    "gelu_python": F.gelu,
    "gelu_python_tanh": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "hardswish": F.hardswish,
    "laplace": _laplace,
    "leaky_relu": F.leaky_relu,
    "linear": lambda x: x,
    "mish": F.mish,
    "quick_gelu": _quick_gelu,
    "relu": F.relu,
    "relu2": _squared_relu,
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}
"""Activations under the names that Hugging Face configs use; those with parameters of their own are not among them."""


def activation_named(name: str) -> Callable[[Tensor], Tensor]:
    """The activation of that name; `UsageError` lists the names there are."""
    if name not in ACTIVATIONS:
        raise UsageError(f"activation={name!r}: choose one of {', '.join(sorted(ACTIVATIONS))}")
    return ACTIVATIONS[name]


class Experts(nn.Module):
    """E feed-forward blocks in the layout of transformers.

    Gated: `gate_up_proj` (E, 2F, D), the gate half first; otherwise `up_proj` (E, F, D). Both:
    `down_proj` (E, D, F). Each expert starts as `nn.Linear` would start it.
    """

    def __init__(
        self,
        *,
        num_experts: int,
        hidden_size: int,
        expert_size: int,
        activation: str,
        gated: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.gated = gated
        self.activation = activation_named(activation)
        E, D, F_ = num_experts, hidden_size, expert_size
        first_EFD = nn.Parameter(torch.empty(E, 2 * F_ if gated else F_, D, device=device, dtype=dtype))
        self.first_name = "gate_up_proj" if gated else "up_proj"
        self.register_parameter(self.first_name, first_EFD)
        self.down_proj = nn.Parameter(torch.empty(E, D, F_, device=device, dtype=dtype))
        nn.init.uniform_(first_EFD, -(D**-0.5), D**-0.5)
        nn.init.uniform_(self.down_proj, -(F_**-0.5), F_**-0.5)

    def forward(self, x_ND: Tensor, ends_E: Tensor, *, kernel: str) -> Tensor:
        """(N, D) -> (N, D); rows `ends_E[e-1]:ends_E[e]` belong to expert e."""
        product = kernel_named(kernel)
        first: Tensor = self.get_parameter(self.first_name)
        down: Tensor = self.down_proj
        if (dtype := autocast_dtype(x_ND)) is not None:
            # Autocast knows nothing of custom operators: do for ours what it does for torch's products.
            x_ND, first, down = x_ND.to(dtype), first.to(dtype), down.to(dtype)
        if self.gated:
            gate_NF, up_NF = product(x_ND, first, ends_E).chunk(2, dim=-1)
            hidden_NF = self.activation(gate_NF) * up_NF
        else:
            hidden_NF = self.activation(product(x_ND, first, ends_E))
        return product(hidden_NF, down, ends_E)
