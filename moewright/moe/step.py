"""The protocol of a training step: shares of its tokens in, counts of all layers out, one reduction over the ranks.

Letters: E experts.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, all_reduce

from moewright.errors import UsageError
from moewright.moe.balance import moved_bias, moved_coefficient
from moewright.moe.context import RoutingContext
from moewright.moe.layer import MoELayer


class LayerRouting(NamedTuple):
    """The routing of one layer over the micro-batches of a step and all ranks, on the layer's device."""

    tokens_per_expert: Tensor
    """(E,) int64, assignments of real tokens, before any is dropped."""
    dropped: Tensor
    """0-dim int64, how many of them were dropped."""
    balance_loss: Tensor
    """0-dim float32, mean over the step's real tokens, before its coefficient."""
    z_loss: Tensor
    """0-dim float32, as above."""
    entropy: Tensor
    """0-dim float32, mean entropy of the router's probabilities in nats."""


class RoutingStep:
    """The protocol between whoever trains and the MoE layers of a model, which one object follows for all steps.

    For each micro-batch `begin_micro_batch`, forward pass, backward pass, `after_backward`; after the optimiser's step
    `end_step`. A block that is recomputed in the backward pass counts its tokens once.

    `stacks` has the record and the layers of each stack by its name, such as `decoder`. `group` are the ranks whose
    batches make up a step; None for one process. With tensor slicing each batch is on `copies` of them, and counts
    once. Forward and backward passes of the layers add nothing over it: `end_step` does so, for all layers together.
    """

    def __init__(
        self,
        stacks: Mapping[str, tuple[RoutingContext, Sequence[MoELayer]]],
        *,
        group: ProcessGroup | None = None,
        copies: int = 1,
    ) -> None:
        self._stacks = dict(stacks)
        # Ranks that all have the same batch count what a process alone does.
        self._group = group if group is not None and group.size() > copies else None
        self._copies = copies
        self._layers = [layer for _, layers in stacks.values() for layer in layers]
        self._shares: dict[str, float] = {}  # of the micro-batch that was begun and is not counted yet

    def begin_micro_batch(self, shares: Mapping[str, float], *, factor: float = 1.0) -> None:
        """Before a forward pass: set the scale of the layers' losses.

        `shares` says for each stack which share of the step's real tokens, those of all ranks, the micro-batch has; of
        stacks without MoE layers it is not read. `factor` is any other factor of the model's own loss: the number
        of ranks where gradients are averaged over them, a gradient scaler's.
        """
        self._require_counted()
        if missing := sorted(self._stacks.keys() - shares.keys()):
            raise UsageError(
                f"shares={dict(shares)} lacks {', '.join(missing)}: give one for each stack with MoE layers"
            )
        self._shares = {name: float(shares[name]) for name in self._stacks}
        for name, (context, layers) in self._stacks.items():
            device = layers[0].router.weight.device if layers else None
            context.loss_scale = torch.full((), self._shares[name] * factor, device=device)

    @torch.no_grad()
    def after_backward(self) -> None:
        """Count the micro-batch for the step."""
        if self._stacks and not self._shares:
            raise UsageError("after_backward: call begin_micro_batch before each forward pass")
        for name, (_, layers) in self._stacks.items():
            for layer in layers:
                layer.stats.count(self._shares[name])
        self._shares = {}

    def _require_counted(self) -> None:
        if self._shares:
            raise UsageError("a micro-batch was begun and not counted: call after_backward after its backward pass")

    @torch.no_grad()
    def end_step(self) -> list[LayerRouting]:
        """Return the counts of the step, layer by layer in the order of the stacks, and begin anew.

        Selection biases and adaptive coefficients move, and a balance loss of global scope goes on from these counts.
        With a group all its ranks must call it. Raises UsageError after a micro-batch that was not counted.
        """
        self._require_counted()
        if not self._layers:
            return []
        local = [part for layer in self._layers for part in (layer.stats.step_counts, layer.stats.step_means)]
        # float64 holds counts up to 2^53 and every float32 exactly, so that one reduction takes both.
        total = torch.cat([part.double().to(local[0].device) for part in local])  # layers may be on several devices
        if self._group is not None:
            all_reduce(total, group=self._group)
            total /= self._copies
        parts = total.split([len(part) for part in local])
        routing = []
        for layer, counts, means in zip(self._layers, parts[::2], parts[1::2], strict=True):
            counts, means = (part.to(layer.stats.step_counts.device) for part in (counts, means))
            routing.append(LayerRouting(counts[:-1].long(), counts[-1].long(), *means.float()))
            _move(layer, routing[-1], of_all_ranks=self._group is not None)
            layer.stats.begin_step()
        return routing


def _move(layer: MoELayer, step: LayerRouting, *, of_all_ranks: bool) -> None:
    """Update the state of a layer that has no gradient."""
    config, counts_E = layer.config, step.tokens_per_expert
    if config.bias_update_rate:
        assert layer.router.bias is not None, "MoEConfig asks for a bias where it is moved"
        layer.router.bias.copy_(moved_bias(layer.router.bias, counts_E, rate=config.bias_update_rate))
    if config.balance_adaptation:
        share = step.dropped / counts_E.sum().clamp(min=1)
        rate, most = config.balance_adaptation, config.max_balance_loss
        layer.balance_coefficient.copy_(moved_coefficient(layer.balance_coefficient, share, rate=rate, most=most))
    if config.balance_scope == "global":
        # One process counts all of a step itself, and needs nothing of the step before.
        layer.previous_counts.copy_(counts_E if of_all_ranks else torch.zeros_like(counts_E))
