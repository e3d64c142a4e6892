"""What every expert kernel is given, and what it must return.

Letters: T tokens, K experts a token, D model width, E experts, F expert width, H width of the first product
(2F when gated, the gate half first; else F).
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from moewright.moe.dispatch import Permutation


class ExpertWeights(NamedTuple):
    """The stacked weights of E feed-forward blocks, in the layout of transformers, and their activation."""

    first_EHD: Tensor
    down_EDF: Tensor
    first_bias_EH: Tensor | None
    down_bias_ED: Tensor | None
    activation: str
    """A name of `moewright.moe.activations.ACTIVATIONS`."""
    gated: bool
    """Whether an expert computes `down(act(gate(x)) * up(x))` or `down(act(up(x)))`."""


Kernel = Callable[[Tensor, Tensor, Permutation, ExpertWeights], Tensor]
"""`kernel(x_TD, weights_TK, permutation, experts) -> y_TD`: each token's weighted sum over its experts.

`x_TD` and the weights of the experts share a dtype, which `y_TD` has too; `weights_TK` is float32 (float64
with float64). Sorted assignments from `permutation.ends_E[-1]` on belong to no expert: they add nothing, and
the gradient of their combine weight is zero. All tensor arguments are differentiable.
"""
