"""The sizes of the story, and its findings."""

from dataclasses import dataclass, field
from typing import Any

from moewright.demo.text import Split


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much the story does; the defaults take about ten minutes on two cores."""

    experts: int = 16
    granularity: int = 4
    top_k: int = 4
    train_tokens: int = 16_384
    """At most; fewer if the machine is slow."""
    held_out_tokens: int = 4_096
    module_tokens: int = 512
    """Taken from each module of the standard library."""
    sequence_length: int = 256
    batch_size: int = 4
    learning_rate: float = 1e-4
    router_learning_rate_ratio: float = 0.01
    """Of the mixture; at the full rate a few steps part the virtual groups before the experts have learnt anything."""
    training_seconds: float = 330.0
    """Limit of both training runs together, by the measured rates."""
    new_tokens: int = 48
    seed: int = 0


@dataclass
class Findings:
    """The measurements of all steps."""

    sizes: Sizes
    split: Split
    steps: int
    prompt: str
    """The text that the sample continues."""
    sized: str
    """How many steps were chosen, and why."""
    start: dict[str, Any]
    """Dense against sparse before training, as `moewright upcycle --verify-text` says it."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """The table at the end."""
    gap: tuple[float, float] = (0.0, 0.0)
    """Loss of the trained mixture less that of the trained dense model, in nats a token, and its standard error."""
    proof: dict[str, Any] = field(default_factory=dict)
    """The result, as plain transformers loads it."""
    curves: dict[str, dict[str, list[tuple[float, float]]]] = field(default_factory=dict)
    """By run (dense, moe): (step, loss) in training and on held-out text."""
    load: dict[int, list[float]] = field(default_factory=dict)
    """By layer, each expert's mean load relative to the ideal."""
