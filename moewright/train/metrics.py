"""The metrics of a run: JSON lines that survive a crash, the load of the experts, and TensorBoard."""

import importlib
import json
import os
import resource
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from moewright.checkpoint.files import replace_text
from moewright.errors import UsageError
from moewright.moe.layer import MoELayer


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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


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


class RoutingTally:
    """The routing of one optimiser step, added up over its micro-batches, kept on the device.

    A layer's statistics are those of its last forward pass, so `add` stands after each forward pass.
    """

    def __init__(self, layers: Mapping[int, MoELayer]) -> None:
        self.layers = layers
        self.counts: dict[int, Tensor] = {}
        self.dropped: dict[int, Tensor] = {}
        self.losses: dict[int, Tensor] = {}

    def add(self, share: float) -> None:
        """Count the last forward pass, which read `share` of the step's real tokens."""
        for number, layer in self.layers.items():
            stats = layer.stats
            counts = stats.tokens_per_expert.clone()
            losses = share * torch.stack([stats.balance_loss, stats.z_loss, stats.entropy])
            self.counts[number] = self.counts[number] + counts if number in self.counts else counts
            self.dropped[number] = self.dropped.get(number, 0) + stats.dropped
            self.losses[number] = self.losses[number] + losses if number in self.losses else losses

    def record(self) -> dict[str, Any]:
        """For `metrics.jsonl`: losses as means over the layers, the load of each layer; empty for a dense model.

        `load` has a list for each of `moe_layers`: the share of the assignments that each expert received.
        `load_imbalance` is that of the worst layer: the load of its busiest expert over the mean load. `dead_experts`
        counts those of all layers that no token chose, `dropped_share` the assignments that found no room, over all;
        `router_norm` is the mean norm of the routers' rows. `layers` has a list of each of these, a number a layer.
        """
        if not self.layers:
            return {}
        losses = torch.stack(list(self.losses.values())).t()
        balance, z, entropy = losses.mean(dim=1).tolist()
        counts = [counts.double().cpu() for counts in self.counts.values()]
        layers = {
            "router_entropy": losses[2].tolist(),
            "load_imbalance": [float(c.max() / c.mean()) for c in counts],
            "dead_experts": [int((c == 0).sum()) for c in counts],
            "dropped_share": [int(d) / float(c.sum()) for d, c in zip(self.dropped.values(), counts, strict=True)],
            "router_norm": [float(layer.router.norms().mean()) for layer in self.layers.values()],
        }
        return {
            "balance_loss": balance,
            "z_loss": z,
            "router_entropy": entropy,
            "load_imbalance": max(layers["load_imbalance"]),
            "dead_experts": sum(layers["dead_experts"]),
            "dropped_share": sum(layers["dropped_share"]) / len(counts),
            "router_norm": sum(layers["router_norm"]) / len(counts),
            "layers": layers,
            "moe_layers": list(self.counts),
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
