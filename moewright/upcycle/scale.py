"""How much expert weights are scaled, and which of them.

Letters: D model width, E experts (N in arXiv 2410.07524), K experts a token (T there), G granularity.

With complete virtual groups the sparse layer computes `(s / G) * S * dense(x)`, where s is the sum of
a token's combine weights and S the product of the factors of the linear branches. So S = G / s
gives the dense layer back; s depends on the router order. In a split without growth S = K / s, with which
each part that a token is sent to counts in full, if its experts have equal weights (`neurons.neuron_factors`).
"""

import math
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from moewright.moe.config import MoEConfig
from moewright.moe.router import route
from moewright.upcycle.config import UpcycleConfig
from moewright.upcycle.methods import bias_factors, share_factors

SAMPLES = 4096


@dataclass(frozen=True)
class Factors:
    """The factors of a block's projections and of their biases; without a gate, `gate` stands idle."""

    gate: float = 1.0
    up: float = 1.0
    down: float = 1.0
    down_bias: float = 1.0
    """Of the bias that is added after the second product (`methods.bias_factors`)."""
    shared_down: float = 1.0
    shared_down_bias: float = 1.0
    """Of the shared expert, whose first product is not scaled."""

    @property
    def gate_bias(self) -> float:
        return self.gate

    @property
    def up_bias(self) -> float:
        return self.up


DEGREES: Final = {"linear": 1, "relu": 1, "leaky_relu": 1, "relu2": 2}
"""Degree of the homogeneous activations: act(c x) = c^degree act(x) for c > 0."""


def degree_of(moe: MoEConfig) -> int:
    """Degree in `up` of an expert's output; 0 where it is not homogeneous, so `up` must stay as it is."""
    return 1 if moe.gated else DEGREES.get(moe.activation, 0)


def balanced(total: float, *, degree: int = 1) -> Factors:
    """Spread S over up and down: `up` gets about S^(1 / (degree + 1)), and `down` the rest.

    A gated block is linear in both, a squared ReLU grows with the square of `up`. The gate stays as it is, and where
    no power holds (GELU without a gate) `down` takes all of S. The factor of up is a power of two, which no dtype
    rounds, so a weight is rounded once at most, and for a power of two S never.
    """
    up = 2.0 ** round(math.log2(total) / (degree + 1)) if degree else 1.0
    return Factors(up=up, down=total / up**degree)


def published(total: float, moe: MoEConfig) -> Factors:
    """Spread S as arXiv 2410.07524 does: the cube root on each of the three projections of a gated block, which is
    not exact, and on both of a squared ReLU; the square root on both of another block without a gate."""
    root = total ** (1 / 3) if moe.gated or moe.activation == "relu2" else total**0.5
    return Factors(root, root, root)


def factors(config: UpcycleConfig, moe: MoEConfig, *, weight_sum: float | None = None) -> Factors:
    """The factors of one layer for a resolved config; `moe` is its shape, with the form of its experts.

    `weight_sum` is the mean over tokens of the sum of a token's combine weights, for `calibrated`. With common neurons
    `neurons.neuron_factors` are on top, of which the K of the others is a part.
    """
    N, T, G = config.experts, config.top_k, config.granularity
    count = 1.0 if config.common else float(min(T, G))
    mean = 1.0  # the weights of topk-softmax
    if config.scale == "calibrated":
        assert weight_sum is not None, "a calibrated scale needs its measurement"
        mean = weight_sum
    elif config.scale == "uniform" and config.router_order == "softmax-topk":
        mean = T / N  # equation 2 of the paper takes each of the N experts to have probability 1/N
    if config.scale == "none":
        spread = Factors()
    elif config.scale == "uniform":
        spread = published(G / mean, moe)
    else:
        spread = balanced(count / mean, degree=degree_of(moe))
    mode = moe.shared_mode if moe.shared_size else None
    routed, shared = (1.0, 1.0) if mode is None else share_factors(mode)
    bias, shared_bias = bias_factors(weight_sum=mean, shared_mode=mode)
    return replace(spread, down=spread.down * routed, down_bias=bias, shared_down=shared, shared_down_bias=shared_bias)


def mean_weight_sum(x_TD: Tensor, router_ED: Tensor, *, top_k: int) -> float:
    """Mean over tokens of the sum of the chosen weights under softmax-topk, for inputs (T, D) of the layer."""
    num_experts, hidden_size = router_ED.shape
    config = MoEConfig(
        hidden_size=hidden_size, expert_size=1, num_experts=num_experts, top_k=top_k, router_order="softmax-topk"
    )
    weights_TK = route(x_TD, router_ED, config, noisy=False).weights_TK
    return float(weights_TK.sum(dim=-1, dtype=torch.float64).mean())


def expected_weight_sum(
    router_ED: Tensor, scale_D: Tensor, *, shift_D: Tensor | None = None, top_k: int, seed: int
) -> float:
    """The same without measured inputs.

    The layer reads a norm: its inputs are taken as independent Gaussians with the norm's weights for standard
    deviations and its biases for means, and the mean as that over 4096 seeded draws, in float64.
    """
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(SAMPLES, scale_D.shape[0], generator=generator, dtype=torch.float64) * scale_D.double()
    if shift_D is not None:
        x_TD = x_TD + shift_D.double()
    return mean_weight_sum(x_TD, router_ED.double(), top_k=top_k)
