"""The training loop."""

import math
import random
import time
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from transformers import PreTrainedModel

from moewright.backbone.blocks import moe_layers, routing_step
from moewright.backbone.save import save_model
from moewright.checkpoint.read import ModelFolder
from moewright.checkpoint.state import newest_state
from moewright.data.pack import rows_at
from moewright.errors import CheckpointError, MoewrightError, Preempted
from moewright.moe.step import RoutingStep
from moewright.optim.adamw import make_optimizer, update
from moewright.report.progress import Progress
from moewright.train import resume
from moewright.train.config import RunConfig, TrainConfig
from moewright.train.folder import (
    CHECKPOINTS,
    EVALUATIONS,
    FINAL,
    METRICS,
    cache_in,
    open_run,
    record_run,
    recorded_run,
)
from moewright.train.metrics import (
    Board,
    JsonLines,
    peak_memory,
    read_json_lines,
    require_tensorboard,
    routing_metrics,
    throughput,
)
from moewright.train.objective import BatchT, Objective, Rows
from moewright.train.resume import Position, StopRequest, stop_on_signals
from moewright.train.start import Start, start, text_digests, upcycle_digests


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


def train(config: RunConfig, *, console: Console | None = None) -> TrainResult:
    """Run `config` to its end, from its newest checkpoint if there is one; progress is shown on `console`.

    Writes below `config.out`: `config.toml` (resolved), `moewright-run.json` (the identity of the run),
    `metrics.jsonl`, `evaluations.jsonl`, `checkpoints/`, and at the end `final/`. On CPU in float32, with the same
    number of threads, a run that was stopped and started again is equal to the last bit to one that was not.

    Raises:
        UsageError, ModelError, DataError: settings, model or text are no good; nothing was written.
        ResourceError: the disk is full; no step that was made is lost if its state still fits.
        CheckpointError: the folder belongs to another run, or the loss is no longer finite.
        Preempted: SIGTERM or SIGINT came; the state is saved, and the same call goes on from it.
    """
    folder, progress = Path(config.out), Progress(console)
    with open_run(folder):
        if (folder / FINAL).exists():
            _require_same_completed(config, folder)
            progress.note(f"{folder} is finished ({config.train.steps} steps): nothing to do")
            return _result(folder)
        if config.train.tensorboard:
            require_tensorboard()
        _seed_everything(config.train.seed)
        with cache_in(folder) as cache:
            started = start(config, cache_dir=cache)
            run = _Run(config, started, progress)
            record_run(folder, config=config, identity=run.identity, sources=started.sources)
            with stop_on_signals() as stop, progress:
                run.to_the_end(stop)
        return _result(folder)


def train_step(
    model: PreTrainedModel,
    batch: BatchT,
    *,
    objective: Objective[BatchT],
    routing: RoutingStep,
    optimizer: torch.optim.Optimizer,
    step: int,
    settings: TrainConfig,
) -> dict[str, Any]:
    """One step of the optimiser on `batch`, in micro-batches; returns its line of `metrics.jsonl`.

    The loss is the mean over all targets of the batch, however it is divided: each micro-batch adds its
    sum, over the step's number of targets. The layers' own losses are means over real tokens, so they
    are scaled with the micro-batch's share of the real tokens that the layer's stack reads in the step.

    Raises CheckpointError when the loss or the gradient is not finite; the parameters are then unchanged.
    """
    targets, tokens = objective.targets(batch), objective.tokens(batch)
    loss = torch.zeros((), device=model.device)
    for micro_batch in objective.micro_batches(batch, settings.micro_batch_size):
        routing.begin_micro_batch({name: count / tokens[name] for name, count in objective.tokens(micro_batch).items()})
        micro_loss = objective.loss(model, micro_batch) / targets
        micro_loss.backward()
        routing.after_backward()
        loss += micro_loss.detach()

    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm or math.inf)
    record = {"loss": float(loss), "grad_norm": float(norm)}
    _require_finite(record, step)

    rate = settings.learning_rate_at(step)
    update(optimizer, learning_rate=rate)
    record |= {"lr": rate, "step_tokens": sum(tokens.values()), "step_targets": targets}
    return record | routing_metrics(moe_layers(model), routing.end_step())


@torch.no_grad()
def held_out_loss(
    model: PreTrainedModel,
    objective: Objective[BatchT],
    rows: Rows[BatchT],
    *,
    max_rows: int,
    micro_batch_size: int,
    stop: StopRequest | None = None,
) -> tuple[float, int] | None:
    """Mean loss over the targets of the first `max_rows` rows (0: all) in nats a target, and the number of targets.

    None when `stop` is asked for before the end.
    """
    count = min(max_rows, len(rows)) if max_rows else len(rows)
    total, targets = 0.0, 0
    model.eval()
    try:
        for first in range(0, count, micro_batch_size):
            if stop is not None and stop.signal is not None:
                return None
            batch = rows.batch(range(first, min(first + micro_batch_size, count)))
            total += float(objective.loss(model, batch))
            targets += objective.targets(batch)
    finally:
        model.train()
    return total / targets, targets


