"""How much expert weights are scaled, and which of them.

Letters: D model width, E experts (N in arXiv 2410.07524), K experts a token (T there), G granularity.

With complete virtual groups the sparse layer computes `(s / G) * S * dense(x)`, where s is the sum of
a token's combine weights and S the product of what the linear branches are scaled by. So S = G / s
gives the dense layer back; what s is depends on the router order.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moewright.moe.config import MoEConfig
from moewright.moe.router import route
from moewright.upcycle.config import UpcycleConfig

SAMPLES = 4096


@dataclass(frozen=True)
class Factors:
    """What the three projections of a gated block are multiplied by."""

    gate: float = 1.0
    up: float = 1.0
    down: float = 1.0


def balanced(total: float) -> Factors:
    """Spread S over up and down, about sqrt(S) each: `down(act(gate(x)) * up(x))` is linear in both.

    The gate stays as it is: no activation in use is homogeneous but ReLU. The factor of up is a power
    of two, which no dtype rounds, so a weight is rounded once at most, and for a power of two S never.
    """
    up = 2.0 ** round(math.log2(total) / 2)
    return Factors(up=up, down=total / up)


def published(total: float) -> Factors:
    """Spread S as arXiv 2410.07524 does, the cube root on each of the three; not exact for gated blocks."""
    root = total ** (1 / 3)
    return Factors(root, root, root)


def factors(config: UpcycleConfig, *, weight_sum: float | None = None) -> Factors:
    """The factors of one layer for a resolved config.

    `weight_sum` is the mean over tokens of the sum of a token's combine weights, for `calibrated`.
    """
    N, T, G = config.experts, config.top_k, config.granularity
    if config.scale == "none":
        return Factors()
    if config.scale == "exact":
        return balanced(float(G))  # topk-softmax: the weights sum to 1
    if config.scale == "uniform":
        # Equation 2 of the paper takes each of the N experts to have probability 1/N, so s = T/N.
        return published(G * N / T if config.router_order == "softmax-topk" else float(G))
    assert weight_sum is not None, "a calibrated scale needs its measurement"
    return balanced(G / weight_sum)


def mean_weight_sum(x_TD: Tensor, router_ED: Tensor, *, top_k: int) -> float:
    """Mean over tokens of the sum of the chosen weights under softmax-topk, for inputs (T, D) of the layer."""
    num_experts, hidden_size = router_ED.shape
    config = MoEConfig(
        hidden_size=hidden_size, expert_size=1, num_experts=num_experts, top_k=top_k, router_order="softmax-topk"
    )
    weights_TK = route(x_TD, router_ED, config, noisy=False).weights_TK
    return float(weights_TK.sum(dim=-1, dtype=torch.float64).mean())


def expected_weight_sum(router_ED: Tensor, norm_D: Tensor, *, top_k: int, seed: int) -> float:
    """The same for inputs that nobody has measured.

    The layer reads an RMS norm with weight `norm_D`: its inputs are taken as independent Gaussians
    with these standard deviations, and the mean as that over 4096 seeded draws, in float64.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(SAMPLES, norm_D.shape[0], generator=generator, dtype=torch.float64)
    return mean_weight_sum(noise * norm_D.double(), router_ED.double(), top_k=top_k)
