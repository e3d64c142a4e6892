"""The result of a completed run, read from its folder."""

from dataclasses import dataclass
from pathlib import Path

from moewright.errors import CheckpointError
from moewright.train.folder import EVALUATIONS, FINAL, METRICS
from moewright.train.metrics import read_json_lines, throughput


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """A completed run, as its folder records it."""

    steps: int
    """Optimiser steps."""
    tokens: int
    """Real tokens read in them."""
    losses: list[float]
    """Mean loss of each step, in nats per predicted token."""
    evaluations: list[dict[str, float]]
    """`step` and `loss` (nats per token of held-out text) of each evaluation; empty without held-out text."""
    tokens_per_second: float
    """Real tokens per second of training, evaluations and checkpoints not counted."""
    peak_memory_bytes: int
    """The largest `peak_memory_bytes` of `metrics.jsonl`."""
    final: Path
    """The Hugging Face folder of the trained model."""


def recorded_result(folder: Path) -> TrainResult:
    """The result of the completed run in `folder`; CheckpointError if its lines are lost."""
    records, evaluations = (read_json_lines(folder / name) for name in (METRICS, EVALUATIONS))
    if not records:
        raise CheckpointError(f"{folder / METRICS} has no step of the finished run: restore it, or name a new `out`")
    return TrainResult(
        steps=records[-1]["step"],
        tokens=records[-1]["tokens"],
        losses=[record["loss"] for record in records],
        evaluations=[{"step": record["step"], "loss": record["loss"]} for record in evaluations],
        tokens_per_second=throughput(records),
        peak_memory_bytes=max(record["peak_memory_bytes"] for record in records),
        final=folder / FINAL,
    )
