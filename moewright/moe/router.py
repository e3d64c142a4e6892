"""Router: hidden states -> logits -> the experts of each token, and their weights.

Letters: T tokens, D model width, E experts, K experts a token, C tokens an expert.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moewright.moe.config import MoEConfig
from moewright.moe.precision import keep_dtypes, no_autocast


class Routing(NamedTuple):
    """The router's decisions: float32 (float64 for float64 inputs) and int64."""

    logits_TE: Tensor
    scores_TE: Tensor
    """Softmax over all experts in either order, or sigmoid: the score of each token-expert pair."""
    probabilities_TE: Tensor
    """The scores of a token, summing to 1: for the balance loss and the statistics."""
    experts_TK: Tensor
    """Chosen experts, best first; (T, 0) where experts choose."""
    weights_TK: Tensor
    """Weights of the chosen experts, before `combine_weights`."""


def route(
    x_TD: Tensor,
    weight_ED: Tensor,
    config: MoEConfig,
    *,
    linear_bias_E: Tensor | None = None,
    bias_E: Tensor | None = None,
    noisy: bool,
) -> Routing:
    """Score all pairs of tokens and experts, and choose `top_k` experts for each token.

    `linear_bias_E` is part of the logits, `bias_E` of the choice alone.

    `softmax-topk` weighs the chosen experts with their share of the softmax over all experts, so the weights
    sum to less than one (Switch Transformers, arXiv 2101.03961). `topk-softmax` takes the softmax over the chosen
    logits only; the weights sum to one (Shazeer et al., arXiv 1701.06538; Mixtral). See arXiv 2410.07524,
    section 3, for how the two behave in upcycling. Sigmoid scores are those of DeepSeek-V3 (arXiv 2412.19437,
    section 2.1.2), with its bias and its groups. `noisy` turns jitter and noise on: in training.

    The arithmetic is float32 whatever the model's dtype, also under autocast: routing is a comparison, and
    bfloat16 logits tie.
    """
    dtype = torch.promote_types(x_TD.dtype, torch.float32)
    with no_autocast(x_TD.device):
        x_TD = x_TD.to(dtype)
        if noisy and config.input_jitter:
            x_TD = x_TD * (1 + config.input_jitter * (2 * torch.rand_like(x_TD) - 1))
        logits_TE = F.linear(x_TD, weight_ED.to(dtype), None if linear_bias_E is None else linear_bias_E.to(dtype))
        if config.logit_norm:
            logits_TE = _normalised(logits_TE, config.logit_norm)
        scores_TE = _scores(logits_TE, config)
        probabilities_TE = scores_TE if config.score == "softmax" else scores_TE / scores_TE.sum(dim=-1, keepdim=True)
        experts_TK = _choose(logits_TE.detach(), scores_TE.detach(), config, bias_E=bias_E, noisy=noisy)
        if config.router_order == "topk-softmax":
            weights_TK = logits_TE.gather(1, experts_TK).softmax(dim=-1)
        else:
            weights_TK = scores_TE.gather(1, experts_TK)
    return Routing(logits_TE, scores_TE, probabilities_TE, experts_TK, weights_TK)


def _normalised(logits_TE: Tensor, deviation: float) -> Tensor:
    """Mean 0 and the given deviation over the experts (Skywork-MoE, arXiv 2406.06563, section 4.1)."""
    centred_TE = logits_TE - logits_TE.mean(dim=-1, keepdim=True)
    # Not std(): its gradient is not finite where all logits of a token are equal.
    variance_T1 = centred_TE.square().mean(dim=-1, keepdim=True)
    safe_T1 = torch.where(variance_T1 > 0, variance_T1, 1)
    std_T1 = torch.where(variance_T1 > 0, safe_T1.sqrt(), 0)
    return deviation * centred_TE / (std_T1 + 1e-6)


def _scores(logits_TE: Tensor, config: MoEConfig) -> Tensor:
    return logits_TE.softmax(dim=-1) if config.score == "softmax" else logits_TE.sigmoid()


def _choose(logits_TE: Tensor, scores_TE: Tensor, config: MoEConfig, *, bias_E: Tensor | None, noisy: bool) -> Tensor:
    """The `top_k` experts of each token, best first: (T, K)."""
    if noisy and config.logit_noise:
        logits_TE = logits_TE + config.logit_noise * _noise_like(logits_TE, config.noise)
        scores_TE = _scores(logits_TE, config)
    return selection_values(logits_TE, scores_TE, config, bias_E=bias_E).topk(config.top_k, dim=-1).indices


def selection_values(logits_TE: Tensor, scores_TE: Tensor, config: MoEConfig, *, bias_E: Tensor | None) -> Tensor:
    """(T, E): values of which a token chooses the largest; minus infinity where it may not choose."""
    if bias_E is None and config.num_groups == 1:
        return logits_TE  # they tie less than scores do
    values_TE = scores_TE if bias_E is None else scores_TE + bias_E
    return values_TE if config.num_groups == 1 else _within_best_groups(values_TE, config)


