"""A run's state: restored to the last bit, and refused where it belongs to another run; and requests to stop."""

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from types import FrameType
from typing import Any, Final

import torch
from torch import Tensor, nn

from moewright.checkpoint.state import SavedState, open_state
from moewright.errors import CheckpointError
from moewright.optim.adamw import follow_masters, masters, set_moments
from moewright.parallel.config import ParallelConfig
from moewright.parallel.experts import local_part
from moewright.parallel.parts import boxes_of, with_part
from moewright.parallel.ranks import Ranks
from moewright.train import generators
from moewright.train.config import RunConfig
from moewright.train.tree import defaults, flatten

FREE: Final = frozenset(
    {
        "out",
        "train.device",
        "train.eval_every",
        "train.checkpoint_every",
        "train.keep_checkpoints",
        "train.async_checkpoints",
        "train.tensorboard",
        "data.eval_rows",
        "parallel",
        *(f"parallel.{field.name}" for field in fields(ParallelConfig)),
        "train.gradient_checkpointing",  # an older name of parallel.recompute
        # It does on these, but by rounding alone: a run may go on in another precision, or with other chunks.
        *("train.param_dtype", "train.masters", "train.moments", "train.loss_chunk_tokens"),
    }
)
"""The settings that may change between two starts of a run: the training itself does not depend on them."""

CONTENT: Final = ("model", "data.files", "data.eval_files", "upcycle.siblings", "upcycle.prompts",
                  "upcycle.calibration_text")  # fmt: skip
"""The settings that name files: their content is compared, wherever it lies."""


@dataclass
class Position:
    """How far a run is; with the seed, also its place in the data."""

    step: int = 0
    """Optimiser steps done."""
    tokens: int = 0
    """Real tokens read in them."""


def identity(config: RunConfig, *, content: Mapping[str, Any]) -> dict[str, Any]:
    """The settings by which a run is known again; of those in `CONTENT` the sha256 instead of the path."""
    assert set(content) <= set(CONTENT)
    return {name: value for name, value in flatten(config).items() if name not in FREE} | dict(content)


def require_same_run(recorded: Mapping[str, Any], expected: Mapping[str, Any], *, where: Path) -> None:
    """CheckpointError, naming the settings that have changed, unless both identities agree.

    A setting that one of them lacks has its default there: versions may add settings.
    """
    changed, default = [], defaults(RunConfig)
    for name in sorted(recorded.keys() | expected.keys()):
        was, now = (identity.get(name, default.get(name)) for identity in (recorded, expected))
        if was != now:
            changed.append(f"{name} (other content)" if name in CONTENT else f"{name} ({was} then, {now} now)")
    if changed:
        raise CheckpointError(
            f"{where} belongs to a run with other settings: {', '.join(changed)}; "
            "restore them, choose another `out`, or delete the run's folder"
        )


def restore(
    path: Path,
    *,
    model: nn.Module,
    optimizer: torch.optim.AdamW,
    identity: Mapping[str, Any],
    note: Callable[[str], None],
    ranks: Ranks,
    layout: str,
    seed: int,
) -> Position:
    """Load the checkpoint at `path` into `model`, `optimizer` and the random number generators.

    Of a tensor that is divided among ranks, this rank's part alone is read, however many ranks saved it. The generators
    go on if as many ranks saved theirs; else they begin anew from `seed`, rank and step.
    `note` is called with a reason why the run may go on with other rounding than it would have had.

    Raises CheckpointError: it belongs to a run with other settings, model or data.
    """
    state = open_state(path)
    facts = state.facts
    require_same_run(facts["identity"], identity, where=path)
    now = torch.get_num_threads()
    if (then := facts.get("threads", now)) != now:
        note(f"torch has {now} threads and had {then} when {path} was saved: sums will be rounded otherwise")
    if (before := facts.get("layout", layout)) != layout:
        note(f"saved by {before}; goes on with {layout}")
    _fill(model_tensors(model) | masters(model, optimizer), state)
    follow_masters(model, optimizer)
    set_moments(model, optimizer, _moments(model, state))
    found = _generators(state, ranks)
    if found is None:
        generators.seed(ranks.seed(seed, step=facts["step"]))
    else:
        generators.restore(found)
    return Position(step=facts["step"], tokens=facts["tokens"])