class _Run:
    """One process of a run: its state, its steps, and their records."""

    def __init__(self, config: RunConfig, started: Start, progress: Progress) -> None:
        self.config, self.settings, self.folder, self.progress = config, config.train, Path(config.out), progress
        self.started, self.model = started, started.model
        self.optimizer = make_optimizer(
            self.model,
            weight_decay=self.settings.weight_decay,
            betas=(self.settings.beta1, self.settings.beta2),
            router_ratio=self.settings.router_learning_rate_ratio,
        )
        self.routing = routing_step(self.model)
        self.identity = resume.identity(config, content=started.content)
        self.saved: int | None = None  # the step of the newest checkpoint
        self.position = self._newest_position()

    def to_the_end(self, stop: StopRequest) -> None:
        """The steps that are left, then the model's folder."""
        position, steps, every = self.position, self.settings.steps, self.settings.checkpoint_every
        kept = -1 if self.saved is None else self.saved  # the last step whose lines stay
        with ExitStack() as stack:
            lines = stack.enter_context(JsonLines(self.folder / METRICS, after=kept))
            evaluations = stack.enter_context(JsonLines(self.folder / EVALUATIONS, after=kept))
            board = Board(self.folder / "tensorboard", after=kept) if self.settings.tensorboard else None
            if board is not None:
                stack.callback(board.close)
            self.progress.begin(step=position.step, steps=steps)
            while True:
                self._evaluate_if_due(evaluations, board, stop)
                if stop.signal is not None:
                    self._save()
                    raise Preempted(
                        f"{stop.signal.name}: stopped and saved after step {position.step} of {steps}; "
                        "the same command goes on from there"
                    )
                if position.step == steps:
                    break
                record = self._step()
                lines.write(record)
                self.progress.stepped(record)
                if board is not None:
                    board.write(record, group="train")
                if every and (position.step % every == 0 or position.step == steps):
                    self._save()
        self._write_final()

    def _write_final(self) -> None:
        self._require_finite_model()
        training = {"steps": self.settings.steps, "tokens": self.position.tokens, "identity": self.identity}
        record = self.started.record | {"training": training}
        try:
            save_model(self.model, self.folder / FINAL, companions=Path(self.config.model), record=record)
        except (MoewrightError, OSError):
            self._save()  # the steps are not to be made again
            raise

    def _step(self) -> dict[str, Any]:
        began, position, count = time.perf_counter(), self.position, self.config.batch_rows
        rows = rows_at(position.step * count, count=count, total=len(self.started.rows), seed=self.settings.seed)
        record = train_step(
            self.model,
            self.started.rows.batch(rows),
            objective=self.started.objective,
            routing=self.routing,
            optimizer=self.optimizer,
            step=position.step + 1,
            settings=self.settings,
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

    def _evaluate_if_due(self, evaluations: JsonLines, board: Board | None, stop: StopRequest) -> None:
        step, every = self.position.step, self.settings.eval_every
        due = step in (0, self.settings.steps) or (every and step % every == 0)
        held_out = self.started.held_out
        if held_out is None or not due or step in evaluations.steps:
            return
        began = time.perf_counter()
        result = held_out_loss(
            self.model,
            self.started.objective,
            held_out,
            max_rows=self.config.data.eval_rows,
            micro_batch_size=self.settings.micro_batch_size,
            stop=stop,
        )
        if result is None:
            return
        loss, tokens = result
        _require_finite({"held-out loss": loss}, step)
        record = {"step": step, "loss": loss, "tokens": tokens, "seconds": time.perf_counter() - began}
        evaluations.write(record)
        self.progress.evaluated(record)
        if board is not None:
            board.write(record, group="evaluation")

    def _save(self) -> None:
        if self.saved == self.position.step:
            return
        self._require_finite_model()
        resume.save(
            self.folder / CHECKPOINTS,
            model=self.model,
            optimizer=self.optimizer,
            position=self.position,
            identity=self.identity,
            keep=self.settings.keep_checkpoints,
        )
        self.saved = self.position.step

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
            self._require_same_history()
            return Position()
        position = resume.restore(
            path, model=self.model, optimizer=self.optimizer, identity=self.identity, note=self.progress.note
        )
        self.saved = position.step
        self.progress.note(f"resuming after step {position.step} of {self.settings.steps}, from {path}")
        return position

    def _require_same_history(self) -> None:
        """Before a start from step 0: lines of steps without a checkpoint are dropped for the same run only."""
        lines = [line for name in (METRICS, EVALUATIONS) for line in read_json_lines(self.folder / name)]
        if not lines:
            return
        resume.require_same_run(recorded_run(self.folder)[0], self.identity, where=self.folder)
        warnings.warn(
            f"{self.folder}: {max(line['step'] for line in lines)} steps were made and no checkpoint was saved: "
            "beginning at step 0 again; set train.checkpoint_every",
            stacklevel=2,
        )


def _require_same_completed(config: RunConfig, folder: Path) -> None:
    """CheckpointError when `config` does not describe the completed run in `folder` any more."""
    identity, sources = recorded_run(folder)
    content = {"model": ModelFolder(config.model).fingerprint()} | text_digests(config.data)
    content |= upcycle_digests(config.upcycle)
    resume.require_same_run(identity | sources, resume.identity(config, content=content), where=folder / FINAL)


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _require_finite(values: Mapping[str, float], step: int) -> None:
    for name, value in values.items():
        if not math.isfinite(value):
            raise _diverged(step, f"{name} is {value}")


def _diverged(step: int, problem: str) -> CheckpointError:
    return CheckpointError(
        f"step {step}: {problem}; the run stops, and nothing was saved since. Begin a new one with a lower "
        "train.learning_rate, more train.warmup_steps, or train.dtype = float32"
    )


def _result(folder: Path) -> TrainResult:
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
