"""Expert capacity: how many assignments an expert takes, and which ones.

Letters: T tokens, K experts a token, N = T * K assignments, E experts.
"""

import torch
from torch import Tensor

from moewright.moe.config import MoEConfig


def within_capacity(
    experts_TK: Tensor, scores_TE: Tensor, config: MoEConfig, *, mask_T: Tensor | None, training: bool
) -> Tensor | None:
    """Which assignments are computed, (T, K) bool; None when all are.

    An expert takes `max(min_capacity, ceil(real tokens * K * factor / E))` assignments (GShard, arXiv 2006.16668).
    Over that, `position` keeps those of the first tokens, `probability` those of the highest score, and `random`
    any (random token selection, arXiv 2109.10465): each in training with the same chance, so that no place in a
    batch is worse than another. Evaluation is deterministic: there `random` keeps the highest scores.
    Padding takes no place.
    """
    factor = config.capacity_factor if training else config.eval_capacity_factor
    if not factor:
        return None if mask_T is None else mask_T[:, None].expand_as(experts_TK)
    order_N = _by_priority(scores_TE.detach().gather(1, experts_TK), config, training=training)
    expert_N = experts_TK if mask_T is None else torch.where(mask_T[:, None], experts_TK, config.num_experts)
    sorted_N, index_N = expert_N.flatten()[order_N].sort(stable=True)
    rank_N = torch.arange(len(sorted_N), device=sorted_N.device) - torch.searchsorted(sorted_N, sorted_N)
    kept_N = (rank_N < _capacity(experts_TK, config, factor, mask_T)) & (sorted_N < config.num_experts)
    return torch.empty_like(kept_N).scatter(0, order_N[index_N], kept_N).view_as(experts_TK)


def _capacity(experts_TK: Tensor, config: MoEConfig, factor: float, mask_T: Tensor | None) -> Tensor:
    """Assignments that one expert takes; computed on the device, as the number of real tokens is known only there."""
    T, K = experts_TK.shape
    real = torch.tensor(T, device=experts_TK.device) if mask_T is None else mask_T.sum()
    return (real.double() * K * factor / config.num_experts).ceil().clamp(min=config.min_capacity)


def _by_priority(scores_TK: Tensor, config: MoEConfig, *, training: bool) -> Tensor:
    """Flat indices t * K + k of all assignments, those first that have a place before others; ties by index."""
    N, K = scores_TK.numel(), scores_TK.shape[1]
    if config.drop_policy == "position":
        order_N = torch.arange(N, device=scores_TK.device)
    elif config.drop_policy == "random" and training:
        order_N = torch.rand(N, device=scores_TK.device).argsort()
    else:
        order_N = scores_TK.flatten().argsort(descending=True, stable=True)
    if config.first_choices_first:
        order_N = order_N[(order_N % K).argsort(stable=True)]
    return order_N
