"""The training loop."""

import json
import math
import time
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel

from moewright.backbone.blocks import moe_layers, routing_step
from moewright.backbone.device import device_of
from moewright.backbone.save import save_model
from moewright.backbone.slots import Bring
from moewright.checkpoint.read import ModelFolder
from moewright.data.pack import rows_at
from moewright.errors import MoewrightError, Preempted
from moewright.moe.step import RoutingStep
from moewright.optim.adamw import begin_backward, gradients, update
from moewright.parallel.apply import ALONE, Parallel
from moewright.parallel.gradients import clip_gradients
from moewright.parallel.parts import on_first_rank
from moewright.parallel.ranks import Ranks, joined
from moewright.report.progress import Progress
from moewright.train import generators, resume
from moewright.train.config import RunConfig, TrainConfig
from moewright.train.first_choice import with_first_choice
from moewright.train.folder import (
    CHECKPOINTS,
    EVALUATIONS,
    FINAL,
    METRICS,
    cache_in,
    cache_of,
    open_run,
    record_run,
    recorded_run,
)
from moewright.train.metrics import (
    Records,
    peak_memory,
    read_json_lines,
    require_tensorboard,
    routing_metrics,
)
from moewright.train.objective import BatchT, Objective, Rows
from moewright.train.result import TrainResult, recorded_result
from moewright.train.resume import Position, StopRequest, stop_on_signals
from moewright.train.saving import Saver, diverged
from moewright.train.start import Start, divide, needs_group, optimizer_of, start, text_digests, upcycle_digests


def train(config: RunConfig, *, console: Console | None = None) -> TrainResult:
    """Run `config` to its end, from its newest checkpoint if there is one; progress is shown on `console`.

    Writes below `config.out`: `config.toml` (resolved), `moewright-run.json` (the identity of the run),
    `metrics.jsonl`, `evaluations.jsonl`, `checkpoints/`, and at the end `final/`. On CPU in float32, with the same
    number of threads, a run that was stopped and started again is equal to the last bit to one that was not.

    With several ranks, those of torchrun or of a process group that is there, each of them calls this; all see the
    same folder, in which the first one writes.

    Raises:
        UsageError, ModelError, DataError: settings, model or text are no good; nothing was written.
        ResourceError: the disk is full; no step that was made is lost if its state still fits.
        CheckpointError: the folder belongs to another run, or the loss is no longer finite.
        Preempted: SIGTERM or SIGINT came; the state is saved, and the same call goes on from it.
    """
    folder = Path(config.out)
    device = device_of(config.train.device)
    with joined(device, alone=needs_group(config, device)) as ranks, ExitStack() as stack:
        progress = Progress(console if ranks.is_first else None)
        with ranks.agreeing():
            if ranks.is_first:
                stack.enter_context(open_run(folder))
        if ranks.from_first((folder / FINAL).exists()):
            with ranks.agreeing():
                _require_same_completed(config, folder)
            progress.note(f"{folder} is finished ({config.train.steps} steps): nothing to do")
            return recorded_result(folder)
        with ranks.agreeing():
            if config.train.tensorboard:
                require_tensorboard()
            if ranks.is_first:
                stack.enter_context(cache_in(folder))
        config = with_first_choice(config, ranks=ranks, note=progress.note)
        generators.seed(config.train.seed)
        with ranks.agreeing():
            started = start(
                config,
                cache_dir=cache_of(folder, ranks.rank),
                prepare=partial(divide, config=config, ranks=ranks, note=progress.note),
            )
        try:
            run = _Run(config, started, progress)
            with ranks.agreeing():
                if ranks.is_first:
                    record_run(folder, config=config, identity=run.identity, sources=started.sources)
            with stop_on_signals(echoes=ranks.size > 1) as stop, progress:
                run.to_the_end(stop)
        except MoewrightError as error:
            if error.told is None:
                error.told = False  # of this rank alone: no other one knows the reason
            raise
        return recorded_result(folder)


