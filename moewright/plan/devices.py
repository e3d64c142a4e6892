"""The devices that a run is planned for, and what a step does on them."""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from typing import Any, Final, Literal, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moewright.errors import UsageError
from moewright.optim.adamw import AdamW
from moewright.plan.units import written

Recompute = Literal["none", "experts", "block"]
Offload = Literal["none", "optimizer", "experts", "all"]
MB: Final = 10**6
GB: Final = 10**9


@dataclass(frozen=True, kw_only=True)
class Devices:
    """Equal devices in equal hosts. The speeds are those of an NVIDIA A100 in a DGX, sources in docs/planner.md."""

    number: int
    memory: int
    """Bytes of one device."""
    per_host: int = 8
    host_memory: int | None = None
    """Bytes of one host, for all of its devices together; None: not known, and not held against anything."""
    process: int = 1 * GB
    """Bytes of a device that are no tensors of a step: its context, libraries, and buffers of collectives."""
    slack: float = 0.05
    """Share of the tensors' bytes that the allocator holds besides: blocks that fit nothing, and rounding."""
    host_process: int = 4 * GB
    """Bytes of a host's memory for each process: Python, libraries, and text that is mapped and read."""

    flops: float = 312e12
    """Of a device in a second, in the dtype of the products."""
    efficiency: float = 0.4
    """The share of these that the products of a step reach."""
    within_host: float = 250e9
    """Bytes a second from a device to others of its host."""
    between_hosts: float = 25e9
    """Bytes a second from a device to others elsewhere."""
    host_link: float = 20e9
    """Bytes a second between a device and its host's memory."""
    host_bandwidth: float = 150e9
    """Bytes a second of a host's memory, for all of its devices together."""
    disk_bandwidth: float = 3e9
    """Bytes a second of a host's disk, for all of its devices together."""

    def __post_init__(self) -> None:
        for name, value in {"devices": self.number, "devices_per_host": self.per_host}.items():
            if value < 1:
                raise UsageError(f"{name}={value}: it must be at least 1")
        if self.number > self.per_host and self.number % self.per_host:
            raise UsageError(f"devices={self.number} with devices_per_host={self.per_host}: choose a multiple of it")
        if self.memory <= self.process:
            raise UsageError(
                f"device_memory={written(self.memory)}: a process takes {written(self.process)} before the model does"
            )

    @classmethod
    def cpus(cls, **sizes: Any) -> Self:
        """Processes on CPUs that gloo joins; the speeds are those of two cores each, in docs/planner.md."""
        return cls(
            process=400 * MB, host_process=0, flops=1e11, efficiency=0.5, within_host=1e9, between_hosts=1e9, **sizes
        )

    @property
    def on_host(self) -> int:
        """How many of the devices share a host."""
        return min(self.number, self.per_host)

    def bandwidth(self, ranks: int, *, neighbours: bool) -> float:
        """Bytes a second that a rank sends to a group of so many, which stand side by side or apart."""
        return self.within_host if (ranks if neighbours else self.number) <= self.per_host else self.between_hosts


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A step of a run."""

    sequence_length: int
    rows: int
    """B, of a step over all ranks."""
    micro_rows: int
    """Of a micro-batch of a rank."""
    dtype: torch.dtype
    """Of the products."""
    param_dtype: torch.dtype = torch.float32
    """Of the parameters."""
    state_bytes: float = 8.0
    """Of the optimiser for each parameter: moments, and a float32 master of a parameter that is less."""
    device: Literal["cpu", "cuda"] = "cuda"
    recompute: Recompute = "none"
    offload: Offload = "none"
    offload_to: Literal["cpu", "disk"] = "cpu"
    loss: Callable[[PreTrainedModel, int], Tensor]
    """The loss of a micro-batch of so many rows; called where tensors have no memory."""
    optimizer: Callable[[PreTrainedModel], AdamW]

    @property
    def tokens(self) -> int:
        """Of a step over all ranks."""
        return self.rows * self.sequence_length

    def share(self, ranks: int) -> tuple[int, int]:
        """Rows of a micro-batch, and micro-batches of the rank that has most, where so many ranks share the rows."""
        size = min(self.micro_rows, ceil(self.rows / ranks))
        return size, ceil(ceil(self.rows / size) / ranks)
