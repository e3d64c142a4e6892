"""The settings of a run: one tree of frozen dataclasses, a sentence under every field.

Each room owns its part; this file owns `[train]` and composes the tree.
"""

import math
from dataclasses import dataclass, field, fields
from typing import Literal

from moewright.checkpoint.disk import overlap
from moewright.data.config import DataConfig
from moewright.errors import UsageError
from moewright.moe.config import MoESettings
from moewright.optim.schedule import Schedule, learning_rate
from moewright.parallel.config import ParallelConfig, Recomputed, require_choice
from moewright.upcycle.config import UpcycleConfig

Dtype = Literal["bfloat16", "float32"]
Masters = Literal["float32", "stochastic"]
Moments = Literal["float32", "bfloat16", "int8"]
Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The `[train]` table."""

    steps: int
    """How many optimiser steps the run makes."""

    batch_size: int | None = None
    """Sequences per optimiser step, over all ranks; give this or `batch_tokens`."""

    batch_tokens: int | None = None
    """Tokens per optimiser step, over all ranks: a multiple of `data.sequence_length`."""

    micro_batch_size: int = 1
    """Sequences per forward pass; gradients are added up until the step's batch is complete."""

    learning_rate: float = 1e-4
    """The peak, reached at the end of the warm-up."""

    router_learning_rate_ratio: float = 1.0
    """The routers' learning rate as a share of the others'; a small one keeps virtual groups together at first."""

    min_learning_rate_ratio: float = 0.1
    """Where cosine and wsd end, as a share of the peak."""

    schedule: Schedule = "cosine"
    """The learning rate after the warm-up: down a cosine, constant, or constant with a linear decay at the end."""

    warmup_steps: int = 0
    """Steps over which the learning rate rises in a line from 0."""

    decay_steps: int = 0
    """Steps of the decay at the end; for the schedule wsd only."""

    dtype: Dtype = "bfloat16"
    """Precision of activations; logits and losses are float32 either way."""

    param_dtype: Dtype = "float32"
    """Precision of the parameters; bfloat16 goes with `dtype` bfloat16 only."""

    masters: Masters = "float32"
    """How bfloat16 parameters are moved: by way of float32 copies, or with rounding up or down by chance."""

    moments: Moments = "float32"
    """Precision of AdamW's two moments; int8 has a scale for each block of 256 values."""

    loss_chunk_tokens: int = 1024
    """Logits are computed for so many tokens at a time where a micro-batch has more; 0 computes them whole."""

    weight_decay: float = 0.1
    """AdamW's decoupled decay, on matrices only."""

    beta1: float = 0.9
    """Decay of AdamW's first moment."""

    beta2: float = 0.95
    """Decay of AdamW's second moment."""

    clip_norm: float = 1.0
    """The norm that the whole gradient is scaled down to when it is larger; 0 leaves it as it is."""

    gradient_checkpointing: bool = False
    """The older name of `parallel.recompute = "block"`."""

    seed: int = 0
    """Fixes the order of the data, the held-out documents, and every random number of the run."""

    device: Device = "auto"
    """Where to train; auto takes a GPU when there is one."""

    eval_every: int = 0
    """Steps between evaluations on held-out text; 0 evaluates before the first and after the last step only."""

    checkpoint_every: int = 0
    """Steps between checkpoints; 0 saves only when the run is asked to stop."""

    keep_checkpoints: int = 2
    """How many checkpoints are kept, the newest first."""

    async_checkpoints: bool = False
    """Copy the state to host memory, and write it while training goes on; else training waits until it is written."""

    tensorboard: bool = False
    """Write the metrics for TensorBoard too (extra `track`)."""

    def __post_init__(self) -> None:
        for name in ("steps", "micro_batch_size", "keep_checkpoints", "batch_size", "batch_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)}: it must be at least 1")
        kinds = {"dtype": Dtype, "param_dtype": Dtype, "masters": Masters, "moments": Moments, "device": Device}
        for name, kind in (kinds | {"schedule": Schedule}).items():
            require_choice(name, getattr(self, name), kind)
        if self.param_dtype == "bfloat16" and self.dtype != "bfloat16":
            raise UsageError(f"param_dtype=bfloat16 with dtype={self.dtype}: set dtype=bfloat16, or leave it out")
        amounts = ("weight_decay", "clip_norm", "router_learning_rate_ratio", "learning_rate")
        for name in (
            "warmup_steps",
            "decay_steps",
            "eval_every",
            "checkpoint_every",
            "loss_chunk_tokens",
            "seed",
            *amounts,
        ):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(f"{name}={getattr(self, name)}: it must be a finite number, 0 or more")
        if self.learning_rate == 0:
            raise UsageError("learning_rate=0: it must be more than 0")
        if not 0 <= self.min_learning_rate_ratio <= 1:
            raise UsageError(f"min_learning_rate_ratio={self.min_learning_rate_ratio}: it must be 0 to 1")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)}: it must be 0 or more and less than 1")
        if (self.batch_size is None) == (self.batch_tokens is None):
            raise UsageError(
                f"batch_size={self.batch_size} with batch_tokens={self.batch_tokens}: set one of the two, and only one"
            )
        if self.schedule == "wsd" and self.decay_steps == 0:
            raise UsageError("schedule=wsd with decay_steps=0: it has a decay at the end; give its length")
        if self.schedule != "wsd" and self.decay_steps > 0:
            raise UsageError(
                f"decay_steps={self.decay_steps} with schedule={self.schedule}: only wsd has a decay; leave it out"
            )
        if self.warmup_steps + self.decay_steps > self.steps:
            raise UsageError(
                f"warmup_steps={self.warmup_steps} and decay_steps={self.decay_steps} together > steps={self.steps}: "
                "make the run longer, or these shorter"
            )

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of step number `step`, counted from 1."""
        return learning_rate(
            step,
            peak=self.learning_rate,
            schedule=self.schedule,
            steps=self.steps,
            warmup_steps=self.warmup_steps,
            decay_steps=self.decay_steps,
            min_ratio=self.min_learning_rate_ratio,
        )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything a training run is defined by; relative paths are relative to the current directory."""

    model: str
    """A folder with a dense or a sparse model."""

    out: str
    """The run's folder: its configuration, metrics, checkpoints, and in `final` the trained model."""

    upcycle: UpcycleConfig | None = None
    """When given, the dense model becomes a mixture of experts in memory before training."""

    data: DataConfig
    """The text."""

    moe: MoESettings = field(default_factory=MoESettings)
    """The mixture-of-experts layers."""

    train: TrainConfig
    """The training."""

    parallel: ParallelConfig | None = None
    """How the model is divided among ranks, and what is kept where; without it, several ranks ask the planner."""

    def __post_init__(self) -> None:
        S, tokens = self.data.sequence_length, self.train.batch_tokens
        if tokens is not None and tokens % S:
            raise UsageError(f"train.batch_tokens={tokens} is not a multiple of data.sequence_length={S}")
        if self.batch_rows % self.train.micro_batch_size:
            raise UsageError(
                f"train.micro_batch_size={self.train.micro_batch_size} does not divide the batch of "
                f"{self.batch_rows} sequences: choose a divisor"
            )
        for name in ("model", "out"):
            if not getattr(self, name):
                raise UsageError(f"{name}='': name a folder")
        recompute = self.parallel.recompute if self.parallel else "none"
        if self.train.gradient_checkpointing and recompute == "experts":
            raise UsageError("train.gradient_checkpointing=True with parallel.recompute=experts: leave the former out")
        if overlap(self.out, self.model):
            raise UsageError(f"out={self.out} is, holds or lies in the model's folder {self.model}: name another one")

    @property
    def recompute(self) -> Recomputed:
        """What is computed again in the backward pass, under either name."""
        asked = self.parallel.recompute if self.parallel else "none"
        return "block" if self.train.gradient_checkpointing else asked

    @property
    def batch_rows(self) -> int:
        """B, the number of sequences per optimiser step."""
        if self.train.batch_size is not None:
            return self.train.batch_size
        assert self.train.batch_tokens is not None
        return self.train.batch_tokens // self.data.sequence_length


