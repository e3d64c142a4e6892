"""A step of the real model on simulated ranks: every tensor is made, with a shape and without memory, and counted.

The model is put on the ranks by the `apply` of training, and forward pass, backward pass and the optimiser's states are
those of training; what is simulated is that collectives do nothing, and that ranks get as many rows as is said.
"""

import copy
from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moewright.backbone.blocks import configure, moe_layers, routing_step
from moewright.family.table import family_of
from moewright.moe.exchange import Delivery
from moewright.parallel._torch import simulated_ranks, without_memory
from moewright.parallel.apply import ALONE, Parallel, apply
from moewright.parallel.config import Degrees
from moewright.parallel.exchange import AllToAllExchange, SharedTokens
from moewright.parallel.experts import local_part
from moewright.parallel.mesh import make_meshes
from moewright.parallel.parts import with_part
from moewright.parallel.ranks import Ranks
from moewright.parallel.recompute import recompute
from moewright.plan.devices import Workload
from moewright.plan.ledger import AXES, COMPONENTS, Ledger, following_resizes
from moewright.plan.thin import FEW, further, with_few


@dataclass(frozen=True)
class Simulated:
    """A rank's step."""

    peaks: Mapping[str, Mapping[str, int]]
    """Of each phase of the step, the bytes by component at the moment when they are most."""
    resident: Mapping[str, int]
    """Bytes by component between two steps."""
    passing: Mapping[str, int]
    """Bytes of activations, dispatch and logits at the moment of the forward pass when these are most."""
    traffic: Mapping[str, int]
    """Bytes that a rank sends in a step, by axis."""

    @property
    def peak(self) -> Mapping[str, int]:
        """Bytes by component at the moment of the step when they are most."""
        return max(self.peaks.values(), key=lambda counts: sum(counts.values()))


class Exchange(AllToAllExchange):
    """An all-to-all of as many rows as is said, in place of those that routing would tell."""

    def __init__(self, real: AllToAllExchange, *, load: float) -> None:
        super().__init__(real.num_experts, real.group, slices=real.slices)
        self.load, self.sent = load, 0
        """Rows that arrive here for each that is sent, and rows that are sent."""

    def send(self, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, kept_TK: Tensor | None) -> Delivery:
        self.sent = experts_TK.numel() * self.slices
        return super().send(x_TD, experts_TK, weights_TK, kept_TK)

    def counts(self, sent_ne: Tensor) -> tuple[Tensor, list[int], list[int]]:
        each, rest = divmod(self.sent, self.ranks)
        to = [each + (rank < rest) for rank in range(self.ranks)]
        return torch.empty_like(sent_ne), to, [ceil(self.sent * self.load / self.ranks)] * self.ranks


def _with_counts(exchange: Any, load: float) -> Any:
    """The exchange of a layer with an all-to-all, if it has one, of so many rows."""
    if isinstance(exchange, SharedTokens):
        return SharedTokens(_with_counts(exchange.exchange, load), exchange.group)
    return Exchange(exchange, load=load) if isinstance(exchange, AllToAllExchange) else exchange


def simulate(model: PreTrainedModel, degrees: Degrees, work: Workload, *, skew: float = 1.0) -> Simulated:
    """A step of `model`, a skeleton on meta that is not changed, on the first of `degrees.ranks` ranks.

    `skew` is the load of the busiest rank of an `ep` axis over the mean; it is this one. Of many layers of a kind a few
    are simulated: at every moment of a phase memory grows in a line with their number, so its peak does.
    """
    times = further(model)
    if not times:
        return _simulate(copy.deepcopy(model), degrees, work, skew=skew)
    few, more = (_simulate(with_few(model, most), degrees, work, skew=skew) for most in FEW)
    return Simulated(
        peaks={phase: _line(few.peaks[phase], more.peaks[phase], times) for phase in more.peaks},
        resident=_line(few.resident, more.resident, times),
        passing=_line(few.passing, more.passing, times),
        traffic=_line(few.traffic, more.traffic, times),
    )


