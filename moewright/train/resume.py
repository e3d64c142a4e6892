"""A run's state: saved whole, restored to the last bit, and refused where it belongs to another run."""

import random
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from moewright.checkpoint.state import load_state, save_state
from moewright.errors import CheckpointError
from moewright.optim.adamw import moments, set_moments
from moewright.train.config import RunConfig
from moewright.train.tree import defaults, flatten

FREE: Final = frozenset(
    {
        "out",
        "train.device",
        "train.eval_every",
        "train.checkpoint_every",
        "train.keep_checkpoints",
        "train.tensorboard",
        "data.eval_rows",
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


def save(
    root: Path,
    *,
    model: nn.Module,
    optimizer: torch.optim.AdamW,
    position: Position,
    identity: Mapping[str, Any],
    keep: int,
) -> Path:
    """Save everything the next step depends on below `root`, and return the checkpoint's folder.

    Raises ResourceError when the disk is full.
    """
    tensors = {f"model.{name}": tensor.detach() for name, tensor in model_tensors(model).items()}
    tensors |= {f"optimizer.{name}": tensor for name, tensor in moments(model, optimizer).items()}
    tensors["random.torch"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    facts = {
        "step": position.step,
        "tokens": position.tokens,
        "identity": dict(identity),
        "threads": torch.get_num_threads(),
        "random": {"python": random.getstate(), "numpy": _plain(np.random.get_state(legacy=False))},
    }
    return save_state(root, step=position.step, tensors=tensors, facts=facts, keep=keep)


def restore(
    path: Path,
    *,
    model: nn.Module,
    optimizer: torch.optim.AdamW,
    identity: Mapping[str, Any],
    note: Callable[[str], None],
) -> Position:
    """Load the checkpoint at `path` into `model`, `optimizer` and the random number generators.

    `note` is called with a reason why the run may go on with other rounding than it would have had.

    Raises CheckpointError: it belongs to a run with other settings, model or data.
    """
    tensors, facts = load_state(path)
    require_same_run(facts["identity"], identity, where=path)
    now = torch.get_num_threads()
    if (then := facts.get("threads", now)) != now:
        note(f"torch has {now} threads and had {then} when {path} was saved: sums will be rounded otherwise")
    _fill(model, tensors, path)
    prefix = "optimizer."
    set_moments(
        model,
        optimizer,
        {name.removeprefix(prefix): tensors.pop(name) for name in list(tensors) if name.startswith(prefix)},
    )
    torch.set_rng_state(tensors["random.torch"])
    if "random.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random.cuda"])
    version, internal, gauss = facts["random"]["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(facts["random"]["numpy"])
    return Position(step=facts["step"], tokens=facts["tokens"])


def _fill(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Move the tensors `model.*` of the checkpoint at `path` into the model; each is dropped once it is copied."""
    targets = model_tensors(model)
    saved = {name.removeprefix("model."): name for name in tensors if name.startswith("model.")}
    if different := sorted(targets.keys() ^ saved.keys()):
        raise CheckpointError(f"{path} holds another model: it differs in {len(different)} tensors, as {different[0]}")
    with torch.no_grad():
        for name, target in targets.items():
            tensor = tensors.pop(saved[name])
            if tensor.shape != target.shape:
                saved_shape, shape = tuple(tensor.shape), tuple(target.shape)
                raise CheckpointError(f"{path} holds another model: {name} is {saved_shape}, the model's is {shape}")
            target.copy_(tensor)


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, a tied tensor once."""
    first: dict[int, str] = {}
    state: dict[str, Tensor] = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        first.setdefault(id(tensor), name)
    return {name: state[name] for name in first.values()}


def _plain(value: Any) -> Any:
    """NumPy's generator state with lists in place of arrays."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value.tolist() if isinstance(value, np.ndarray) else value


class StopRequest:
    """Whether someone has asked the run to stop, and with which signal."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn SIGTERM and SIGINT into a request that the loop answers after the step at hand.

    A second signal acts as it would without us. Outside the main thread, where Python allows no
    handlers, signals stay as they are.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def ask(number: int, frame: FrameType | None) -> None:
        request.signal = signal.Signals(number)
        give_back()

    def give_back() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in before:
        signal.signal(number, ask)
    try:
        yield request
    finally:
        give_back()
