"""Gradients on their way to the optimiser: kept elsewhere, or in another precision, than autograd leaves them."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from moewright.parallel.experts import local_part
from moewright.parallel.memory import Memory
from moewright.parallel.parts import with_part


@dataclass
class _Kept:
    memory: Memory
    dtype: torch.dtype
    tensor: Tensor | None = None
    filled: bool = False
    """Whether it has a gradient of this step."""


@dataclass
class KeptGradients:
    """The gradients of some parameters, each added up over a step's micro-batches in a memory and dtype of its own.

    As soon as autograd, or FSDP2 after its reduction, has a parameter's gradient, it is added to the one that is kept,
    and `grad` is None again. To another device it is copied by a stream of its own, while the backward pass goes on,
    once it is complete: in the `last` micro-batch, until which autograd adds it up where it is, in its own dtype. One
    that the last micro-batch does not have leaves when the optimiser asks for it.
    """

    last: bool = True
    """Whether the next backward pass is that of the step's last micro-batch; if each is said to be, each is sent."""
    _kept: dict[nn.Parameter, _Kept] = field(default_factory=dict)
    _stream: torch.cuda.Stream | None = None

    def keep(self, parameter: nn.Parameter, memory: Memory, dtype: torch.dtype) -> None:
        """Keep this parameter's gradients there from now on."""
        self._kept[parameter] = _Kept(memory, dtype)
        parameter.register_post_accumulate_grad_hook(self._take)

    def _take(self, parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter)
        assert parameter.grad is not None
        if self.last or local_part(parameter.grad).device == self._kept[parameter].memory.device:
            self._keep(parameter, local_part(parameter.grad))

    @torch.no_grad()
    def _keep(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        kept = self._kept[parameter]
        if kept.tensor is None:
            kept.tensor = kept.memory.empty(gradient.shape, kept.dtype)
        if kept.filled:
            self._wait()
            kept.tensor.add_(gradient.to(kept.tensor.device))
        elif gradient.device != kept.memory.device:
            self._send(gradient, kept.tensor)
        else:
            kept.tensor.copy_(gradient)
        kept.filled = True
        parameter.grad = None

    def _send(self, gradient: Tensor, to: Tensor) -> None:
        if self._stream is None:
            self._stream = torch.cuda.Stream(gradient.device)
        self._stream.wait_stream(torch.cuda.current_stream(gradient.device))
        with torch.cuda.stream(self._stream):
            to.copy_(gradient, non_blocking=True)
        gradient.record_stream(self._stream)  # its memory is free again when the copy is made

    def arrive(self) -> None:
        """After the step's backward passes: send what is left, and wait for what is on its way to another device."""
        for parameter in self._kept:
            if parameter.grad is not None:
                self._keep(parameter, local_part(parameter.grad))
        self._wait()

    def _wait(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()

    def of(self, parameter: nn.Parameter) -> Tensor | None:
        """A parameter's gradient of this step, wherever it is; divided as the parameter is."""
        kept = self._kept.get(parameter)
        if kept is None:
            return parameter.grad
        return with_part(parameter.detach(), kept.tensor) if kept.filled and kept.tensor is not None else None

    def drop(self) -> None:
        """Begin a step anew. Memory that lasts is used again."""
        for kept in self._kept.values():
            kept.filled = False
            if not kept.memory.lasting:
                kept.tensor = None
