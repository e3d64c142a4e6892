"""What an upcycling does; importing this imports no torch."""

from dataclasses import dataclass, replace

from moewright.errors import UsageError
from moewright.moe.config import ROUTER_ORDERS, RouterOrder

SCALES = ("exact", "uniform", "calibrated", "none")


@dataclass(frozen=True, kw_only=True)
class UpcycleConfig:
    """How a dense model becomes sparse; the letters are those of arXiv 2410.07524.

    A setting that makes no sense raises `UsageError` when the config is made; what depends on the
    source model (widths, number of layers) is checked by `moewright.upcycle.plan`.
    """

    experts: int
    """N, the number of routed experts of a layer."""

    top_k: int
    """T, the number of experts that each token is sent to: a multiple of the granularity."""

    granularity: int = 1
    """G: one expert has 1/G of the dense feed-forward width, so a layer grows N/G times."""

    router_order: RouterOrder | None = None
    """`topk-softmax` or `softmax-topk`; by default the first, and the second for top_k = 1."""

    scale: str | None = None
    """`exact`, `uniform`, `calibrated` or `none`; by default `exact`, and `calibrated` for `softmax-topk`."""

    layers: str = "all"
    """Which layers become sparse: `all`, `every:n` (the n-th, 2n-th, ... of each stack), or a list such as `0,2,5` or
    `encoder.3,decoder.3`."""

    seed: int = 0
    """Seed of the router's rows."""

    router_std: float | None = None
    """Standard deviation of the router's rows; by default 0.02, and 0.05/sqrt(D) for `softmax-topk`."""

    def __post_init__(self) -> None:
        for name in ("experts", "top_k", "granularity"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)}: it must be at least 1")
        N, T, G = self.experts, self.top_k, self.granularity
        if T > N:
            raise UsageError(f"top_k={T} > experts={N}: a token cannot choose more experts than there are")
        if N % G:
            raise UsageError(f"experts={N} is not a multiple of granularity={G}: every shard needs as many copies")
        if T % G:
            allowed = ", ".join(str(m * G) for m in range(1, min(N // G, 4) + 1))
            raise UsageError(
                f"top_k={T} is not a multiple of granularity={G}: a token would get part of the dense block; "
                f"use {allowed}{', ...' if N // G > 4 else ''}"
            )
        if self.router_order not in (None, *ROUTER_ORDERS):
            raise UsageError(f"router_order={self.router_order!r}: choose one of {', '.join(ROUTER_ORDERS)}")
        if self.scale not in (None, *SCALES):
            raise UsageError(f"scale={self.scale!r}: choose one of {', '.join(SCALES)}")
        if self.router_std is not None and not 0.0 < self.router_std < float("inf"):
            raise UsageError(f"router_std={self.router_std}: it must be a finite number above 0")
        order, scale = self.resolved_order(), self.resolved_scale()
        if scale == "exact" and order == "softmax-topk":
            raise UsageError(
                "scale=exact with router_order=softmax-topk: a token's weights have no constant sum, none is exact; "
                "use scale=calibrated or router_order=topk-softmax"
            )
        if scale == "calibrated" and order == "topk-softmax":
            raise UsageError(
                "scale=calibrated with router_order=topk-softmax: its weights sum to 1 and need no calibration; "
                "use scale=exact"
            )

    def resolved_order(self) -> RouterOrder:
        """The router order, with its default in place.

        With one expert a token `topk-softmax` gives the weight 1 whatever the logits, and so the
        router no gradient from the model's loss.
        """
        return self.router_order or ("softmax-topk" if self.top_k == 1 else "topk-softmax")

    def resolved_scale(self) -> str:
        """The scale, with its default in place."""
        return self.scale or ("calibrated" if self.resolved_order() == "softmax-topk" else "exact")

    def resolved(self, *, hidden_size: int) -> "UpcycleConfig":
        """The same config with every default in place, for a model of width D."""
        order = self.resolved_order()
        std = 0.05 / hidden_size**0.5 if order == "softmax-topk" else 0.02
        return replace(self, router_order=order, scale=self.resolved_scale(), router_std=self.router_std or std)
