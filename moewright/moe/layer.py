"""MoELayer: route, dispatch, experts, combine.

Letters: T tokens, D model width, E experts, K experts a token, N = T * K assignments.
"""

import torch
from torch import Tensor, nn

from moewright.moe.balance import attach_loss, count_tokens, switch_loss, z_loss
from moewright.moe.config import MoEConfig
from moewright.moe.context import RoutingContext
from moewright.moe.dispatch import combine, dispatch, sort_by_expert
from moewright.moe.experts import Experts
from moewright.moe.router import Router
from moewright.moe.stats import RoutingStats


class MoELayer(nn.Module):
    """A mixture of experts in place of a feed-forward block: (..., D) -> (..., D), dropless.

    Padding (False in `context.token_mask`) is computed like any token, since nobody reads its output,
    but enters neither a loss nor a statistic. In training mode the auxiliary losses are attached to
    the combine weights, so every backward pass from the output goes through them, multiplied by `context.loss_scale`.
    """

    def __init__(
        self,
        config: MoEConfig,
        *,
        context: RoutingContext | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.context = RoutingContext() if context is None else context
        self.router = Router(num_experts=config.num_experts, hidden_size=config.hidden_size, device=device, dtype=dtype)
        self.experts = Experts(
            num_experts=config.num_experts,
            hidden_size=config.hidden_size,
            expert_size=config.expert_size,
            activation=config.activation,
            gated=config.gated,
            device=device,
            dtype=dtype,
        )
        self.stats = RoutingStats(config.num_experts, device=device)

    def forward(self, hidden_states: Tensor) -> Tensor:
        config, mask_T = self.config, self.context.token_mask
        x_TD = hidden_states.reshape(-1, config.hidden_size)

        routing = self.router(x_TD, top_k=config.top_k, order=config.router_order)
        weights_TK = routing.weights_TK
        counts_E = count_tokens(routing.experts_TK, num_experts=config.num_experts, mask_T=mask_T)
        balance = switch_loss(routing.probabilities_TE, counts_E, mask_T)
        z = z_loss(routing.logits_TE, mask_T)
        self.stats.record(
            tokens_per_expert=counts_E,
            probabilities_TE=routing.probabilities_TE,
            balance_loss=balance,
            z_loss=z,
            mask_T=mask_T,
        )
        if self.training and torch.is_grad_enabled():
            auxiliary = config.balance_loss * balance + config.z_loss * z
            weights_TK = attach_loss(weights_TK, auxiliary * self.context.loss_scale.to(auxiliary))

        permutation = sort_by_expert(routing.experts_TK, num_experts=config.num_experts)
        y_ND = self.experts(dispatch(x_TD, permutation), permutation.ends_E, kernel=config.kernel)
        y_TD = combine(y_ND, weights_TK, permutation)
        return y_TD.to(hidden_states.dtype).view(hidden_states.shape)
