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
    """(E,) int64, assignments of real tokens."""
    balance_loss: Tensor
    """0-dim, `switch_loss` before its coefficient; float32, like the two below, unless the module is cast."""
    z_loss: Tensor
    """0-dim, before its coefficient."""
    entropy: Tensor
    """0-dim, mean entropy of the router's probabilities in nats."""

    def __init__(self, num_experts: int, *, device: torch.device | str | None = None) -> None:
        super().__init__()
        counts_E = torch.zeros(num_experts, dtype=torch.int64, device=device)
        self.register_buffer("tokens_per_expert", counts_E, persistent=False)
        for name in ("balance_loss", "z_loss", "entropy"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float32, device=device), persistent=False)

    @torch.no_grad()
    def record(
        self,
        *,
        tokens_per_expert: Tensor,
        probabilities_TE: Tensor,
        balance_loss: Tensor,
        z_loss: Tensor,
        mask_T: Tensor | None,
    ) -> None:
        """Overwrite the numbers with those of this forward pass."""
        entropy_T = -(probabilities_TE * probabilities_TE.clamp(min=1e-30).log()).sum(dim=-1)
        self.tokens_per_expert.copy_(tokens_per_expert)
        self.balance_loss.copy_(balance_loss)
        self.z_loss.copy_(z_loss)
        self.entropy.copy_(masked_mean(entropy_T, mask_T))
