"""The training loop."""

import math
import random
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from moewright.backbone.folder import save_model
from moewright.backbone.graft import moe_layers, routing_context
from moewright.checkpoint.read import ModelFolder
from moewright.checkpoint.state import newest_state
from moewright.data.pack import IGNORE, Batch, PackedRows, rows_at
from moewright.errors import CheckpointError, Preempted, UsageError
from moewright.train import resume
from moewright.train.config import RunConfig, TrainConfig
from moewright.train.console import TrainingProgress
from moewright.train.metrics import (
    Board,
    JsonLines,
    RoutingTally,
    peak_memory,
    read_json_lines,
    require_tensorboard,
    throughput,
)
from moewright.train.optim import make_optimizer
from moewright.train.resume import Position, StopRequest, stop_on_signals
from moewright.train.schedule import learning_rate
from moewright.train.start import Start, start
from moewright.train.tree import to_toml

CHECKPOINTS: Final = "checkpoints"
FINAL: Final = "final"
CACHE: Final = "cache"


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """A finished run, as its folder tells it."""

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


def train(config: RunConfig, *, console: Console | None = None) -> TrainResult:
    """Run `config` to its end, from its newest checkpoint if there is one; progress is shown on `console`.

    Writes below `config.out`: `config.toml` (resolved), `metrics.jsonl`, `evaluations.jsonl`,
    `checkpoints/`, and at the end `final/`. On CPU in float32, a run that was stopped and started
    again is equal to the last bit to one that was not.

    Raises:
        UsageError, ModelError, DataError: what is asked for cannot be trained; nothing was written.
        CheckpointError: the folder belongs to another run, or the loss is no longer finite.
        Preempted: SIGTERM or SIGINT came; the state is saved, and the same call goes on from it.
    """
    folder, progress = Path(config.out), TrainingProgress(console)
    if _is_finished(config, folder):
        progress.note(f"{folder} is finished ({config.train.steps} steps): nothing to do")
        return _result(folder)
    _require_run_folder(folder)
    if config.train.tensorboard:
        require_tensorboard()
    _seed_everything(config.train.seed)
    with _cache_in(folder) as cache:
        run = _Run(config, start(config, cache_dir=cache), progress)
        (folder / "config.toml").write_text(to_toml(config), encoding="utf-8")
        with stop_on_signals() as stop, progress:
            run.to_the_end(stop)
    return _result(folder)


def train_step(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, batch: Batch, *, step: int, settings: TrainConfig
) -> dict[str, Any]:
    """One step of the optimiser on `batch`, in micro-batches; returns its line of `metrics.jsonl`.

    The loss is the mean over all targets of the batch, however it is divided: each micro-batch adds its
    sum, over the step's number of targets. The layers' own losses are means over real tokens, so they
    are scaled with the micro-batch's share of the step's real tokens.

    Raises CheckpointError when the loss or the gradient is not finite; the parameters are then unchanged.
    """
    context, tally = routing_context(model), RoutingTally(moe_layers(model))
    targets, real = int((batch.targets != IGNORE).sum()), int(batch.token_mask.sum())
    loss = torch.zeros((), device=model.device)
    for first in range(0, len(batch), settings.micro_batch_size):
        micro = batch.rows(first, first + settings.micro_batch_size)
        share = int(micro.token_mask.sum()) / real
        if context is not None:
            context.loss_scale = torch.tensor(share, device=model.device)
        micro_loss = language_loss(model, micro.to(model.device), dtype=settings.dtype) / targets
        tally.add(share)
        micro_loss.backward()
        loss += micro_loss.detach()

    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm or math.inf)
    record = {"loss": float(loss), "grad_norm": float(norm)}
    _require_finite(record, step)

    rate = learning_rate(
        step,
        peak=settings.learning_rate,
        schedule=settings.schedule,
        steps=settings.steps,
        warmup_steps=settings.warmup_steps,
        decay_steps=settings.decay_steps,
        min_ratio=settings.min_learning_rate_ratio,
    )
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return record | {"lr": rate, "step_tokens": real, "step_targets": targets} | tally.record()