def train_step(
    model: PreTrainedModel,
    batch: BatchT,
    *,
    objective: Objective[BatchT],
    routing: RoutingStep,
    optimizer: torch.optim.Optimizer,
    step: int,
    settings: TrainConfig,
    parallel: Parallel = ALONE,
) -> dict[str, Any]:
    """One step of the optimiser on `batch`, this rank's rows, in micro-batches; returns its line of `metrics.jsonl`.

    The loss is the mean over all targets of the step, however it is divided: each micro-batch adds its
    sum, over the step's number of targets. The layers' own losses are means over real tokens, so they
    are scaled with the micro-batch's share of the real tokens that the layer's stack reads in the step.

    Raises CheckpointError when the loss or the gradient is not finite; the parameters are then unchanged.
    """
    micro_batches = list(objective.micro_batches(batch, settings.micro_batch_size))
    targets, tokens, most = _step_totals(objective, batch, len(micro_batches), parallel.ranks)
    micro_batches += [objective.padding() for _ in range(most - len(micro_batches))]
    loss = torch.zeros(())
    for number, micro_batch in enumerate(micro_batches, start=1):
        routing.begin_micro_batch({name: count / tokens[name] for name, count in objective.tokens(micro_batch).items()})
        micro_loss = objective.loss(model, micro_batch) / targets
        parallel.begin_backward(model, last=number == most)
        begin_backward(optimizer, last=number == most)
        micro_loss.backward()
        routing.after_backward()
        loss = loss + micro_loss.detach()

    whole, max_norm = gradients(model.parameters(), optimizer), settings.clip_norm
    total, norm = clip_gradients(
        model.parameters(), max_norm=max_norm, loss=loss, ranks=parallel.ranks, gradients=whole
    )
    record = {"loss": total, "grad_norm": norm}
    _require_finite(record, step, parallel.ranks)

    rate = settings.learning_rate_at(step)
    update(optimizer, learning_rate=rate)
    record |= {"lr": rate, "step_tokens": sum(tokens.values()), "step_targets": targets}
    return record | routing_metrics(moe_layers(model), routing.end_step())


def _step_totals(
    objective: Objective[BatchT], batch: BatchT, micro_batches: int, ranks: Ranks
) -> tuple[int, dict[str, int], int]:
    """Targets and real tokens of the step on all ranks, and the most micro-batches that one of them has."""
    tokens = objective.tokens(batch)
    targets, *counts, number = zip(
        *ranks.gathered([objective.targets(batch), *tokens.values(), micro_batches])[:: ranks.tp], strict=True
    )
    return sum(targets), dict(zip(tokens, map(sum, counts), strict=True)), max(number)


@torch.no_grad()
def held_out_loss(
    model: PreTrainedModel,
    objective: Objective[BatchT],
    rows: Rows[BatchT],
    *,
    max_rows: int,
    micro_batch_size: int,
    stop: StopRequest | None = None,
    parallel: Parallel = ALONE,
) -> tuple[float, int] | None:
    """Mean loss over the targets of the first `max_rows` rows (0: all) in nats a target, and the number of targets.

    The ranks take turns with the micro-batches. None when `stop` is asked for before the end.
    """
    count = min(max_rows, len(rows)) if max_rows else len(rows)
    total, targets, ranks = 0.0, 0, parallel.ranks
    model.eval()
    try:
        for turn in range(0, count, micro_batch_size * ranks.data_size):
            if stop is not None and stop.agreed(ranks):
                return None
            first = turn + micro_batch_size * ranks.data_rank
            mine = range(first, min(first + micro_batch_size, count))
            batch = rows.batch(mine) if mine else objective.padding()
            total += float(objective.loss(model, batch))
            targets += objective.targets(batch)
    finally:
        parallel.end_evaluation(model)
        model.train()
    total, all_targets = ranks.totals(torch.tensor([total, targets], dtype=torch.float64) / ranks.tp).tolist()
    return total / all_targets, int(all_targets)


