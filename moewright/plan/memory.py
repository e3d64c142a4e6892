"""The memory of a rank by formula, as a check of the simulation, and quick enough to compare thousands of layouts.

Of R ranks, P_n dense parameters and P_e of experts a rank has, before ZeRO,

    P_n / tp    and    P_e / (ep * etp)

and never P_e / tp: slices of dense parts are no slices of experts. Activations are divided by `tp` where they lie
between sliced projections; by `ep` they are not: an all-to-all trades tokens for as many others.

Bytes a parameter: w of the weight and of its gradient, s of the optimiser's states. The table of docs/parallelism.md
says what each stage of ZeRO shards, over `fsdp` ranks for dense parts and `expert_fsdp` for experts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from moewright.parallel.config import Degrees
from moewright.plan.devices import Devices, Workload
from moewright.plan.ledger import COMPONENTS
from moewright.plan.sizes import Sizes


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one rank."""

    device: Mapping[str, int]
    """By component."""
    host: Mapping[str, int]
    """By component: what is offloaded to the host's memory."""
    disk: Mapping[str, int]
    """By component: what is offloaded to files."""

    def needed(self, devices: Devices) -> int:
        """Of the device's memory: tensors, the allocator's slack, and the process."""
        return int(sum(self.device.values()) * (1 + devices.slack)) + devices.process

    def host_needed(self, devices: Devices) -> int:
        """Of a host's memory, for all of its devices."""
        return devices.on_host * (sum(self.host.values()) + devices.host_process)

    def disk_needed(self, devices: Devices) -> int:
        """Of a host's disk, for all of its devices."""
        return devices.on_host * sum(self.disk.values())

    def fits(self, devices: Devices) -> bool:
        """Whether devices and hosts have room for it."""
        on_host = devices.host_memory is None or self.host_needed(devices) <= devices.host_memory
        return self.needed(devices) <= devices.memory and on_host


@dataclass(frozen=True)
class Held:
    """Numbers of parameters."""

    dense: float
    experts: float

    def bytes(self, each: float) -> int:
        """With so many each."""
        return int((self.dense + self.experts) * each)


def held(sizes: Sizes, degrees: Degrees) -> tuple[Held, Held]:
    """The parameters of a rank before ZeRO, and with it."""
    before = Held(sizes.dense / degrees.tp, sizes.experts / (degrees.ep * degrees.etp))
    if not degrees.zero:
        return before, before
    return before, Held(before.dense / degrees.fsdp, before.experts / degrees.expert_fsdp)


def unit_of(sizes: Sizes, degrees: Degrees) -> float:
    """Parameters of the largest group that is gathered at once."""
    experts = sizes.expert_block / (degrees.ep * degrees.etp)
    return max(sizes.block / degrees.tp, experts, sizes.outside / degrees.tp)


def formula(sizes: Sizes, degrees: Degrees, work: Workload, *, passing: Mapping[str, int], skew: float) -> Memory:
    """A rank's memory by component, at the larger end of a backward pass: activations go as gradients come.

    `passing` are activations and logits of a micro-batch on a rank of its own (`simulate`, on one).
    """
    device = dict.fromkeys(COMPONENTS, 0) | {name: passing[name] // degrees.tp for name in ("activations", "logits")}
    (here, part), unit = held(sizes, degrees), unit_of(sizes, degrees)
    w, count = work.param_dtype.itemsize, work.share(degrees.ranks // degrees.tp)[1]

    device["weights"] = part.bytes(w)
    device["optimizer"] = part.bytes(work.state_bytes)
    whole = degrees.zero == 1 and count > 1
    device["gradients"] = (here if whole else part).bytes(w)
    if degrees.ranks > 1:
        device["gathered"] = (
            here.bytes(w) if degrees.zero in (1, 2) else int((2 * unit + sizes.outside / degrees.tp) * w)
        )
        device["communication"] = int(2 * unit * w)
    if work.dtype.itemsize < w:  # autocast keeps what it has cast from the forward to the backward pass
        kept = Held(2 * unit, 0) if work.recompute == "block" else here
        device["gathered"] += kept.bytes(work.dtype.itemsize)
    device["logits"] *= 2  # and their gradient
    device["dispatch"] = passing["dispatch"] + _travelling(sizes, degrees, work, skew=skew)
    begin: tuple[str, ...] = ("gradients", "communication")
    end = ("activations", "dispatch", "logits")
    if whole or count > 1:  # gradients of the micro-batches before are there throughout
        begin = ("communication",)
    gone = min(begin, end, key=lambda names: sum(device[name] for name in names))
    return placed(device | dict.fromkeys(gone, 0), work, held=part, unit=unit)


def _travelling(sizes: Sizes, degrees: Degrees, work: Workload, *, skew: float) -> int:
    """What is kept of rows on their way to experts and back, and of those of other ranks' tokens.

    Balanced, as many rows come as go, and no rank has fewer than without `ep`. `skew`: the load of the busiest rank
    over the mean.
    """
    if degrees.ep * degrees.etp == 1:
        return 0
    tokens = work.share(degrees.ranks // degrees.tp)[0] * work.sequence_length / degrees.tp
    rows = {}
    for layer in set(sizes.sparse):
        sent = tokens * (layer.top_k or layer.expert_choice) * degrees.etp
        kept = 2 * sent * layer.hidden_size + sent * skew * layer.hidden_size  # sent, back again, and arrived
        more = sent * (skew - 1 / degrees.etp) * layer.expert_size / degrees.etp * (2 if layer.gated else 1)
        rows[layer] = (kept + max(0, more)) * work.dtype.itemsize
    layers = [max(rows.values())] if work.recompute == "block" else [rows[layer] for layer in sizes.sparse]
    return int(sum(layers))


def placed(device: Mapping[str, int], work: Workload, *, held: Held, unit: float) -> Memory:
    """Where the components lie under the workload's offload (the table of `parallel/offload.py`).

    With the states of a parameter a float32 gradient lies outside, and its float32 value: the master that states have
    beside a parameter elsewhere or in less than float32. Where weights are outside too, two units are on the device at
    a time, with their gradients: one that computes, and the next.
    """
    here, there = dict(device), dict.fromkeys(("weights", "gradients", "optimizer"), 0)
    w, wide = work.param_dtype.itemsize, max(4, work.param_dtype.itemsize)
    if work.offload == "optimizer":
        master = 0 if w < wide else wide  # otherwise among the states already
        there |= {"optimizer": held.bytes(work.state_bytes + master), "gradients": held.bytes(wide)}
        here["optimizer"] = 0
        # Without masters here there are no float32 gradients for them either: those of the parameters, at most.
        here["gradients"] = max(min(here["gradients"], held.bytes(w)), here["gradients"] - held.bytes(wide - w))
    elif work.offload != "none":
        moved = replace(held, dense=0) if work.offload == "experts" else held
        share = moved.bytes(1) / max(1, held.bytes(1))
        there = {"weights": moved.bytes(w), "optimizer": moved.bytes(work.state_bytes), "gradients": moved.bytes(wide)}
        for name in ("weights", "gradients", "optimizer", "gathered"):
            here[name] -= int(share * here[name])
        here["gathered"] += int(2 * unit * w)
        here["gradients"] += int(2 * unit * w)
    nothing = dict.fromkeys(there, 0)
    outside = (nothing, there) if work.offload_to == "disk" else (there, nothing)
    return Memory(device=here, host=outside[0], disk=outside[1])