def ignored_settings(config: RunConfig, *, sparse: bool) -> list[str]:
    """Settings of `config` without effect, in words; `sparse`: whether the model has mixture-of-experts layers."""
    data, train = config.data, config.train
    ignored = [
        (f"moe.{field.name}", getattr(config.moe, field.name), "the model has no mixture-of-experts layers")
        for field in fields(config.moe)
        if not sparse and getattr(config.moe, field.name) != field.default
    ]
    if not sparse and train.router_learning_rate_ratio != TrainConfig.router_learning_rate_ratio:
        ratio = train.router_learning_rate_ratio
        ignored.append(("train.router_learning_rate_ratio", ratio, "the model has no mixture-of-experts layers"))
    if train.param_dtype == "float32" and train.masters != TrainConfig.masters:
        ignored.append(("train.masters", train.masters, "train.param_dtype is float32"))
    if not sparse and config.parallel and "experts" in (config.parallel.recompute, config.parallel.offloaded):
        name = "recompute" if config.parallel.recompute == "experts" else "offload"
        ignored.append((f"parallel.{name}", "experts", "the model has no mixture-of-experts layers"))
    if train.schedule == "constant" and train.min_learning_rate_ratio != TrainConfig.min_learning_rate_ratio:
        ignored.append(("train.min_learning_rate_ratio", train.min_learning_rate_ratio, "train.schedule is constant"))
    if train.async_checkpoints and not train.checkpoint_every:
        ignored.append(("train.async_checkpoints", "true", "train.checkpoint_every is 0"))
    if data.eval_files and data.eval_fraction != DataConfig.eval_fraction:
        ignored.append(("data.eval_fraction", data.eval_fraction, "data.eval_files is given"))
    return [f"{name} = {value} is ignored: {why}" for name, value, why in ignored]
