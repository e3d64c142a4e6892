"""MoELayer: route, cut, experts, combine, shared expert.

Letters: T tokens, D model width, E experts, K experts a token, C tokens an expert.
"""

import math
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from moewright.errors import UsageError
from moewright.moe.balance import attach_loss, count_tokens, sequence_switch_loss, switch_loss, z_loss
from moewright.moe.capacity import within_capacity
from moewright.moe.config import MoEConfig
from moewright.moe.context import RoutingContext
from moewright.moe.exchange import Exchange, LocalExchange
from moewright.moe.experts import Experts, SharedExpert
from moewright.moe.kernels import default_kernel, kernel_named
from moewright.moe.precision import keep_dtypes
from moewright.moe.router import Router, Routing, choose_tokens, combine_weights, scaled_and_masked
from moewright.moe.stats import RoutingStats


class MoELayer(nn.Module):
    """A mixture of experts in place of a feed-forward block: (..., D) -> (..., D).

    Padding (False in `context.token_mask`) goes to no expert, takes no capacity, and enters neither a loss nor
    a statistic. In training mode the auxiliary losses are attached to the combine weights, so every backward
    pass from the output goes through them, multiplied by `context.loss_scale`.

    What moves outside the gradient (selection bias, adaptive coefficient) is moved by `RoutingStep`.
    """

    balance_coefficient: Tensor
    """0-dim float32: what the balance loss is multiplied with, in place of `balance_loss`, if there is adaptation."""
    previous_counts: Tensor
    """(E,) float32, assignments to each expert in the step before over all ranks, 0 with one: for the global balance
    loss."""

    def __init__(
        self,
        config: MoEConfig,
        *,
        context: RoutingContext | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.context = RoutingContext() if context is None else context
        self.router = Router(config, device=device, dtype=dtype)
        self.exchange: Exchange = LocalExchange(config.num_experts)
        self.experts = Experts(config, device=device, dtype=dtype)
        self.shared = SharedExpert(config, device=device, dtype=dtype) if config.shared_size else None
        self.stats = RoutingStats(config.num_experts, device=device)
        self.configure(config)

    def configure(self, config: MoEConfig) -> None:
        """Replace the config by one that asks for the same parameters; under other balance settings the balance begins
        anew."""
        before, self.config = self.__dict__.get("config"), config
        names = ("balance_loss", "balance_adaptation", "max_balance_loss", "balance_scope")
        if before is None or any(getattr(before, name) != getattr(config, name) for name in names):
            self._begin_balance()

    def _begin_balance(self) -> None:
        config, device = self.config, self.stats.step_counts.device
        coefficient = torch.full((), config.balance_loss, dtype=torch.float32, device=device)
        self.register_buffer("balance_coefficient", coefficient, persistent=config.balance_adaptation > 0)
        counts_E = torch.zeros(config.num_experts, dtype=torch.float32, device=device)
        self.register_buffer("previous_counts", counts_E, persistent=config.balance_scope == "global")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves and casts; the buffers above stay float32, and begin anew when they leave the meta device."""
        before = {"balance_coefficient": self.balance_coefficient, "previous_counts": self.previous_counts}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if before["previous_counts"].is_meta and not self.previous_counts.is_meta:
            self.stats.begin_step()
            self._begin_balance()
        else:
            keep_dtypes(self, before)
        return self

    def forward(self, hidden_states: Tensor) -> Tensor:
        config = self.config
        x_TD = hidden_states.reshape(-1, config.hidden_size)
        if (mask_T := self.context.token_mask) is not None:
            if mask_T.dtype != torch.bool or mask_T.shape != x_TD.shape[:1]:
                raise UsageError(
                    f"token_mask is {tuple(mask_T.shape)} {mask_T.dtype} for {len(x_TD)} tokens: it must be bool, "
                    "one value for each token of the flattened batch"
                )
            # Padding becomes zeros: even with a weight of 0, a value that is not finite would spread.
            x_TD = torch.where(mask_T[:, None], x_TD, 0)
        routing = self.router(x_TD, config)
        if config.choice == "token":
            output_TD, shared_TD = self._tokens_choose(x_TD, routing, length=math.prod(hidden_states.shape[-2:-1]))
        else:
            output_TD, shared_TD = self._experts_choose(x_TD, routing)
        if self.shared is not None:
            output_TD = self.shared.join(x_TD, output_TD, shared_TD)
        return output_TD.to(hidden_states.dtype).view(hidden_states.shape)

    def _tokens_choose(self, x_TD: Tensor, routing: Routing, *, length: int) -> tuple[Tensor, Tensor]:
        config, mask_T = self.config, self.context.token_mask
        experts_TK = routing.experts_TK
        kept_TK = within_capacity(experts_TK, routing.scores_TE, config, mask_T=mask_T, training=self.training)
        weights_TK = combine_weights(routing.weights_TK, kept_TK, config, training=self.training)

        counts_E = count_tokens(experts_TK, num_experts=config.num_experts, mask_T=mask_T)
        computed = None if kept_TK is None else kept_TK.sum()
        with torch.set_grad_enabled(self._attaches_losses()):
            balance = self._balance_loss(routing, counts_E, length=length)
        weights_TK = self._with_losses(weights_TK, routing, counts_E, balance=balance, computed=computed)

        return self._outputs(x_TD, x_TD, experts_TK, weights_TK, kept_TK)

    def _experts_choose(self, x_TD: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
        """Each place that an expert has is a token of its own to the kernels: one that chose that expert."""
        config = self.config
        tokens_EC, weights_EC, kept_EC = choose_tokens(routing.scores_TE, config, mask_T=self.context.token_mask)
        weights_EC = scaled_and_masked(weights_EC, config, training=self.training)
        counts_E = kept_EC.sum(dim=1)
        even = routing.probabilities_TE.new_ones(())  # the Switch loss of an even load
        weights_EC = self._with_losses(weights_EC, routing, counts_E, balance=even, computed=None)

        experts_EC = torch.arange(config.num_experts, device=x_TD.device)[:, None].expand_as(tokens_EC)
        tokens_N = tokens_EC.flatten()
        as_choices = (per_place_EC.reshape(-1, 1) for per_place_EC in (experts_EC, weights_EC, kept_EC))
        routed_ND, shared_TD = self._outputs(x_TD, x_TD[tokens_N], *as_choices)
        routed_TD = torch.zeros_like(x_TD, dtype=weights_EC.dtype)
        return routed_TD.index_add(0, tokens_N, routed_ND.to(weights_EC.dtype)), shared_TD

    def _outputs(
        self, x_TD: Tensor, choosing_ND: Tensor, experts_NK: Tensor, weights_NK: Tensor, kept_NK: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Of those that choose the weighted sum over their experts, wherever they are: (N, D); of all tokens the output
        of the shared expert, or nothing: (T, D)."""
        delivery = self.exchange.send(choosing_ND, experts_NK, weights_NK, kept_NK)
        shared_TD = x_TD.new_empty(0) if self.shared is None else self.shared(x_TD)  # while the rows are on their way
        rows_RD, weights_RL, permutation, ticket = self.exchange.arrive(delivery)
        name = self.config.kernel
        kernel = kernel_named(default_kernel(x_TD.device) if name == "auto" else name)
        return self.exchange.receive(ticket, self.experts(rows_RD, weights_RL, permutation, kernel=kernel)), shared_TD

    def _balance_loss(self, routing: Routing, counts_E: Tensor, *, length: int) -> Tensor:
        scope, mask_T = self.config.balance_scope, self.context.token_mask
        if scope == "sequence":
            return sequence_switch_loss(routing.probabilities_TE, routing.experts_TK, length=length, mask_T=mask_T)
        if scope == "global" and self._attaches_losses():
            # The other ranks' counts of this step are known at its end only, and later micro-batches are not counted
            # yet: the step before stands for both.
            counts_E = counts_E + self.stats.step_counts[:-1] + self.previous_counts
        return switch_loss(routing.probabilities_TE, counts_E, mask_T)

    def _attaches_losses(self) -> bool:
        return self.training and torch.is_grad_enabled() and self.config.balance_loss + self.config.z_loss > 0

    def _with_losses(
        self, weights: Tensor, routing: Routing, counts_E: Tensor, *, balance: Tensor, computed: Tensor | None
    ) -> Tensor:
        """Record the statistics, and attach the auxiliary losses to the combine weights in training."""
        mask_T = self.context.token_mask
        attaches = self._attaches_losses()
        with torch.set_grad_enabled(attaches):
            z = z_loss(routing.logits_TE, mask_T)
        self.stats.record(
            tokens_per_expert=counts_E,
            computed=computed,
            probabilities_TE=routing.probabilities_TE,
            balance_loss=balance,
            z_loss=z,
            mask_T=mask_T,
        )
        if not attaches:
            return weights
        config = self.config
        coefficient = self.balance_coefficient.to(balance) if config.balance_adaptation else config.balance_loss
        auxiliary = coefficient * balance + config.z_loss * z
        return attach_loss(weights, auxiliary * self.context.loss_scale.to(auxiliary))
