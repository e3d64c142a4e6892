"""A step of the real model on simulated ranks: every tensor is made, with a shape and without memory, and counted.

The model is put on the ranks by the `apply` of training, and forward pass, backward pass and optimiser are those of
training; what is simulated is that collectives do nothing, and that ranks get as many rows as is said.
"""

import copy
import sys
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from math import ceil
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from moewright.backbone.blocks import configure, moe_layers, routing_step
from moewright.backbone.sizes import bytes_of
from moewright.parallel._torch import TorchDispatchMode, group_name, group_size, simulated_ranks, without_memory
from moewright.parallel.apply import ALONE, Parallel, apply
from moewright.parallel.config import Degrees
from moewright.parallel.experts import AllToAllExchange, local_part
from moewright.parallel.mesh import Meshes, make_meshes
from moewright.parallel.parts import with_part
from moewright.parallel.ranks import Ranks
from moewright.plan.devices import Workload

COMPONENTS: Final = (
    *("weights", "gradients", "optimizer", "gathered", "activations", "dispatch", "logits", "communication"),
)
"""What a rank's memory is for. `gathered`: parameters and gradients that are whole for a while; `dispatch`: copies of
tokens for experts, and what the all-to-alls send and receive; `communication`: buffers of other collectives."""

OWNERS: Final = {
    "torch/distributed/fsdp/_fully_shard/_fsdp_param.py": "gathered",
    "torch/distributed/fsdp/_fully_shard/_fsdp_collectives.py": "communication",
    "moewright/parallel/experts.py": "dispatch",
    "moewright/moe/dispatch.py": "dispatch",
    "moewright/moe/exchange.py": "dispatch",
}
"""Components by the end of the file that makes a tensor."""
GATHERED: Final = 0.0
COLLECTIVES: Final = {
    "c10d::_allgather_base_": (0, 1.0),
    "c10d::_reduce_scatter_base_": (1, 1.0),
    "c10d::alltoall_base_": (1, 1.0),
    "c10d::allreduce_": (0, 2.0),
    "_c10d_functional::all_gather_into_tensor": (0, GATHERED),
    "_c10d_functional::reduce_scatter_tensor": (0, 1.0),
    "_c10d_functional::all_to_all_single": (0, 1.0),
    "_c10d_functional::all_reduce": (0, 2.0),
}
"""Of operators which argument is counted, and how often it is sent but for the part that stays; `GATHERED`: to each
of the others."""
DEPTH: Final = 12
"""Frames that are looked at for such a file: the ones between are torch's."""


@dataclass(frozen=True)
class Simulated:
    """A rank's step."""

    peak: Mapping[str, int]
    """Bytes by component at the moment when they are most."""
    resident: Mapping[str, int]
    """Bytes by component between two steps."""
    traffic: Mapping[str, int]
    """Bytes that a rank sends in a step, by axis."""


class Exchange(AllToAllExchange):
    """An all-to-all of as many rows as is said, in place of those that routing would tell."""

    def __init__(self, real: AllToAllExchange, *, rows: float) -> None:
        super().__init__(real.num_experts, real.group)
        self.rows = rows
        """Rows that arrive here for each that is sent."""

    def counts(self, sent_ne: Tensor) -> tuple[Tensor, list[int], list[int]]:
        each = ceil(self.sent / self.ranks)
        to = [each] * (self.ranks - 1) + [self.sent - each * (self.ranks - 1)]
        arriving = ceil(self.sent * self.rows / self.ranks)
        return torch.empty_like(sent_ne), to, [arriving] * self.ranks

    def send(self, x_TD: Tensor, experts_TK: Tensor, *rest: Any) -> Any:
        self.sent = experts_TK.numel()
        return super().send(x_TD, experts_TK, *rest)


