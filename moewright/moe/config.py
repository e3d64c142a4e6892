"""What defines one mixture-of-experts layer."""

from dataclasses import dataclass
from typing import Final, Literal, get_args

from moewright.errors import UsageError

RouterOrder = Literal["softmax-topk", "topk-softmax"]
ROUTER_ORDERS: Final = get_args(RouterOrder)


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Everything that defines one layer; a combination that makes no sense raises `UsageError`."""

    hidden_size: int
    """D, the width of the model."""

    expert_size: int
    """F, the width of one expert."""

    num_experts: int
    """E, the number of routed experts (N of the upcycling papers)."""

    top_k: int
    """K, the number of experts that each token is sent to (T of the upcycling papers)."""

    router_order: RouterOrder = "topk-softmax"
    """Where the softmax stands: over all experts before the choice, or over the chosen K after it."""

    activation: str = "silu"
    """The activation of the experts, by its name in `moewright.moe.experts.ACTIVATIONS`."""

    gated: bool = True
    """Whether an expert computes `down(act(gate(x)) * up(x))` or `down(act(up(x)))`."""

    balance_loss: float = 0.0
    """Coefficient of the load-balancing loss of Switch Transformers."""

    z_loss: float = 0.0
    """Coefficient of the router z-loss of ST-MoE."""

    kernel: str = "grouped"
    """Which expert product computes the layer, by its name in `moewright.moe.kernels.KERNELS`."""

    def __post_init__(self) -> None:
        for name in ("hidden_size", "expert_size", "num_experts", "top_k"):
            value = getattr(self, name)
            if value < 1:
                raise UsageError(f"{name}={value}: it must be at least 1")
        if self.top_k > self.num_experts:
            raise UsageError(
                f"top_k={self.top_k} > num_experts={self.num_experts}: a token cannot choose more than there are"
            )
        if self.router_order not in ROUTER_ORDERS:
            raise UsageError(f"router_order={self.router_order!r}: choose one of {', '.join(ROUTER_ORDERS)}")
        for name in ("balance_loss", "z_loss"):
            value = getattr(self, name)
            if not 0.0 <= value < float("inf"):
                raise UsageError(f"{name}={value}: it must be a finite number, 0 or more")
