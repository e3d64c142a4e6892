"""The experts' parameters, and the contract of the kernels that compute with them.

Letters: T tokens, K experts a token, D model width, E experts, F expert width, H width of the first product
(2F when gated, the gate half first; else F), S width of the shared expert.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moewright.errors import UsageError
from moewright.moe.activations import activation_named
from moewright.moe.config import MoEConfig
from moewright.moe.exchange import Permutation
from moewright.moe.precision import autocast_dtype


class ExpertWeights(NamedTuple):
    """The stacked weights of E feed-forward blocks, in the layout of transformers, and their activation."""

    first_EHD: Tensor
    down_EDF: Tensor
    first_bias_EH: Tensor | None
    down_bias_ED: Tensor | None
    activation: str
    """A name of `moewright.moe.activations`."""
    gated: bool
    """Whether an expert computes `down(act(gate(x)) * up(x))` or `down(act(up(x)))`."""

    def to(self, dtype: torch.dtype) -> "ExpertWeights":
        """All four in a dtype; without a copy where they have it."""
        matrices = self._replace(first_EHD=self.first_EHD.to(dtype), down_EDF=self.down_EDF.to(dtype))
        return matrices.biases_to(dtype)

    def biases_to(self, dtype: torch.dtype) -> "ExpertWeights":
        """The same, but the matrices as they are."""
        first, down = self.first_bias_EH, self.down_bias_ED
        return self._replace(
            first_bias_EH=None if first is None else first.to(dtype),
            down_bias_ED=None if down is None else down.to(dtype),
        )


Kernel = Callable[[Tensor, Tensor, Permutation, ExpertWeights], Tensor]
"""`kernel(x_TD, weights_TK, permutation, experts) -> y_TD`: each token's weighted sum over its experts.

Products are in the dtype of `x_TD`, which `y_TD` has too. The weights of the experts have it as well, or float32 under
autocast: a kernel casts them, and their gradients back, where that costs least. `weights_TK` is float32 (float64 with
float64). Sorted assignments from `permutation.ends_E[-1]` on belong to no expert: they add nothing, and
the gradient of their combine weight is zero. All tensor arguments are differentiable.
"""


class Experts(nn.Module):
    """E feed-forward blocks in the layout of transformers.

    Gated: `gate_up_proj` (E, 2F, D), the gate half first; otherwise `up_proj` (E, F, D). Both:
    `down_proj` (E, D, F). With biases: the same names with `_bias`, (E, H) and (E, D). Each expert starts as
    `nn.Linear` would start it.
    """

    held: Callable[[str, Tensor], Tensor]
    """What this process computes with for a parameter, by its name: all of it, until experts are divided among
    processes."""
    recomputed: bool = False
    """Whether the backward pass computes the products again; what is kept then is the rows that came in."""

    def __init__(
        self, config: MoEConfig, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        activation_named(config.activation, gated=config.gated)
        self.gated, self.activation, self.bias = config.gated, config.activation, config.expert_bias
        self.held = _whole
        self.first_name = "gate_up_proj" if config.gated else "up_proj"
        E, D, F = config.num_experts, config.hidden_size, config.expert_size
        H = 2 * F if config.gated else F
        shapes: dict[str, tuple[tuple[int, ...], int]] = {self.first_name: ((E, H, D), D), "down_proj": ((E, D, F), F)}
        if config.expert_bias:
            shapes |= {f"{self.first_name}_bias": ((E, H), D), "down_proj_bias": ((E, D), F)}
        for name, (shape, inputs) in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
            nn.init.uniform_(getattr(self, name), -(inputs**-0.5), inputs**-0.5)

    def weights(self) -> ExpertWeights:
        """The parameters, as far as they are held here."""

        def parameter(name: str) -> Tensor:
            # Not get_parameter: adapters put a computed tensor in its place.
            return self.held(name, getattr(self, name))

        return ExpertWeights(
            parameter(self.first_name),
            parameter("down_proj"),
            parameter(f"{self.first_name}_bias") if self.bias else None,
            parameter("down_proj_bias") if self.bias else None,
            self.activation,
            self.gated,
        )

    def forward(self, x_TD: Tensor, weights_TK: Tensor, permutation: Permutation, *, kernel: Kernel) -> Tensor:
        """(T, D) -> (T, D): for each token the sum of its experts' outputs, weighted with `weights_TK`.

        Raises UsageError for tokens and weights of two dtypes without autocast.
        """
        if self.recomputed and torch.is_grad_enabled():
            inputs = (x_TD, weights_TK, permutation, kernel)
            y_TD: Tensor = checkpoint(self._compute, *inputs, use_reentrant=False, preserve_rng_state=False)
            return y_TD
        return self._compute(x_TD, weights_TK, permutation, kernel)

    def _compute(self, x_TD: Tensor, weights_TK: Tensor, permutation: Permutation, kernel: Kernel) -> Tensor:
        # Autocast knows nothing of custom operators: do for ours what it does for torch's products.
        weights, dtype = self.weights(), autocast_dtype(x_TD)
        if dtype is None and x_TD.dtype != weights.first_EHD.dtype:
            raise UsageError(
                f"tokens of {x_TD.dtype} and experts of {weights.first_EHD.dtype}: cast one, or use autocast"
            )
        return kernel(x_TD if dtype is None else x_TD.to(dtype), weights_TK, permutation, weights)


def _whole(name: str, parameter: Tensor) -> Tensor:
    return parameter


class SharedExpert(nn.Module):
    """The feed-forward block that every token goes through, beside the routed experts.

    `shared_mode` says how the outputs are joined: `added`; `gated`, with a sigmoid of its own for each token
    (Qwen2-MoE); `residual`, both weighted by a softmax of two (residual MoE, arXiv 2201.05596; the softmax as in
    DeepSpeed).
    """

    def __init__(
        self, config: MoEConfig, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.mode, self.activation = config.shared_mode, activation_named(config.activation, gated=config.gated)
        D, S = config.hidden_size, config.shared_size

        def linear(inputs: int, outputs: int, *, bias: bool) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=bias, device=device, dtype=dtype)

        self.first_name = "gate_up_proj" if config.gated else "up_proj"
        self.add_module(self.first_name, linear(D, 2 * S if config.gated else S, bias=config.expert_bias))
        self.down_proj = linear(S, D, bias=config.expert_bias)
        self.gate: nn.Linear | None = None
        if self.mode != "added":
            self.gate = linear(D, 1 if self.mode == "gated" else 2, bias=self.mode == "residual")

    def forward(self, x_TD: Tensor) -> Tensor:
        """The block's own output, before it is joined: (T, D) -> (T, D)."""
        output_TD: Tensor = self.down_proj(self.activation(self.get_submodule(self.first_name)(x_TD)))
        return output_TD

    def join(self, x_TD: Tensor, routed_TD: Tensor, shared_TD: Tensor) -> Tensor:
        """The layer's output from that of the routed experts and the block's own: three times (T, D) -> (T, D)."""
        if self.gate is None:
            output_TD: Tensor = routed_TD + shared_TD
        elif self.mode == "gated":
            output_TD = routed_TD + self.gate(x_TD).sigmoid() * shared_TD
        else:
            share_T2 = self.gate(x_TD).softmax(dim=-1)
            output_TD = share_T2[:, :1] * routed_TD + share_T2[:, 1:] * shared_TD
        return output_TD