class Ledger(TorchDispatchMode):
    """Counts the bytes of all storages that are made within it, as long as they live, and what collectives send."""

    def __init__(self, *, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.phase: str | None = None
        """The component of all tensors that are made; None: that of whoever makes them."""
        self.now: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        """Bytes by group."""
        self._storages: dict[int, list[Any]] = {}  # bytes and component, by identity
        self._parameters: Sequence[nn.Parameter] = ()

    def begin(self) -> None:
        """Forget the peak."""
        self.peak = self.now.copy()

    @contextmanager
    def tagging(self, component: str) -> Iterator[None]:
        """All that is made within is of this component."""
        self.phase = component
        try:
            yield
        finally:
            self.phase = None

    def gradients_of(self, parameters: Sequence[nn.Parameter]) -> None:
        """Count what these parameters have as gradients, from when they have them, as gradients."""
        self._parameters = parameters

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # what it does to its local part is seen below
        self._count_traffic(func.name(), args)
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        return result

    def tag(self, tensor: Tensor | None, component: str) -> None:
        """Count a tensor as of this component from now on."""
        if tensor is None or (entry := self._storages.get(id(local_part(tensor).untyped_storage()))) is None:
            return
        if entry[1] != component:
            self.now[entry[1]] -= entry[0]
            self.now[component] += entry[0]
            entry[1] = component

    def resized(self, storage: torch.UntypedStorage) -> None:
        """Take note of a storage whose size has changed in place."""
        if (entry := self._storages.get(id(storage))) is not None:
            self._add(entry[1], storage.nbytes() - entry[0])
            entry[0] = storage.nbytes()

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if (key := id(storage)) in self._storages:
            return
        component = self.phase or self._owner(tensor)
        self._storages[key] = [storage.nbytes(), component]
        weakref.finalize(storage, self._died, key).atexit = False
        self._add(component, storage.nbytes())

    def _died(self, key: int) -> None:
        count, component = self._storages.pop(key)
        self.now[component] -= count

    def _add(self, component: str, count: int) -> None:
        self.now[component] += count
        if count > 0 and self.now.total() > self.peak.total():
            for parameter in self._parameters:
                self.tag(parameter.grad, "gradients")
            self.peak = self.now.copy()

    def _owner(self, tensor: Tensor) -> str:
        if tensor.dim() and tensor.shape[-1] == self.vocabulary:
            return "logits"
        frame = sys._getframe(2)
        for _ in range(DEPTH):
            for ending, component in OWNERS.items():
                if frame.f_code.co_filename.endswith(ending):
                    return component
            if frame.f_back is None:
                break
            frame = frame.f_back
        return "activations"

    def _count_traffic(self, name: str, args: Any) -> None:
        """What a rank sends, with the algorithms that send least."""
        if name not in COLLECTIVES:
            return
        place, factor = COLLECTIVES[name]
        tensor = args[place][0] if isinstance(args[place], list | tuple) else args[place]
        group = next(name for name in map(group_name, args) if name is not None)
        ranks = group_size(group)
        share = ranks - 1 if factor == GATHERED else factor * (ranks - 1) / ranks
        self.sent[group] += int(share * bytes_of(tensor))


def simulate(model: PreTrainedModel, degrees: Degrees, work: Workload, *, skew: float = 1.0) -> Simulated:
    """A step of `model`, a skeleton on meta that is not changed, on the first of `degrees.ranks` ranks.

    `skew` is the load of the busiest rank of an `ep` axis over the mean; it is this one.
    """
    model = copy.deepcopy(model)
    configure(model, kernel="native")  # of all kernels those for devices keep the same
    ranks = degrees.ranks
    with simulated_ranks(ranks) if ranks > 1 else nullcontext():
        axes: dict[str, str] = {}
        if ranks > 1:
            meshes = make_meshes(degrees, device_type="cpu")
            axes = _axes(meshes)
            apply(model, meshes)
        for layer in moe_layers(model).values():
            if isinstance(layer.exchange, AllToAllExchange):
                layer.exchange = Exchange(layer.exchange, rows=skew)
        ledger = Ledger(vocabulary=model.config.vocab_size)
        parallel = Parallel(ranks=Ranks(size=ranks), degrees=degrees) if ranks > 1 else ALONE
        with without_memory(), _following_resizes(ledger), ledger:
            return _step(model.train(), work, parallel, ledger, axes)


def _step(
    model: PreTrainedModel, work: Workload, parallel: Parallel, ledger: Ledger, axes: Mapping[str, str]
) -> Simulated:
    """A step after the first one, which makes the optimiser's states."""
    with ledger.tagging("weights"):
        _give_memory(model)
    optimizer = work.optimizer(model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with ledger.tagging("optimizer"):
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    resident = ledger.now.copy()
    ledger.gradients_of(parameters)

    size, count = work.share(parallel.ranks.size)
    routing = routing_step(model)
    traffic: Counter[str] = Counter()
    ledger.begin()
    # All but the last micro-batch are alike; of several the second one finds the gradients of the first.
    for number in range(max(1, count - 1), count + 1):
        before = ledger.sent.copy()
        routing.begin_micro_batch({"decoder": 1 / count})
        loss = work.loss(model, size)
        parallel.begin_backward(model, last=number == count)
        loss.backward()
        routing.after_backward()
        del loss
        times = 1 if number == count else count - 1
        traffic += Counter({group: times * sent for group, sent in (ledger.sent - before).items()})
    with ledger.tagging("optimizer"):
        optimizer.step()
    by_axis: Counter[str] = Counter()
    for group, sent in traffic.items():
        by_axis[axes[group]] += sent
    return Simulated(_components(ledger.peak), _components(resident), dict(by_axis))


def _components(counts: Mapping[str, int]) -> dict[str, int]:
    return {name: counts.get(name, 0) for name in COMPONENTS}


def _axes(meshes: Meshes) -> dict[str, str]:
    """The axis of each group by its name."""
    return {
        mesh.get_group(name).group_name: axis
        for mesh in (meshes.experts, meshes.dense)
        for name in mesh.mesh_dim_names or ()
        for axis in [name]
    }


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


@contextmanager
def _following_resizes(ledger: Ledger) -> Iterator[None]:
    """Tell the ledger of storages that change their size, as `fully_shard` has them do: no operator is called then."""
    resize = torch.UntypedStorage.resize_

    def followed(storage: torch.UntypedStorage, size: int) -> Any:
        result = resize(storage, size)
        ledger.resized(storage)
        return result

    setattr(torch.UntypedStorage, "resize_", followed)  # noqa: B010  # an assignment is a type error
    try:
        yield
    finally:
        setattr(torch.UntypedStorage, "resize_", resize)  # noqa: B010