def _noise_like(logits_TE: Tensor, kind: str) -> Tensor:
    if kind == "normal":
        return torch.randn_like(logits_TE)
    # Gumbel noise makes the top K of the logits a sample without replacement from their softmax.
    return -torch.empty_like(logits_TE).exponential_().log()


def _within_best_groups(values_TE: Tensor, config: MoEConfig) -> Tensor:
    """Minus infinity outside each token's best groups (DeepSeek-V2, arXiv 2405.04434, section 2.1.3; V3: best two)."""
    groups = config.num_groups
    values_TGN = values_TE.unflatten(1, (groups, config.num_experts // groups))
    best_TGn = values_TGN.topk(1 if config.group_score == "max" else 2, dim=-1).values
    chosen_TM = best_TGn.sum(dim=-1).topk(config.top_groups, dim=-1).indices
    allowed_TG = torch.zeros_like(values_TGN[..., 0], dtype=torch.bool).scatter(1, chosen_TM, True)
    return torch.where(allowed_TG[..., None], values_TGN, -math.inf).flatten(1)


def combine_weights(weights_TK: Tensor, kept_TK: Tensor | None, config: MoEConfig, *, training: bool) -> Tensor:
    """The weights that expert outputs are summed with: of kept assignments, renormalised, scaled and masked."""
    if kept_TK is not None:
        weights_TK = torch.where(kept_TK, weights_TK, 0)
    if config.renormalize:
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(weights_TK.dtype).tiny)
    return scaled_and_masked(weights_TK, config, training=training)


def scaled_and_masked(weights: Tensor, config: MoEConfig, *, training: bool) -> Tensor:
    """Scaled with `routed_scale`, and masked as NLLB does (arXiv 2207.04672, expert output masking)."""
    if config.routed_scale != 1:
        weights = weights * config.routed_scale
    if config.output_masking and training:
        return weights * (torch.rand_like(weights) >= config.output_masking)
    return weights * (1 - config.output_masking) if config.output_masking else weights


class ExpertChoice(NamedTuple):
    """The tokens that each expert took."""

    tokens_EC: Tensor
    """int64, best first."""
    weights_EC: Tensor
    """Combine weights, before `scaled_and_masked`; 0 where not kept."""
    kept_EC: Tensor
    """bool: False for places that stay empty, since padding takes none."""


def choose_tokens(scores_TE: Tensor, config: MoEConfig, *, mask_T: Tensor | None) -> ExpertChoice:
    """Each expert takes its best tokens (Expert Choice, arXiv 2202.09368, section 3.2).

    As many as `expert_choice` times the real tokens, over E, rounded up, and no more than there are.
    """
    T, E = scores_TE.shape
    places = min(T, math.ceil(config.expert_choice * T / E))
    values_TE = scores_TE.detach() if mask_T is None else torch.where(mask_T[:, None], scores_TE.detach(), -1)
    # A stable sort, and not topk: of equal scores the earlier token is taken, on every device.
    tokens_EC = values_TE.sort(dim=0, descending=True, stable=True).indices[:places].t()
    real = torch.tensor(T, device=scores_TE.device) if mask_T is None else mask_T.sum()
    taken = (config.expert_choice * real.double() / E).ceil().clamp(max=real)
    kept_EC = (torch.arange(places, device=scores_TE.device) < taken).expand(E, places)
    weights_EC = torch.where(kept_EC, scores_TE.t().gather(1, tokens_EC), 0)
    if config.renormalize:
        total_T = weights_EC.new_zeros(T).index_add(0, tokens_EC.flatten(), weights_EC.flatten())
        weights_EC = weights_EC / total_T[tokens_EC].clamp(min=torch.finfo(weights_EC.dtype).tiny)
    return ExpertChoice(tokens_EC, weights_EC, kept_EC)


class Router(nn.Module):
    """The router's one matrix, (E, D), with the bias of its logits and the selection bias where the config has them."""

    linear_bias: nn.Parameter | None
    """(E,) in the dtype of the matrix: added to the logits, and trained; it starts at 0."""
    bias: Tensor | None
    """(E,) float32: added to the scores for the choice alone, and moved outside the gradient."""

    def __init__(
        self, config: MoEConfig, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size, device=device, dtype=dtype))
        nn.init.normal_(self.weight, std=0.02)
        zeros_E = torch.zeros(config.num_experts, device=device, dtype=dtype)
        self.register_parameter("linear_bias", nn.Parameter(zeros_E) if config.router_bias else None)
        bias_E = torch.zeros(config.num_experts, dtype=torch.float32, device=device) if config.selection_bias else None
        self.register_buffer("bias", bias_E)

    @torch.no_grad()
    def norms(self) -> Tensor:
        """(E,) float32, the norm of each expert's row: one that grows beyond the others takes all tokens."""
        norms_E: Tensor = self.weight.float().norm(dim=1)
        return norms_E

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves and casts; the bias stays float32, since one step moves it by less than bfloat16 can tell."""
        before = {"bias": self.bias}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        keep_dtypes(self, before)
        return self

    def forward(self, x_TD: Tensor, config: MoEConfig) -> Routing:
        return route(x_TD, self.weight, config, linear_bias_E=self.linear_bias, bias_E=self.bias, noisy=self.training)