def _line(few: Mapping[str, int], more: Mapping[str, int], times: float) -> dict[str, int]:
    return {name: max(0, round(more[name] + times * (more[name] - few[name]))) for name in more}


def _simulate(model: PreTrainedModel, degrees: Degrees, work: Workload, *, skew: float) -> Simulated:
    configure(model, kernel="native")  # of all kernels those for devices keep the same
    recompute(model, work.recompute)
    ranks = degrees.ranks
    with simulated_ranks(ranks) if ranks > 1 else nullcontext():
        axes: dict[str, str] = {}
        if ranks > 1:
            meshes = make_meshes(degrees, device_type="cpu")
            axes = {meshes.dense.get_group("tp").group_name: "tp"} if degrees.tp > 1 else {}
            apply(model, meshes)
        for layer in moe_layers(model).values():
            layer.exchange = _with_counts(layer.exchange, skew)
        ledger = Ledger(vocabulary=model.config.vocab_size, axes=axes, on_cpu=work.device == "cpu")
        parallel = Parallel(ranks=Ranks(size=ranks, tp=degrees.tp), degrees=degrees) if ranks > 1 else ALONE
        with without_memory(), following_resizes(ledger), ledger:
            return _step(model.train(), work, parallel, ledger)


def _step(model: PreTrainedModel, work: Workload, parallel: Parallel, ledger: Ledger) -> Simulated:
    """A step up to its update, which needs no more: optimiser states are there, and activations are gone."""
    with ledger.tagging("weights"):
        _give_memory(model)
    optimizer = work.optimizer(model)
    with ledger.tagging("optimizer"):
        optimizer.begin()
    resident = ledger.now.copy()
    for module in model.modules():
        if module._parameters:
            ledger.gradients_of(module)
            # First of all hooks: what is gathered for the pass is dropped in others.
            module.register_forward_hook(lambda module, _, __: ledger.gradients_of(module), prepend=True)

    size, count = work.share(parallel.ranks.data_size)
    routing = routing_step(model)
    traffic: Counter[str] = Counter()
    _in_halves(model, ledger)
    # All but the last micro-batch are alike; of several the second one finds the gradients of the first.
    for number in range(max(1, count - 1), count + 1):
        before = ledger.sent.copy()
        routing.begin_micro_batch({"decoder": 1 / count})
        ledger.begin("forward")
        ledger.forward = True
        loss = work.loss(model, size)
        ledger.forward = False
        parallel.begin_backward(model, last=number == count)
        ledger.begin("backward, first half")
        loss.backward()
        routing.after_backward()
        del loss
        times = 1 if number == count else count - 1
        traffic += Counter({axis: times * sent for axis, sent in (ledger.sent - before).items()})
    del ledger.peaks["start"]
    return Simulated(
        peaks={phase: _components(peak) for phase, peak in ledger.peaks.items()},
        resident=_components(resident),
        passing=_components(ledger.passing),
        traffic={axis: traffic[axis] for axis in AXES},
    )


def _in_halves(model: PreTrainedModel, ledger: Ledger) -> None:
    """Tell the ledger when a backward pass is half way: activations go as gradients come, so the peak is at an end."""
    places = family_of(model.config).places(model.config)

    def watch(module: nn.Module, args: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if first.requires_grad:
            first.register_hook(lambda gradient: ledger.begin("backward, second half"))

    model.get_submodule(places[len(places) // 2 - 1 if len(places) > 1 else 0].layer).register_forward_hook(watch)


def _components(counts: Mapping[str, int]) -> dict[str, int]:
    return {name: counts.get(name, 0) for name in COMPONENTS}


def _give_memory(model: nn.Module) -> None:
    """Take each parameter and buffer from meta to the CPU, of a parameter the part that this rank holds."""
    parameters: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in parameters:
                    part = torch.empty(local_part(parameter).shape, dtype=parameter.dtype)
                    parameters[id(parameter)] = nn.Parameter(with_part(parameter, part), parameter.requires_grad)
                module._parameters[name] = parameters[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
