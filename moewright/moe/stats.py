"""What a layer did with its last forward pass, kept on the device.

Letters: T tokens, E experts. A forward pass overwrites the numbers of the one before; it never adds
to them. So recomputation under gradient checkpointing counts no token twice, and whoever runs
several micro-batches adds up the numbers itself.
"""

import torch
from torch import Tensor, nn

from moewright.moe.balance import masked_mean


class RoutingStats(nn.Module):
    """Statistics of one layer's last forward pass; padding is not counted."""

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

    def __init__(self, num_experts: int, *, device: torch.device | str | None = None) -> None:
        super().__init__()
        counts_E = torch.zeros(num_experts, dtype=torch.int64, device=device)
        self.register_buffer("tokens_per_expert", counts_E, persistent=False)
        self.register_buffer("dropped", torch.zeros((), dtype=torch.int64, device=device), persistent=False)
        for name in ("balance_loss", "z_loss", "entropy"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float32, device=device), persistent=False)

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