def language_loss(model: PreTrainedModel, batch: Batch, *, dtype: str) -> Tensor:
    """Minus the log-probability, in nats, of all targets of `batch` together: 0-dim float32.

    `dtype` (`float32` or `bfloat16`) is that of the matrix products; the loss itself is float32.
    """
    mask = {} if routing_context(model) is None else {"token_mask": batch.token_mask}
    with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
        # No cache: with one, transformers would let packed documents see each other.
        logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **mask).logits
    return functional.cross_entropy(
        logits.flatten(0, 1).float(), batch.targets.flatten(), ignore_index=IGNORE, reduction="sum"
    )


@torch.no_grad()
def held_out_loss(
    model: PreTrainedModel, rows: PackedRows, *, max_rows: int, micro_batch_size: int, dtype: str
) -> tuple[float, int]:
    """Mean loss over the targets of the first `max_rows` rows (0: all) in nats a token, and how many targets."""
    count = min(max_rows, len(rows)) if max_rows else len(rows)
    total, targets = 0.0, 0
    model.eval()
    for first in range(0, count, micro_batch_size):
        batch = rows.batch(range(first, min(first + micro_batch_size, count)))
        total += float(language_loss(model, batch.to(model.device), dtype=dtype))
        targets += int((batch.targets != IGNORE).sum())
    model.train()
    return total / targets, targets


class _Run:
    """A run between two starts: what its steps read and change, and where they are told."""

    def __init__(self, config: RunConfig, started: Start, progress: TrainingProgress) -> None:
        self.config, self.settings, self.folder, self.progress = config, config.train, Path(config.out), progress
        self.started, self.model = started, started.model
        betas = (self.settings.beta1, self.settings.beta2)
        self.optimizer = make_optimizer(self.model, weight_decay=self.settings.weight_decay, betas=betas)
        self.identity = resume.identity(config, content=started.content)
        self.position = self._newest_position()

    def to_the_end(self, stop: StopRequest) -> None:
        """The steps that are left, then the model's folder."""
        position, steps, every = self.position, self.settings.steps, self.settings.checkpoint_every
        with ExitStack() as stack:
            lines = stack.enter_context(JsonLines(self.folder / "metrics.jsonl", after=position.step))
            evaluations = stack.enter_context(JsonLines(self.folder / "evaluations.jsonl", after=position.step))
            board = Board(self.folder / "tensorboard", after=position.step) if self.settings.tensorboard else None
            if board is not None:
                stack.callback(board.close)
            self.progress.begin(step=position.step, steps=steps)
            while position.step < steps:
                if stop.signal is not None:
                    self._save()
                    raise Preempted(
                        f"{stop.signal.name}: stopped and saved after step {position.step} of {steps}; "
                        "the same command goes on from there"
                    )
                self._evaluate_if_due(evaluations, board)
                record = self._step()
                lines.write(record)
                self.progress.stepped(record)
                if board is not None:
                    board.write(record, group="train")
                if every and (position.step % every == 0 or position.step == steps):
                    self._save()
            self._evaluate_if_due(evaluations, board)
        self._require_finite_model()
        training = {"steps": steps, "tokens": position.tokens, "identity": self.identity}
        record = self.started.record | {"training": training}
        save_model(self.model, self.folder / FINAL, companions=Path(self.config.model), record=record)

    def _step(self) -> dict[str, Any]:
        began, position, count = time.perf_counter(), self.position, self.config.batch_rows
        rows = rows_at(position.step * count, count=count, total=len(self.started.rows), seed=self.settings.seed)
        record = train_step(
            self.model, self.optimizer, self.started.rows.batch(rows), step=position.step + 1, settings=self.settings
        )
        position.step += 1
        position.tokens += record["step_tokens"]
        seconds = time.perf_counter() - began
        return {
            "step": position.step,
            "tokens": position.tokens,
            **record,
            "seconds": seconds,
            "tokens_per_second": record["step_tokens"] / seconds,
            "peak_memory_bytes": peak_memory(self.model.device),
        }

    def _evaluate_if_due(self, evaluations: JsonLines, board: Board | None) -> None:
        step, every = self.position.step, self.settings.eval_every
        due = step in (0, self.settings.steps) or (every and step % every == 0)
        held_out = self.started.held_out
        if held_out is None or not due or step in evaluations.steps:
            return
        began = time.perf_counter()
        loss, tokens = held_out_loss(
            self.model,
            held_out,
            max_rows=self.config.data.eval_rows,
            micro_batch_size=self.settings.micro_batch_size,
            dtype=self.settings.dtype,
        )
        _require_finite({"held-out loss": loss}, step)
        record = {"step": step, "loss": loss, "tokens": tokens, "seconds": time.perf_counter() - began}
        evaluations.write(record)
        self.progress.evaluated(record)
        if board is not None:
            board.write(record, group="evaluation")

    def _save(self) -> None:
        self._require_finite_model()
        resume.save(
            self.folder / CHECKPOINTS,
            model=self.model,
            optimizer=self.optimizer,
            position=self.position,
            identity=self.identity,
            keep=self.settings.keep_checkpoints,
        )

    def _require_finite_model(self) -> None:
        """A step with a finite gradient can still overflow a parameter; such a model is not saved."""
        for name, parameter in self.model.named_parameters():
            if not bool(parameter.isfinite().all()):
                raise _diverged(self.position.step, f"{name} is no longer finite")

    def _newest_position(self) -> Position:
        path, reasons = newest_state(self.folder / CHECKPOINTS)
        for reason in reasons:
            self.progress.note(f"checkpoint not used: {reason}")
        if path is None:
            if (self.folder / "metrics.jsonl").exists():
                self.progress.note(f"{self.folder} has no checkpoint yet: beginning at step 0 again")
            return Position()
        position = resume.restore(path, model=self.model, optimizer=self.optimizer, identity=self.identity)
        self.progress.note(f"resuming after step {position.step} of {self.settings.steps}, from {path}")
        return position


