"""How time and memory are measured, and on what.

Letters: T tokens, D model width.
"""

import ctypes
import gc
import importlib.metadata
import os
import platform
import random
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

PACKAGES = ("torch", "transformers", "deepspeed", "torchtitan", "megatron-core", "triton", "scattermoe", "sonic-moe")
PACKAGES += ("mergekit", "mixturekit")
Pair = tuple[Tensor, Tensor]
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Step:
    """One forward and backward pass of a layer, fresh gradients each time, with a batch that `renew` may replace."""

    def __init__(self, layer: nn.Module, x_TD: Tensor, gradient_TD: Tensor, *, others: Iterable[Pair] = ()) -> None:
        self.layer, self.gradient_TD, self.others = layer, gradient_TD, iter(others)
        self.x_TD = x_TD.detach().requires_grad_()

    def renew(self) -> None:
        """Take the next of the other batches, each tokens and the gradient of the output, if there are any."""
        x_TD, self.gradient_TD = next(self.others, (self.x_TD, self.gradient_TD))
        self.x_TD = x_TD.detach().requires_grad_()

    def __call__(self) -> Tensor:
        y_TD: Tensor = self.layer(self.x_TD)
        y_TD.backward(self.gradient_TD)
        return y_TD

    def clear(self) -> None:
        """Drop all gradients, so that backward writes new ones instead of adding."""
        self.x_TD.grad = None
        for parameter in self.layer.parameters():
            parameter.grad = None


def milliseconds(step: Step, *, repeat: int = 1) -> float:
    """Of one pass; on a GPU the mean of `repeat` passes in a row, by the device's clock. Caches are not flushed."""
    step.renew()
    step.clear()
    if step.x_TD.device.type != "cuda":
        start = time.perf_counter()
        step()
        elapsed = (time.perf_counter() - start) * 1e3
        step.clear()
        return elapsed
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    first.record()
    for _ in range(repeat):
        step.clear()
        step()
    last.record()
    last.synchronize()
    step.clear()
    return first.elapsed_time(last) / repeat


class Plan(NamedTuple):
    """How often something takes part in the rounds."""

    measure: Callable[[], float]
    """Milliseconds of one repetition."""
    rounds: int
    """At most."""


class Rounds:
    """Repetitions of several implementations in turn, in an order that is shuffled each round.

    `found[name]` maps the number of a round to milliseconds.
    """

    def __init__(self, plans: Mapping[str, Plan], *, seed: int = 0) -> None:
        self.plans = dict(plans)
        self.found: dict[str, dict[int, float]] = {name: {} for name in plans}
        self.done = 0
        self.seconds = 0.0
        """Of the last round."""
        self.spent: dict[str, float] = {}
        """Seconds that each took when it last took part."""
        self.random = random.Random(seed)

    @property
    def names(self) -> list[str]:
        """Who takes part in the next round."""
        return [name for name, plan in self.plans.items() if self.done < plan.rounds]

    @property
    def seconds_ahead(self) -> float:
        """What the next round will take, by the last ones."""
        return sum(self.spent.get(name, 0.0) for name in self.names)

    def run_one(self) -> None:
        names = self.names
        self.random.shuffle(names)
        for name in names:
            start = time.perf_counter()
            self.found[name][self.done] = self.plans[name].measure()
            self.spent[name] = time.perf_counter() - start
        self.seconds = sum(self.spent[name] for name in names)
        self.done += 1

    def limit(self, name: str, rounds: int) -> None:
        """Let something that is slow take part in fewer rounds."""
        self.plans[name] = self.plans[name]._replace(rounds=min(rounds, self.plans[name].rounds))


def kept_bytes(layer: nn.Module, x_TD: Tensor) -> int:
    """What a forward pass keeps for backward: the storages that autograd saves, each once, without parameters.

    A tensor kept in another way than autograd's own (an attribute of a custom function) is not seen.
    """
    parameters = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in parameters:
            kept[pointer] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output_TD = layer(x_TD)
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del output_TD
    return total


def peak_bytes(run: Callable[[], object], *, device: torch.device) -> int:
    """How far memory rises above its level before, during one call whose result is dropped afterwards.

    On a GPU by the allocator's counters; on the CPU by the kernel's high-water mark of this process's resident
    memory, which is reset before. Freed memory is handed back to the system first, so that it counts when used again.
    Raises `OSError` where the mark cannot be read or reset (only Linux has it).
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)
    RESET.write_text("5")
    before = status_bytes("VmRSS")
    run()
    return max(0, status_bytes("VmHWM") - before)


def status_bytes(name: str) -> int:
    """What the kernel says of this process's memory under that name, as `VmRSS`."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def matmul_flops(dtype: torch.dtype, *, device: torch.device) -> float:
    """FLOPs a second of a large square product, the best of several: the peak that percentages refer to."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    a @ b
    best = float("inf")
    for _ in range(20 if device.type == "cuda" else 5):
        if device.type == "cuda":
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            first.record()
            for _ in range(10):
                a @ b
            last.record()
            last.synchronize()
            best = min(best, first.elapsed_time(last) / 1e4)
        else:
            start = time.perf_counter()
            a @ b
            best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def environment(device: torch.device) -> dict[str, Any]:
    """Machine, versions and date, for the head of a results file."""
    versions = {"python": platform.python_version(), "moewright": importlib.metadata.version("moewright")}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "machine": {
            "kind": machine_kind(device),
            "processor": _processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "bf16_instructions": [flag for flag in _processor_flags() if "bf16" in flag],
            "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
            "system": platform.platform(),
        },
        "versions": versions,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def machine_kind(device: torch.device) -> str:
    """A short name for files: `cpu-xeon-2core`, `gpu-h200`."""
    if device.type == "cuda":
        words = torch.cuda.get_device_name(device).lower().replace("nvidia", "").split()
        return f"gpu-{words[0]}"
    processor = _processor().lower()
    families = ("xeon", "epyc", "ryzen", "core", "neoverse", "apple")
    family = next((name for name in families if name in processor), platform.machine())
    return f"cpu-{family}-{os.cpu_count()}core"


def _processor() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _processor_flags() -> list[str]:
    return (_cpuinfo("flags") or _cpuinfo("Features")).split()


def _cpuinfo(field: str) -> str:
    """The first value of a field of Linux's processor description; empty where there is none."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == field:
                return value.strip()
    return ""


def say(text: str) -> None:
    """Progress; the standard output is for rows alone."""
    print(text, file=sys.stderr, flush=True)
