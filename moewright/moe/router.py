"""Router: hidden states -> logits -> chosen experts and their combine weights.

Letters: T tokens, D model width, E experts, K experts a token.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moewright.moe.config import RouterOrder
from moewright.moe.precision import no_autocast


class Routing(NamedTuple):
    """What the router decided; float32 (float64 for float64 inputs) and int64."""

    logits_TE: Tensor
    probabilities_TE: Tensor
    """Softmax over all experts, in either order; the balance loss and the statistics need it."""
    experts_TK: Tensor
    """Chosen experts, best first."""
    weights_TK: Tensor
    """Combine weights of the chosen experts."""


def route(x_TD: Tensor, weight_ED: Tensor, *, top_k: int, order: RouterOrder) -> Routing:
    """Choose `top_k` experts for each token.

    `softmax-topk` weighs the chosen experts with their share of the softmax over all experts, so
    the weights sum to less than one (Shazeer et al. 2017, without renormalisation). `topk-softmax`
    takes the softmax over the chosen logits only; the weights sum to one (Mixtral). Both choose the
    same experts. See arXiv 2410.07524, section 3, for how the two behave in upcycling.

    The arithmetic is float32 whatever the model's dtype, also under autocast: routing is a
    comparison, and bfloat16 logits tie.
    """
    dtype = torch.promote_types(x_TD.dtype, torch.float32)
    with no_autocast(x_TD.device):
        logits_TE = F.linear(x_TD.to(dtype), weight_ED.to(dtype))
        probabilities_TE = logits_TE.softmax(dim=-1)
        chosen_TK, experts_TK = logits_TE.topk(top_k, dim=-1)
        weights_TK = chosen_TK.softmax(dim=-1) if order == "topk-softmax" else probabilities_TE.gather(1, experts_TK)
    return Routing(logits_TE, probabilities_TE, experts_TK, weights_TK)


class Router(nn.Module):
    """The router's one matrix, (E, D)."""

    def __init__(
        self,
        *,
        num_experts: int,
        hidden_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, device=device, dtype=dtype))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x_TD: Tensor, *, top_k: int, order: RouterOrder) -> Routing:
        return route(x_TD, self.weight, top_k=top_k, order=order)
