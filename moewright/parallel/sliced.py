"""Modules that compute with their slice of their parameters, and the sums and gathers that this calls for.

Outside of sliced modules an activation is whole and the same on all ranks of the axis, and so is its gradient. Between
a module that gives slices and one that takes them, both are this rank's part. What such a module reads whole has, on
each rank, a part of the gradient, and what it reads in slices has all of its slice's: hence four functions, each the
other's transpose. Forward and backward of the four:

| function | forward | backward |
|---|---|---|
| `enter` | nothing | sum |
| `leave` | sum | nothing |
| `gather` | gather | own part |
| `own_part` | own part | gather |
"""

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from moewright.parallel.exchange import Gather, Share
from moewright.parallel.experts import local_part
from moewright.parallel.parts import boxes_of


@dataclass(eq=False)
class Axis:
    """The ranks among which the modules of a model are sliced: a mesh of one dimension."""

    mesh: DeviceMesh
    last: tuple[weakref.ref[Tensor], Tensor] | None = None
    """What was read last, and what came of it; until the backward pass."""

    def entered(self, x: Tensor) -> Tensor:
        """`x`, whole here, for a module that gives slices. Modules that read it in turn share one sum of gradients."""
        if not (torch.is_grad_enabled() and x.requires_grad):
            return x
        if self.last is None or self.last[0]() is not x:
            self.last = (weakref.ref(x), _Enter.apply(x, self))  # type: ignore[no-untyped-call]
        return self.last[1]

    def summed(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks, on each of them."""
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self.mesh.get_group())
        return total


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.axis.last = None  # it would keep the graph
        return ctx.axis.summed(gradient), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        return axis.summed(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class Sliced(nn.Module):
    """Mixed into the class of a module some of whose parameters are DTensors on `axis`."""

    axis: Axis

    def parts(self) -> dict[str, Tensor | None]:
        """What this rank has of the module's own parameters."""
        return {name: p if p is None else local_part(p) for name, p in self._parameters.items()}

    def compute(self, parts: Mapping[str, Tensor | None], *args: Any, **kwargs: Any) -> Any:
        """The forward pass of the module's own class, with `parts` in the place of its parameters."""
        own = self._parameters
        self.__dict__["_parameters"] = parts
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.__dict__["_parameters"] = own

    def mine(self, dim: int) -> slice:
        """What this rank has of a dim of the weight."""
        (box,) = boxes_of(self.get_parameter("weight"))
        return box.whole[dim]


class Local(Sliced):
    """Reads and gives slices: nothing is summed."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.compute(self.parts(), *args, **kwargs)


class Columns(Sliced):
    """A linear map of which each rank has some outputs: reads what is whole, and gives its slice."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.compute(self.parts(), self.axis.entered(x))
        return y


class GatheredColumns(Columns):
    """The same, giving the whole."""

    def forward(self, x: Tensor) -> Tensor:
        size = len(self.get_parameter("weight"))
        group = self.axis.mesh.get_group()
        y: Tensor = Gather.apply(super().forward(x), size, -1, group)  # type: ignore[no-untyped-call]
        return y


class Rows(Sliced):
    """A linear map of which each rank has some inputs: reads its slice, and gives what is whole."""

    def forward(self, x: Tensor) -> Tensor:
        parts = self.parts()
        bias = parts.get("bias")
        y: Tensor = _Leave.apply(self.compute(parts | {"bias": None}, x), self.axis)  # type: ignore[no-untyped-call]
        return y if bias is None else y + bias.to(y.dtype)  # once, not on each rank


class SplittingRows(Rows):
    """The same, reading what is whole."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(Share.apply(x, -1, self.axis.mesh.get_group()))  # type: ignore[no-untyped-call]


class Entries(Sliced):
    """An embedding of which each rank has some entries."""

    padding_idx: int | None

    def forward(self, ids: Tensor) -> Tensor:
        mine, padding = self.mine(0), self.padding_idx
        elsewhere = (ids < mine.start) | (ids >= mine.stop)
        try:
            if padding is not None:  # its entry gets no gradient
                self.padding_idx = padding - mine.start if mine.start <= padding < mine.stop else None
            y = self.compute(self.parts(), (ids - mine.start).masked_fill(elsewhere, 0))
        finally:
            self.padding_idx = padding
        whole: Tensor = _Leave.apply(y.masked_fill(elsewhere[..., None], 0), self.axis)  # type: ignore[no-untyped-call]
        return whole


class Summed(Sliced):
    """Has all of its parameters, but reads slices: each rank has a part of their gradient."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        parts = {name: p if p is None else _Enter.apply(p, self.axis) for name, p in self.parts().items()}  # type: ignore[no-untyped-call]
        return self.compute(parts, *args, **kwargs)


def become(module: nn.Module, how: Any, axis: Axis) -> None:
    """Let a module compute in the way of `how`; its parameters stay as they are."""
    assert not isinstance(module, Sliced), "it is sliced already"
    kind: Any = type(module)
    module.__class__ = _mixed(kind, how)
    module.__dict__["axis"] = axis


@cache
def _mixed(kind: Any, how: Any) -> type[nn.Module]:
    named = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (how, kind), named)
