"""The metrics of a run: JSON lines that survive a crash, the load of the experts, and TensorBoard."""

import importlib
import json
import os
import resource
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import torch

from moewright.checkpoint.files import replace_text
from moewright.errors import UsageError
from moewright.moe.layer import MoELayer
from moewright.moe.step import LayerRouting
from moewright.parallel.parts import whole
from moewright.report.progress import Progress
from moewright.train.folder import EVALUATIONS, METRICS


class JsonLines:
    """A file of one JSON object a line, each with its `step`; a line is on the disk when `write` returns.

    On opening, lines after step `after` are dropped, since they belong to steps that are made again, and so is all
    that follows a damaged line.
    """

    def __init__(self, path: Path, *, after: int) -> None:
        kept = [line for line in read_json_lines(path) if line["step"] <= after]
        replace_text(path, "".join(_line(record) for record in kept))
        self.steps = {line["step"] for line in kept}
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        """Append `record`, which has a `step`."""
        self._file.write(_line(record))
        self._file.flush()
        os.fsync(self._file.fileno())
        self.steps.add(record["step"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


class Records:
    """The records of a run below `folder`: lines, TensorBoard if asked for, and progress; kept by the first rank alone.

    Those of steps after `after` are dropped on opening. A context manager.
    """

    def __init__(self, folder: Path, *, after: int, tensorboard: bool, progress: Progress, kept: bool = True) -> None:
        self.folder, self.after, self.tensorboard, self.progress, self.kept = folder, after, tensorboard, progress, kept

    def __enter__(self) -> Self:
        with ExitStack() as opened:
            if self.kept:
                self._steps = opened.enter_context(JsonLines(self.folder / METRICS, after=self.after))
                self._evaluations = opened.enter_context(JsonLines(self.folder / EVALUATIONS, after=self.after))
                self._board = Board(self.folder / "tensorboard", after=self.after) if self.tensorboard else None
                if self._board is not None:
                    opened.callback(self._board.close)
            self._opened = opened.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def stepped(self, record: Mapping[str, Any]) -> None:
        """A step was made."""
        if self.kept:
            self._steps.write(record)
            self.progress.stepped(record)
            if self._board is not None:
                self._board.write(record, group="train")

    def evaluated(self, record: Mapping[str, Any]) -> None:
        """The loss on held-out text was measured."""
        if self.kept:
            self._evaluations.write(record)
            self.progress.evaluated(record)
            if self._board is not None:
                self._board.write(record, group="evaluation")

    def has_evaluation(self, step: int) -> bool:
        """Whether there is one of this step already."""
        return self.kept and step in self._evaluations.steps


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file that `JsonLines` wrote, up to the first damaged one; none when there is no such file.

    A crash can cut the last line short, and a power cut can leave zeros in its place.
    """
    if not path.exists():
        return []
    *lines, _ = path.read_bytes().split(b"\n")
    records: list[dict[str, Any]] = []
    for line in lines:
        try:
            record = json.loads(line.decode())
        except ValueError:
            break
        if not (isinstance(record, dict) and type(record.get("step")) is int):
            break
        records.append(record)
    return records


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def routing_metrics(layers: Mapping[int, MoELayer], step: Sequence[LayerRouting]) -> dict[str, Any]:
    """A step's routing for `metrics.jsonl`: losses as means over the layers, the load of each; empty for a dense model.

    `load` has a list for each of `moe_layers`: the share of the assignments that each expert received.
    `load_imbalance` is that of the worst layer: the load of its busiest expert over the mean load. `dead_experts`
    counts those of all layers that no token chose, `dropped_share` the assignments that found no room, over all;
    `router_norm` is the mean norm of the routers' rows. `layers` has a list of each of these, a number a layer.
    """
    if not layers:
        return {}
    balance, z, entropy = torch.stack([torch.stack(layer[2:]) for layer in step], dim=1)
    counts = [layer.tokens_per_expert.double().cpu() for layer in step]
    each = {
        "router_entropy": entropy.tolist(),
        "load_imbalance": [float(c.max() / c.mean()) for c in counts],
        "dead_experts": [int((c == 0).sum()) for c in counts],
        "dropped_share": [int(layer.dropped) / float(c.sum()) for layer, c in zip(step, counts, strict=True)],
        "router_norm": [float(whole(layer.router.norms()).mean()) for layer in layers.values()],
    }
    return {
        "balance_loss": balance.mean().item(),
        "z_loss": z.mean().item(),
        "router_entropy": entropy.mean().item(),
        "load_imbalance": max(each["load_imbalance"]),
        "dead_experts": sum(each["dead_experts"]),
        "dropped_share": sum(each["dropped_share"]) / len(counts),
        "router_norm": sum(each["router_norm"]) / len(counts),
        "layers": each,
        "moe_layers": list(layers),
        "load": [[round(share, 6) for share in (c / c.sum()).tolist()] for c in counts],
    }


def require_tensorboard() -> None:
    """UsageError, with what to install, when the extra `track` is missing."""
    try:
        importlib.import_module("torch.utils.tensorboard")
    except ImportError as error:
        raise UsageError(
            "train.tensorboard = true needs TensorBoard: pip install 'moewright[track]', or set it to false"
        ) from error


class Board:
    """The same metrics for TensorBoard, in `folder`; earlier records of steps after `after` are hidden."""

    def __init__(self, folder: Path, *, after: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=after + 1)

    def write(self, record: Mapping[str, Any], *, group: str) -> None:
        """Every number of `record` as a scalar below `group`."""
        for name, value in record.items():
            if name != "step" and isinstance(value, (int, float)):
                self._writer.add_scalar(f"{group}/{name}", value, record["step"])

    def close(self) -> None:
        """Write the records that are still in memory."""
        self._writer.close()


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that torch held on a GPU, else the most that this process held in memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Kilobytes on Linux, bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def throughput(records: Iterable[Mapping[str, Any]]) -> float:
    """Real tokens per second over the steps of `records`; 0 when there are none."""
    steps = list(records)
    seconds = sum(record["seconds"] for record in steps)
    return sum(record["step_tokens"] for record in steps) / seconds if seconds else 0.0
