"""Statistics of a layer's last forward pass, and of the micro-batches of a step, kept on the device.

Letters: T tokens, E experts. A forward pass overwrites the numbers of the one before; it never adds to them. So
recomputation under gradient checkpointing counts no token twice: a step adds them up after the backward pass.
"""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from moewright.moe.balance import masked_mean
from moewright.moe.precision import keep_dtypes


class RoutingStats(nn.Module):
    """Statistics of one layer on this rank; padding is not counted."""

    tokens_per_expert: Tensor
    """(E,) int64, assignments of real tokens, before any is dropped."""
    dropped: Tensor
    """0-dim int64, how many of them were dropped."""
    balance_loss: Tensor
    """0-dim, before its coefficient; float32, like the two below, unless the module is cast."""
    z_loss: Tensor
    """0-dim, before its coefficient."""
    entropy: Tensor
    """0-dim, mean entropy of the router's probabilities in nats."""
    step_counts: Tensor
    """(E + 1,) int64, of the step's micro-batches so far: assignments to each expert, and dropped ones last."""
    step_means: Tensor
    """(3,) float32: balance loss, z-loss and entropy of these micro-batches, each times its share of the step."""

    def __init__(self, num_experts: int, *, device: torch.device | str | None = None) -> None:
        super().__init__()
        counts_E = torch.zeros(num_experts, dtype=torch.int64, device=device)
        self.register_buffer("tokens_per_expert", counts_E, persistent=False)
        self.register_buffer("dropped", torch.zeros((), dtype=torch.int64, device=device), persistent=False)
        for name in ("balance_loss", "z_loss", "entropy"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float32, device=device), persistent=False)
        step_counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=device)
        self.register_buffer("step_counts", step_counts, persistent=False)
        self.register_buffer("step_means", torch.zeros(3, dtype=torch.float32, device=device), persistent=False)

    @torch.no_grad()
    def record(
        self,
        *,
        tokens_per_expert: Tensor,
        computed: Tensor | None,
        probabilities_TE: Tensor,
        balance_loss: Tensor,
        z_loss: Tensor,
        mask_T: Tensor | None,
    ) -> None:
        """Overwrite the numbers with those of this forward pass; `computed`: assignments not dropped, None for all."""
        self.tokens_per_expert.copy_(tokens_per_expert)
        if computed is None:
            self.dropped.zero_()
        else:
            self.dropped.copy_(tokens_per_expert.sum() - computed)
        self.balance_loss.copy_(balance_loss)
        self.z_loss.copy_(z_loss)
        self.entropy.copy_(masked_mean(torch.special.entr(probabilities_TE).sum(dim=-1), mask_T))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves and casts; the sums of a step stay float32."""
        before = {"step_means": self.step_means}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        keep_dtypes(self, before)
        return self

    def count(self, share: float) -> None:
        """Add the last forward pass, which read `share` of the step's real tokens, to the step."""
        self.step_counts += torch.cat([self.tokens_per_expert, self.dropped[None]])
        self.step_means += share * torch.stack([self.balance_loss, self.z_loss, self.entropy])

    def begin_step(self) -> None:
        """Count from 0 again."""
        self.step_counts.zero_()
        self.step_means.zero_()

    @property
    def dropped_share(self) -> Tensor:
        """0-dim float32, dropped assignments over all."""
        return self.dropped.float() / self.tokens_per_expert.sum().clamp(min=1)

    @property
    def load_imbalance(self) -> Tensor:
        """0-dim float32, assignments of the busiest expert over the mean."""
        return load_imbalance(self.tokens_per_expert)

    @property
    def dead_experts(self) -> Tensor:
        """0-dim int64, experts that no token chose."""
        return (self.tokens_per_expert == 0).sum()


def load_imbalance(counts_E: Tensor) -> Tensor:
    """Largest count over the mean count, 0-dim float32; 1 is even, E is all to one, and 0 where there is no count."""
    return counts_E.max() * counts_E.numel() / counts_E.sum().clamp(min=1).float()