class _Run:
    """One process of a run: its state, its steps, and their records."""

    def __init__(self, config: RunConfig, started: Start, progress: Progress) -> None:
        self.config, self.settings, self.folder, self.progress = config, config.train, Path(config.out), progress
        self.started, self.model, self.ranks = started, started.model, started.parallel.ranks
        self.optimizer = optimizer_of(started, self.settings)
        self.routing = routing_step(self.model, self.ranks.group, copies=self.ranks.tp)
        self.identity = self._identity()
        self.saver = Saver(
            self.folder / CHECKPOINTS,
            model=self.model,
            optimizer=self.optimizer,
            identity=self.identity,
            parallel=started.parallel,
            seed=self.settings.seed,
            keep=self.settings.keep_checkpoints,
            background=self.settings.async_checkpoints,
        )
        self.position = self._newest_position()

    def _identity(self) -> dict[str, Any]:
        """By which the run is known again; the files behind it are read whole, by one rank for all."""
        text = ""
        with self.ranks.agreeing():
            if self.ranks.is_first:
                text = json.dumps(resume.identity(self.config, content=self.started.content()))
        identity: dict[str, Any] = json.loads(self.ranks.text_from_first(text))
        return identity

    def to_the_end(self, stop: StopRequest) -> None:
        """The steps that are left, then the model's folder."""
        position, steps, every = self.position, self.settings.steps, self.settings.checkpoint_every
        records = Records(
            self.folder,
            after=-1 if self.saver.saved is None else self.saver.saved,  # the last step whose lines stay
            tensorboard=self.settings.tensorboard,
            progress=self.progress,
            kept=self.ranks.is_first,
        )
        with records, self.saver as saver:
            self.progress.begin(step=position.step, steps=steps)
            while True:
                self._evaluate_if_due(records, stop)
                saver.look()
                if signal := stop.agreed(self.ranks):
                    saver.save(position, now=True)
                    stopped = f"{signal.name}: stopped and saved after step {position.step} of {steps}"
                    raise self.ranks.everyones(Preempted(f"{stopped}; the same command goes on from there"))
                if position.step == steps:
                    break
                records.stepped(self._step())
                if every and (position.step % every == 0 or position.step == steps):
                    saver.save(position)
            saver.finish()
            self._write_final()

    def _write_final(self) -> None:
        self.saver.require_finite(self.position.step)
        training = {"steps": self.settings.steps, "tokens": self.position.tokens, "identity": self.identity}
        record = self.started.record | {"training": training}

        def write(bring: Bring) -> None:
            companions = Path(self.config.model)
            save_model(self.model, self.folder / FINAL, companions=companions, record=record, bring=bring)

        try:
            on_first_rank(self.model.parameters(), write, ranks=self.ranks)
        except (MoewrightError, OSError):
            self.saver.save(self.position, now=True)  # the steps are not to be made again
            raise

    def _step(self) -> dict[str, Any]:
        began, position, count = time.perf_counter(), self.position, self.config.batch_rows
        rows = rows_at(position.step * count, count=count, total=len(self.started.rows), seed=self.settings.seed)
        mine = rows[self.ranks.share(count, size=self.settings.micro_batch_size)]
        if self.ranks.size > 1:
            torch.manual_seed(self.ranks.seed(self.settings.seed, step=position.step + 1))
        record = train_step(
            self.model,
            self.started.rows.batch(mine) if len(mine) else self.started.objective.padding(),
            objective=self.started.objective,
            routing=self.routing,
            optimizer=self.optimizer,
            step=position.step + 1,
            settings=self.settings,
            parallel=self.started.parallel,
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
            "peak_memory_bytes": peak_memory(self.ranks.device),
        }

    def _evaluate_if_due(self, records: Records, stop: StopRequest) -> None:
        step, every = self.position.step, self.settings.eval_every
        due = step in (0, self.settings.steps) or (every and step % every == 0)
        held_out = self.started.held_out
        if held_out is None or not due or self.ranks.from_first(records.has_evaluation(step)):
            return
        began = time.perf_counter()
        result = held_out_loss(
            self.model,
            self.started.objective,
            held_out,
            max_rows=self.config.data.eval_rows,
            micro_batch_size=self.settings.micro_batch_size,
            stop=stop,
            parallel=self.started.parallel,
        )
        if result is None:
            return
        loss, tokens = result
        _require_finite({"held-out loss": loss}, step, self.ranks)
        records.evaluated({"step": step, "loss": loss, "tokens": tokens, "seconds": time.perf_counter() - began})

    def _newest_position(self) -> Position:
        path = self.saver.newest(self.progress.note)
        if path is None:
            with self.ranks.agreeing():
                if self.ranks.is_first:
                    self._require_same_history()
            return Position()
        position = self.saver.resume(path, self.progress.note)
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


def _require_finite(values: Mapping[str, float], step: int, ranks: Ranks) -> None:
    """The values are the same on all ranks."""
    for name, value in values.items():
        if not math.isfinite(value):
            raise ranks.everyones(diverged(step, f"{name} is {value}"))