def _generators(state: SavedState, ranks: Ranks) -> dict[str, Tensor] | None:
    """This rank's generators; None if other ranks saved theirs."""
    if "random" in state.facts:  # a state of schema 1: those of a process alone, or of the first rank
        if ranks.size > 1:
            return None
        numpy = state.facts["random"]["numpy"]
        _, words, gauss = state.facts["random"]["python"]
        whole = {name: state.read(f"random.{name}") for name in ("torch", "cuda") if f"random.{name}" in state.tensors}
        return whole | generators.packed(words, gauss, numpy)
    saved = {name.removeprefix("random."): name for name in state.tensors if name.startswith("random.")}
    if any(state.tensors[name].shape[0] != ranks.size for name in saved.values()):
        return None
    mine = slice(ranks.rank, ranks.rank + 1)
    return {name: state.read(saved[name], (mine,))[0] for name in saved}


@torch.no_grad()
def _fill(targets: dict[str, Tensor], state: SavedState) -> None:
    """Copy the tensors `model.*` of a state into those of the model, one at a time."""
    saved = {name.removeprefix("model."): name for name in state.tensors if name.startswith("model.")}
    # States of the first version lack these counts, which begin with zeros.
    targets = {n: t for n, t in targets.items() if n in saved or not n.endswith(".previous_counts")}
    if different := sorted(targets.keys() ^ saved.keys()):
        raise CheckpointError(
            f"{state.path} holds another model: it differs in {len(different)} tensors, as {different[0]}"
        )
    for name, target in targets.items():
        if (shape := state.tensors[saved[name]].shape) != target.shape:
            raise CheckpointError(
                f"{state.path} holds another model: {name} is {shape}, the model's is {tuple(target.shape)}"
            )
        for box in boxes_of(target):
            local_part(target)[box.local].copy_(state.read(saved[name], box.whole))


def _moments(model: nn.Module, state: SavedState) -> Iterator[tuple[str, Tensor]]:
    """The optimiser's tensors of a state, each divided as its parameter is; those of another shape stay whole.

    Each is read when its turn comes: all of them may be larger than the memory.
    """
    parameters = dict(model.named_parameters())
    for saved in (name for name in state.tensors if name.startswith("optimizer.")):
        key = saved.removeprefix("optimizer.")
        parameter = parameters[key.partition(".")[2]]
        if state.tensors[saved].shape != parameter.shape:
            yield key, state.read(saved)
            continue
        boxes = boxes_of(parameter)
        if len(boxes) == 1:
            part = state.read(saved, boxes[0].whole)
        else:
            part = torch.empty(local_part(parameter).shape, dtype=state.tensors[saved].dtype)
            for box in boxes:
                part[box.local] = state.read(saved, box.whole)
        tensor = with_part(parameter, part)  # the optimiser puts it where it belongs
        del part
        yield key, tensor
        del tensor


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, a tied tensor once."""
    first: dict[int, str] = {}
    state: dict[str, Tensor] = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        first.setdefault(id(tensor), name)
    return {name: state[name] for name in first.values()}


class StopRequest:
    """Whether someone has asked the run to stop, and with which signal."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def agreed(self, ranks: Ranks) -> signal.Signals | None:
        """The signal that any of the ranks has had."""
        (number,) = max(ranks.gathered([self.signal or 0]))
        return signal.Signals(number) if number else None


@contextmanager
def stop_on_signals(*, echoes: bool = False) -> Iterator[StopRequest]:
    """Turn SIGTERM and SIGINT into a request that the loop answers after the step at hand.

    A second signal acts as it would without us. With `echoes` it does nothing, and neither does any after an error,
    until the process has ended and said why: a launcher forwards signals to its ranks, which may have had them before,
    and sends SIGTERM to all as soon as one has ended. Outside the main thread, where Python allows no handlers, signals
    stay as they are.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def ask(number: int, frame: FrameType | None) -> None:
        request.signal = signal.Signals(number)
        if not echoes:
            give_back()

    def give_back() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in before:
        signal.signal(number, ask)
    try:
        yield request
    except BaseException:
        if not echoes:
            give_back()
        raise
    give_back()
