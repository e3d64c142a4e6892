"""A ledger of the tensors that are made while it is open: how many bytes live, what for, and when they are most."""

import sys
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moewright.backbone.sizes import bytes_of
from moewright.moe.kernels.memory import SMALLEST
from moewright.parallel._torch import TorchDispatchMode, group_name, group_size
from moewright.parallel.experts import local_part

COMPONENTS: Final = (
    *("weights", "gradients", "optimizer", "gathered", "activations", "dispatch", "logits", "communication"),
    "allocator",
)
"""What a rank's memory is for. `gathered`: parameters and gradients that are whole, or cast, for a while; `dispatch`:
copies of tokens for experts, and what the all-to-alls send and receive; `communication`: buffers of other collectives;
`allocator`: what is kept to be used again."""

OWNERS: Final = {
    "torch/distributed/fsdp/_fully_shard/_fsdp_param.py": "gathered",
    "torch/distributed/fsdp/_fully_shard/_fsdp_collectives.py": "communication",
    "moewright/optim/gradients.py": "gradients",
    "moewright/parallel/exchange.py": "dispatch",
    "moewright/moe/dispatch.py": "dispatch",
    "moewright/moe/exchange.py": "dispatch",
}
"""Components by the end of the file that makes a tensor."""
AXES: Final = ("ep", "tp", "data")
"""`ep`: tokens to their experts and back; `tp`: between slices; `data`: parameters and gradients."""
PASSING: Final = ("activations", "dispatch", "logits")
JOURNEYS: Final = ("c10d::alltoall_base_", "_c10d_functional::all_to_all_single")
REDUCTIONS: Final = ("c10d::_reduce_scatter_base_", "c10d::allreduce_")
GATHERED: Final = 0.0
COLLECTIVES: Final = {
    "c10d::_allgather_base_": (0, 1.0),
    "c10d::_reduce_scatter_base_": (1, 1.0),
    **dict.fromkeys(JOURNEYS[:1], (1, 1.0)),
    **dict.fromkeys(JOURNEYS[1:], (0, 1.0)),
    "c10d::allreduce_": (0, 2.0),
    "c10d::allgather_": (1, GATHERED),
    "_c10d_functional::all_gather_into_tensor": (0, GATHERED),
    "_c10d_functional::reduce_scatter_tensor": (0, 1.0),
    "_c10d_functional::all_reduce": (0, 2.0),
}
"""Of operators which argument is counted, and how often it is sent but for the part that stays; `GATHERED`: to each
of the others."""
CAST: Final = "aten::_to_copy"
KERNELS: Final = {"moewright::experts_forward": 1, "moewright::experts_backward": 3}
"""Of operators which argument has a value for each assignment; the first has rows as wide as an expert's output."""
DEPTH: Final = 12
"""Frames that are looked at for such a file: the ones between are torch's."""


class Pool:
    """The blocks of `moe.kernels.memory`, by their sizes: which are used, and which are kept to be used again."""

    def __init__(self) -> None:
        self.free: list[int] = []
        self.used = 0

    @property
    def kept(self) -> int:
        """Bytes that nothing uses."""
        return sum(self.free)

    def take(self, size: int) -> None:
        self.used += size
        if size in self.free:
            self.free.reverse()
            self.free.remove(size)
            self.free.reverse()
            return
        while self.kept > self.used:
            self.free.pop(0)

    def give_back(self, size: int) -> None:
        self.used -= size
        self.free.append(size)


