"""The experts one after the other: the oracle of all other kernels.

Letters: T tokens, K experts a token, D model width, E experts, n assignments of one expert.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from moewright.moe.activations import activation_named
from moewright.moe.exchange import Permutation
from moewright.moe.experts import ExpertWeights


def loop(x_TD: Tensor, weights_TK: Tensor, permutation: Permutation, experts: ExpertWeights) -> Tensor:
    """Any floating dtype, any device; reads `ends_E` on the host. See `moewright.moe.experts.Kernel`."""
    activation, experts = activation_named(experts.activation, gated=experts.gated), experts.to(x_TD.dtype)
    weight_N = weights_TK.flatten()[permutation.order_N]
    output_TD = torch.zeros_like(x_TD, dtype=weights_TK.dtype)
    start = 0
    for e, end in enumerate(permutation.ends_E.tolist()):
        token_n = permutation.token_N[start:end]
        first_bias = None if experts.first_bias_EH is None else experts.first_bias_EH[e]
        down_bias = None if experts.down_bias_ED is None else experts.down_bias_ED[e]
        hidden_nH = F.linear(x_TD[token_n], experts.first_EHD[e], first_bias)
        y_nD = F.linear(activation(hidden_nH), experts.down_EDF[e], down_bias)
        output_TD = output_TD.index_add(0, token_n, y_nD * weight_N[start:end, None])
        start = end
    return output_TD.to(x_TD.dtype)
