"""The settings of a layer-wise distillation; importing this imports no torch."""

from dataclasses import dataclass
from typing import Literal, get_args

from moewright.errors import UsageError

Dtype = Literal["float32", "bfloat16"]
Device = Literal["auto", "cpu", "cuda"]
DTYPES, DEVICES = get_args(Dtype), get_args(Device)


@dataclass(frozen=True, kw_only=True)
class DistilConfig:
    """How the layers of a mixture learn what their dense blocks compute; see `moewright.distil.apply`.

    A setting that makes no sense raises `UsageError` when the config is made; limits of the models and the text
    (experts, positions, length) are checked before anything is trained.
    """

    tolerance: float
    """The error, as a share of the dense output's variance, that a layer's smallest top-k is chosen for."""

    tokens: int = 200_000
    """How many tokens each layer learns from; the text is read again where it has fewer."""

    held_out_tokens: int = 8192
    """How many tokens the errors are measured on."""

    top_k: int | None = None
    """Experts a token while a layer is trained; by default the number that the layer has."""

    layers_at_once: int = 8
    """Layers trained side by side: more take more memory, fewer more passes of the dense model over the text."""

    batch_size: int = 1
    """Sequences an optimiser step. So few tokens are read that more of them would leave too few steps."""

    sequence_length: int = 512
    """Tokens the dense model reads at once."""

    learning_rate: float = 1e-3
    """The peak: after a warm-up of a twentieth of the steps, and before a cosine down to a tenth of it."""

    router_learning_rate_ratio: float = 1.0
    """The routers' learning rate as a share of the experts'."""

    balance_loss: float = 0.01
    """Coefficient of the load-balancing loss of Switch Transformers, in each layer."""

    z_loss: float = 0.0
    """Coefficient of the router z-loss of ST-MoE, in each layer."""

    dtype: Dtype = "float32"
    """Precision of training: `bfloat16` is autocast. Weights, losses and measurements are float32 either way."""

    seed: int = 0
    """Of the order of the text."""

    device: Device = "auto"
    """Where to train; auto takes a GPU when there is one."""

    def __post_init__(self) -> None:
        if not 0.0 < self.tolerance < 1.0:
            raise UsageError(
                f"tolerance={self.tolerance}: it is a share of the dense output's variance, above 0 and below 1 "
                "(a layer that always says the mean output has the error 1)"
            )
        for name, least in (("layers_at_once", 1), ("batch_size", 1), ("sequence_length", 2), ("seed", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"{name}={getattr(self, name)}: it must be at least {least}")
        if self.top_k is not None and self.top_k < 1:
            raise UsageError(f"top_k={self.top_k}: it must be at least 1")
        for name in ("learning_rate", "router_learning_rate_ratio", "balance_loss", "z_loss"):
            value, above = getattr(self, name), name == "learning_rate"
            if not 0.0 <= value < float("inf") or (above and value == 0.0):
                raise UsageError(f"{name}={value}: it must be a finite number, {'above 0' if above else '0 or more'}")
        for name, allowed in (("dtype", DTYPES), ("device", DEVICES)):
            if getattr(self, name) not in allowed:
                raise UsageError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(allowed)}")
        if self.tokens < self.batch_tokens:
            raise UsageError(
                f"tokens={self.tokens}: a step takes {self.batch_tokens} (batch_size times sequence_length); give at "
                "least as many, or make the batch smaller"
            )
        if self.held_out_tokens < 2:
            raise UsageError(f"held_out_tokens={self.held_out_tokens}: it must be at least 2")

    @property
    def batch_tokens(self) -> int:
        """Tokens of an optimiser step."""
        return self.batch_size * self.sequence_length

    @property
    def steps(self) -> int:
        """Optimiser steps of each layer."""
        return self.tokens // self.batch_tokens
