"""Activations of the experts, by the names that Hugging Face configs use.

Letters: F expert width, H width of the first product (2F when gated, the gate half first; else F).
"""

from collections.abc import Callable
from functools import partial
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from moewright.errors import UsageError


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


def _swiglu_oai(gate: Tensor, up: Tensor) -> Tensor:
    return (up.clamp(-7, 7) + 1) * _quick_gelu(gate.clamp(max=7))


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
"""Element by element, and without parameters of their own."""

GATED_ACTIVATIONS: Final[dict[str, Callable[[Tensor, Tensor], Tensor]]] = {"swiglu_oai": _swiglu_oai}
"""Of gate and up together, so for gated experts alone: gpt-oss clamps both (arXiv 2508.10925)."""


def activation_named(name: str, *, gated: bool) -> Callable[[Tensor], Tensor]:
    """The function between an expert's two products, (..., H) -> (..., F); `UsageError` lists the names there are."""
    if gated and name in GATED_ACTIVATIONS:
        return partial(_of_halves, GATED_ACTIVATIONS[name])
    if name not in ACTIVATIONS:
        names = ACTIVATIONS | GATED_ACTIVATIONS if gated else ACTIVATIONS
        raise UsageError(f"activation={name!r}: choose one of {', '.join(sorted(names))}")
    return partial(_times_up, ACTIVATIONS[name]) if gated else ACTIVATIONS[name]


def _of_halves(activation: Callable[[Tensor, Tensor], Tensor], hidden: Tensor) -> Tensor:
    return activation(*hidden.chunk(2, dim=-1))


def _times_up(activation: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    gate, up = hidden.chunk(2, dim=-1)
    return activation(gate) * up
