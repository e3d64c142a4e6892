"""Small training runs."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from moewright.data.config import DataConfig
from moewright.moe.config import MoESettings
from moewright.train import loop
from moewright.train.config import RunConfig, TrainConfig
from moewright.train.metrics import read_json_lines
from moewright.upcycle.config import UpcycleConfig
from tests.models import write_dense

LINES = [f"{n} times {n} is {n * n}, and {n} plus {n} is {n + n}" for n in range(60)]


def make_run(
    folder: Path,
    *,
    out: str = "run",
    upcycle: UpcycleConfig | None = None,
    data: dict[str, Any] | None = None,
    moe: MoESettings | None = None,
    model: dict[str, Any] | None = None,
    **settings: Any,
) -> RunConfig:
    """A run of 6 steps of 4 rows of 16 tokens in 2 micro-batches, on a model and a corpus below `folder`."""
    if not (folder / "model").exists():
        write_dense(folder / "model", **(model or {}))
        (folder / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in LINES))
    return RunConfig(
        model=str(folder / "model"),
        out=str(folder / out),
        upcycle=upcycle,
        data=DataConfig(
            **{"files": (str(folder / "text.jsonl"),), "sequence_length": 16, "eval_rows": 6} | (data or {})
        ),
        moe=moe or (MoESettings(balance_loss=0.05, z_loss=0.01) if upcycle else MoESettings()),
        train=TrainConfig(
            **{
                "steps": 6,
                "batch_size": 4,
                "micro_batch_size": 2,
                "learning_rate": 3e-3,
                "warmup_steps": 1,
                "dtype": "float32",
                "device": "cpu",
            }
            | settings
        ),
    )


def metrics(config: RunConfig) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without what depends on the clock."""
    clock = ("seconds", "tokens_per_second", "peak_memory_bytes")
    return [
        {key: value for key, value in line.items() if key not in clock}
        for line in read_json_lines(Path(config.out) / "metrics.jsonl")
    ]


def evaluations(config: RunConfig) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_json_lines(Path(config.out) / "evaluations.jsonl")]


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[nn.Module], None]) -> None:
    """Do `action` in the middle of step number `step`, once its gradient is computed and applied."""
    original = loop.train_step

    def train_step(*args: Any, **kwargs: Any) -> dict[str, Any]:
        record = original(*args, **kwargs)
        if kwargs["step"] == step:
            action(args[0])
        return record

    monkeypatch.setattr(loop, "train_step", train_step)


def send(number: signal.Signals) -> Callable[[nn.Module], None]:
    return lambda _: os.kill(os.getpid(), number)
