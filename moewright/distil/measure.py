"""The error of MoE blocks on held-out rows, with each top-k that they may have.

Letters: B rows, S tokens of a row, T = B S tokens, D model width, E experts.

The error of a layer is `sum_t |moe(x_t) - ffn(x_t)|^2 / sum_t |ffn(x_t) - mean ffn|^2` over real tokens: the output's
mean squared error as a share of the dense output's variance, both summed over the D dims. It has no unit, so layers
compare; 0 is the dense block, 1 is the error of its mean output alone.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moewright.distil.rows import Rows
from moewright.distil.teacher import Block, Teacher
from moewright.errors import ModelError, UsageError
from moewright.moe.config import MoEConfig
from moewright.moe.layer import MoELayer


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One layer on the held-out rows."""

    variance: float
    """Of the dense block's output: mean squared distance from its mean, summed over D."""
    errors: dict[int, float]
    """By top-k."""
    counts: dict[int, Tensor]
    """By top-k: (E,) int64, assignments to each expert."""


@torch.no_grad()
def measure_layers(
    teacher: Teacher, layers: Mapping[int, MoELayer], rows: Rows, *, batch_size: int
) -> dict[int, Measured]:
    """Each layer's error with each top-k that it may have, in evaluation and float32, over all real tokens of `rows`.

    A layer is computed anew for each top-k, as it will be in use: under softmax-topk the weights of fewer experts sum
    to less, under topk-softmax they are renormalised.

    Raises `ModelError` for a dense block whose output does not vary, or is not finite.
    """
    tallies = {layer: _Tally(moe) for layer, moe in layers.items()}
    for batch in rows.batches(batch_size):
        batch = batch.to(teacher.model.device)
        blocks = teacher.blocks(batch, layers, dtype="float32")
        for layer, tally in tallies.items():
            tally.add(blocks.pop(layer), batch.token_mask)
    return {layer: tally.result(layer) for layer, tally in tallies.items()}


class _Tally:
    """Sums over the batches of one layer, in float64."""

    def __init__(self, moe: MoELayer) -> None:
        self.moe = moe
        config, device, top_ks = moe.config, moe.router.weight.device, possible_top_ks(moe.config)
        self.tokens = 0
        self.squares = 0.0
        self.sum_D = torch.zeros(config.hidden_size, dtype=torch.float64, device=device)
        self.squared_errors = dict.fromkeys(top_ks, 0.0)
        self.counts = {k: torch.zeros(config.num_experts, dtype=torch.int64, device=device) for k in top_ks}

    def add(self, block: Block, token_mask: Tensor) -> None:
        y_TD = block.y_BSD[token_mask].double()
        self.tokens += len(y_TD)
        self.squares += y_TD.square().sum().item()
        self.sum_D += y_TD.sum(dim=0)
        moe, config = self.moe.eval(), self.moe.config
        moe.context.token_mask = token_mask.flatten()
        for k in self.squared_errors:
            moe.configure(replace(config, top_k=k))
            difference_TD = moe(block.x_BSD)[token_mask].double() - y_TD
            self.squared_errors[k] += difference_TD.square().sum().item()
            self.counts[k] += moe.stats.tokens_per_expert
        moe.configure(config)

    def result(self, layer: int) -> Measured:
        # In float64 the difference loses nothing that matters, however far the mean is from 0.
        total = self.squares - self.sum_D.square().sum().item() / self.tokens
        if not 1e-12 * self.squares < total < math.inf:
            raise ModelError(
                f"layer {layer}: the dense block's output does not vary over the held-out tokens (or is not finite), "
                "so no error is a share of anything; check the model, or give more text"
            )
        errors = {k: squared / total for k, squared in self.squared_errors.items()}
        return Measured(variance=total / self.tokens, errors=errors, counts=self.counts)


def possible_top_ks(config: MoEConfig) -> list[int]:
    """The top-k that a layer may have, ascending: 1 to E, but for those that its other options exclude."""

    def possible(k: int) -> bool:
        try:
            replace(config, top_k=k)
        except UsageError:  # groups, renormalisation and others: the config alone knows
            return False
        return True

    return [k for k in range(1, config.num_experts + 1) if possible(k)]