def _is_finished(config: RunConfig, folder: Path) -> bool:
    """Whether `final` is there; CheckpointError when a run with other settings wrote it."""
    if not (folder / FINAL).exists():
        return False
    found = (ModelFolder(folder / FINAL).record or {}).get("training", {}).get("identity", {})
    content = {name: found.get(name, "") for name in resume.CONTENT}  # not worth reading all the text again
    resume.require_same_run(found, resume.identity(config, content=content), where=folder / FINAL)
    return True


def _require_run_folder(folder: Path) -> None:
    """UsageError unless `folder` is new, empty, or holds a run."""
    if not folder.exists() or (folder / "config.toml").exists():
        return
    if not folder.is_dir():
        raise UsageError(f"out = {folder} is a file: name a new folder")
    if any(path.name != CACHE for path in folder.iterdir()):  # a run killed at its start leaves its cache
        raise UsageError(f"out = {folder} is not empty and holds no run (no config.toml): name a new folder")


@contextmanager
def _cache_in(folder: Path) -> Iterator[Path]:
    """The run's folder, made if need be, with an empty cache in it that goes away at the end.

    Folders that were made here and hold nothing go away too: a run that cannot start leaves no trace.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    cache = folder / CACHE
    shutil.rmtree(cache, ignore_errors=True)  # of a run that was killed
    cache.mkdir(parents=True)
    try:
        yield cache
    finally:
        shutil.rmtree(cache)
        for path in made:
            if not any(path.iterdir()):
                path.rmdir()


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _require_finite(values: Mapping[str, float], step: int) -> None:
    for name, value in values.items():
        if not math.isfinite(value):
            raise _diverged(step, f"{name} is {value}")


def _diverged(step: int, what: str) -> CheckpointError:
    return CheckpointError(
        f"step {step}: {what}; the run stops, and nothing was saved since. Begin a new one with a lower "
        "train.learning_rate, more train.warmup_steps, or train.dtype = float32"
    )


def _result(folder: Path) -> TrainResult:
    records = read_json_lines(folder / "metrics.jsonl")
    evaluations = read_json_lines(folder / "evaluations.jsonl")
    return TrainResult(
        steps=records[-1]["step"],
        tokens=records[-1]["tokens"],
        losses=[record["loss"] for record in records],
        evaluations=[{"step": record["step"], "loss": record["loss"]} for record in evaluations],
        tokens_per_second=throughput(records),
        peak_memory_bytes=max(record["peak_memory_bytes"] for record in records),
        final=folder / FINAL,
    )