class Ledger(TorchDispatchMode):
    """Counts the bytes of all storages that are made within it, as long as they live, and what collectives send.

    With `on_cpu` also what processes on CPUs hold beside their tensors, as far as it is known: buffers inside of our
    kernels' operators and of gloo's reductions, and blocks that our kernels keep to use again.
    """

    def __init__(self, *, vocabulary: int, axes: Mapping[str, str], on_cpu: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.vocabulary, self.axes = vocabulary, axes
        self.phase: str | None = None
        """The component of all tensors that are made; None: that of whoever makes them."""
        self.now: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.peaks: dict[str, Counter[str]] = {}
        """The peak of each phase that `begin` has named."""
        self.passing: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        """Bytes by axis."""
        self.forward = False
        """Whether a forward pass is on, in which `passing` is followed."""
        self._storages: dict[int, list[Any]] = {}  # bytes and component, by identity
        self._parameters: dict[int, nn.Parameter] = {}
        self.begin("start")
        self._pool = Pool() if on_cpu else None

    def begin(self, phase: str) -> None:
        """Begin a phase, or go on with it: until the next, the peak is its own."""
        self.peak = max(self.peaks.get(phase, Counter()), self.now.copy(), key=Counter.total)
        self.peaks[phase] = self.peak
        self._phase = phase

    @contextmanager
    def tagging(self, component: str) -> Iterator[None]:
        """All that is made within is of this component."""
        self.phase = component
        try:
            yield
        finally:
            self.phase = None

    def gradients_of(self, module: nn.Module) -> None:
        """Count what the module's own parameters have as gradients, from when they have them, as gradients."""
        for parameter in module._parameters.values():
            if parameter is not None and parameter.requires_grad and id(parameter) not in self._parameters:
                self._parameters[id(parameter)] = parameter
                parameter.register_post_accumulate_grad_hook(lambda one: self.tag(one.grad, "gradients"))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # what it does to its local part is seen below
        name: str = func.name()
        self._count_traffic(name, args)
        result = func(*args, **(kwargs or {}))
        cast = name == CAST and self._component(args[0]) in ("weights", "gathered")
        pooled = self._pool is not None and func.namespace == "moewright"
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self._see(tensor, "gathered" if cast else None, pooled=pooled)
        if self._pool is not None:
            self._use_inside(name, args)
        return result

    def _use_inside(self, name: str, args: Any) -> None:
        """Memory that an operator takes and gives back."""
        if name in KERNELS:
            size = args[KERNELS[name]].numel() * args[0].shape[-1] * 4  # an output for each assignment, float32
            self._take(size)
            self._add("dispatch", size)
            self._give_back(size)
            self._add("dispatch", -size)
        elif name == "c10d::_reduce_scatter_base_":  # gloo reduces a copy of all, and takes its part of it
            self._add("communication", bytes_of(args[1]))
            self._add("communication", -bytes_of(args[1]))

    def _take(self, size: int) -> None:
        if self._pool is not None and size >= SMALLEST:
            self._pool.take(size)
            self.now["allocator"] = self._pool.kept

    def _give_back(self, size: int) -> None:
        if self._pool is not None and size >= SMALLEST:
            self._pool.give_back(size)
            self._add("allocator", self._pool.kept - self.now["allocator"])

    def _component(self, tensor: Tensor) -> str | None:
        entry = self._storages.get(id(tensor.untyped_storage()))
        return None if entry is None else entry[1]

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

    def _see(self, tensor: Tensor, component: str | None, *, pooled: bool) -> None:
        storage = tensor.untyped_storage()
        if (key := id(storage)) in self._storages:
            return
        component = component or self.phase or self._owner(tensor)
        self._storages[key] = [storage.nbytes(), component]
        if pooled:
            self._take(storage.nbytes())
        weakref.finalize(storage, self._died, key, pooled).atexit = False
        self._add(component, storage.nbytes())

    def _died(self, key: int, pooled: bool) -> None:
        size, component = self._storages.pop(key)
        self.now[component] -= size
        if pooled:
            self._give_back(size)

    def _add(self, component: str, count: int) -> None:
        self.now[component] += count
        if self.forward and count > 0 and component in PASSING:
            passing = Counter({name: self.now[name] for name in PASSING})
            self.passing = max(self.passing, passing, key=Counter.total)
        if count > 0 and self.now.total() > self.peak.total():
            self.peak = self.peaks[self._phase] = self.now.copy()

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
        if name in REDUCTIONS:  # which leave gradients that no hook tells of: those before this one are there
            for parameter in self._parameters.values():
                self.tag(parameter.grad, "gradients")
        place, factor = COLLECTIVES[name]
        tensor = args[place][0] if isinstance(args[place], list | tuple) else args[place]
        group = next(name for name in map(group_name, args) if name is not None)
        ranks = group_size(group)
        share = ranks - 1 if factor == GATHERED else factor * (ranks - 1) / ranks
        # Where an axis has all ranks its group is that of all, which other axes may have too: the operator tells them.
        axis = "ep" if name in JOURNEYS else self.axes.get(group, "data")
        self.sent[axis] += int(share * bytes_of(tensor))


@contextmanager
def following_resizes(ledger: Ledger) -> Iterator[None]:
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
