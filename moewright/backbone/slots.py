"""The tensors of a folder as views of a model: said once, used to read and to write.

Each tensor on disk is a `Slot`: a parameter or buffer of the model as it is, one or several pieces of a MoELayer (a
router, one projection of one expert, all of a stack), or something that only the format demands (an output embedding
written out although it is tied, biases and a shared expert that are zero).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from operator import attrgetter
from typing import Final, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moewright.backbone.blocks import moe_path
from moewright.family.row import Place
from moewright.family.table import family_of
from moewright.moe.config import TRAINING_BUFFERS
from moewright.moe.layer import MoELayer

PARTS: Final = {
    "router.weight": ("router",),
    "router.linear_bias": ("router_bias",),
    "router.bias": ("selection_bias",),
    "experts.gate_up_proj": ("gate", "up"),
    "experts.up_proj": ("up",),
    "experts.down_proj": ("down",),
    "experts.gate_up_proj_bias": ("gate_bias", "up_bias"),
    "experts.up_proj_bias": ("up_bias",),
    "experts.down_proj_bias": ("down_bias",),
    "shared.gate_up_proj.weight": ("shared_gate", "shared_up"),
    "shared.up_proj.weight": ("shared_up",),
    "shared.down_proj.weight": ("shared_down",),
    "shared.gate_up_proj.bias": ("shared_gate_bias", "shared_up_bias"),
    "shared.up_proj.bias": ("shared_up_bias",),
    "shared.down_proj.bias": ("shared_down_bias",),
    "shared.gate.weight": ("shared_switch",),
    "shared.gate.bias": ("shared_switch_bias",),
    "balance_coefficient": (),
    "previous_counts": (),
}
"""The parameters and buffers that a MoELayer may have, and of which parts their rows consist (experts': each expert's
rows). A part is what a dense model, too, would have as one tensor; the switch is what gates the shared expert."""

FLOAT32: Final = ("router.bias", *TRAINING_BUFFERS)
"""Those that are float32 whatever the model's dtype, in memory and on disk."""

Index = tuple[int | slice, ...]
"""A part of a tensor, as one indexes it; dims that are not named are whole."""
Slices = tuple[slice, ...]
"""The same, but that every dim stays."""


class Box(NamedTuple):
    """One contiguous piece of what a process holds of a tensor; all dims are named."""

    whole: Slices
    """Its place in the whole tensor."""
    local: Slices
    """Its place in the part that is here."""


Bring = Callable[[Tensor, Index], Tensor]
"""The part `index` of a tensor of the model, brought here from wherever it is."""


def here(tensor: Tensor, index: Index) -> Tensor:
    """`Bring` of a process that holds the whole model."""
    return tensor[index] if index else tensor


class TensorSource(Protocol):
    """The source of a folder's tensors: the folder itself, or a conversion that makes them."""

    def read(self, slot: "Slot", index: Slices | None = None) -> Tensor:
        """A slot's tensor as it is on disk; with `index` that part of it alone is read or made."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One part of one layer, and of one expert where experts have it."""

    part: str
    layer: int
    expert: int = -1

    def name(self, moe: MoELayer) -> str:
        """The layer's name of the tensor that holds it."""
        held = tensors_of(moe)
        return next(name for name, parts in PARTS.items() if self.part in parts and name in held)

    def index(self, moe: MoELayer) -> Index:
        """Its place in that tensor."""
        parts = PARTS[name := self.name(moe)]
        shape = tensors_of(moe)[name].shape
        rows, at = shape[1 if self.expert >= 0 else 0] // len(parts), parts.index(self.part)
        inside = slice(at * rows, (at + 1) * rows)
        return (self.expert, inside) if self.expert >= 0 else (inside,)

    def shape(self, moe: MoELayer) -> tuple[int, ...]:
        """Its shape, whatever part of that tensor is here."""
        return tuple(torch.empty(tensors_of(moe)[self.name(moe)].shape, device="meta")[self.index(moe)].shape)


@dataclass(frozen=True, kw_only=True)
class Order:
    """How a tensor of all experts lies on disk, where that is not as in memory; experts stay its first dim."""

    interleaved: bool = False
    """Rows of gate and up take turns; in memory all of the gate come first."""
    transposed: bool = False
    """Inputs come before outputs: (E, D, 2F) for (E, 2F, D)."""

    def to_disk(self, tensor: Tensor) -> Tensor:
        if self.interleaved:
            tensor = tensor.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
        return tensor.transpose(1, 2).contiguous() if self.transposed else tensor

    def from_disk(self, tensor: Tensor) -> Tensor:
        if self.transposed:
            tensor = tensor.transpose(1, 2)
        return tensor.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2) if self.interleaved else tensor


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One tensor of a folder."""

    name: str
    """Its name on disk."""
    shape: tuple[int, ...]
    target: str | None = None
    """Name of the parameter or buffer of the model that it is, where it is one as a whole."""
    pieces: tuple[Piece, ...] = ()
    """Its parts, one after the other in its memory; none for a tensor outside of MoELayers."""
    factor: float = 1.0
    """The pieces are multiplied with this on disk."""
    order: Order | None = None
    """How they lie on disk, where that is not as in memory."""
    fill: float | None = None
    """The value of all its elements, for a tensor that only the format requires."""
    must_match: bool = False
    """Whether another value than `fill` would change what the model computes."""
    tied: bool = False
    """Whether it repeats its target, which another slot holds."""
    dtype: torch.dtype | None = None
    """Where it is not that of the folder."""

    @property
    def loaded(self) -> bool:
        """Whether a part of the model has its values from here."""
        return self.fill is None and not self.tied

    def place(self, model: PreTrainedModel) -> tuple[str, Index]:
        """The model's name of the tensor that it is, or is part of, and its place there; a `fill` has none."""
        if self.target is not None:
            return self.target, ()
        (piece,) = self.pieces
        path, moe = _moe_at(model, piece)
        return f"{path}.{piece.name(moe)}", piece.index(moe)

    def view(self, model: PreTrainedModel, bring: Bring = here) -> Tensor:
        """The part of the model that this tensor is; a `fill` is none."""
        name, index = self.place(model)
        return bring(attrgetter(name)(model), index)

    # -- a tensor's factor, order and constant, both ways; applied nowhere else --

    def to_disk(self, tensor: Tensor) -> Tensor:
        """Convert a part of the model to the layout on disk."""
        if self.order is not None:
            tensor = self.order.to_disk(tensor)
        return tensor if self.factor == 1.0 else tensor * self.factor

    def from_disk(self, tensor: Tensor) -> Tensor:
        """Convert a stored tensor to the model's layout."""
        if self.factor != 1.0:
            tensor = tensor / self.factor
        return tensor if self.order is None else self.order.from_disk(tensor)

    def constant(self, dtype: torch.dtype) -> Tensor:
        """The tensor on disk where no part of the model is it."""
        assert self.fill is not None
        return torch.full(self.shape, self.fill, dtype=dtype)

    def contradicts(self, tensor: Tensor) -> bool:
        """Whether a tensor on disk asks for something that a model with this constant does not compute."""
        return self.fill is not None and self.must_match and not bool(tensor.eq(self.fill).all())

    def stored(self, model: PreTrainedModel, dtype: torch.dtype, bring: Bring = here) -> Tensor:
        """The tensor on disk of this model."""
        if self.fill is not None:
            return self.constant(dtype)
        return self.to_disk(self.view(model, bring).detach().to(dtype))

    def read(self, source: TensorSource, index: Slices | None = None) -> Tensor:
        """The part of the model, from a source; with `index`, all its dims named by slices, a part of that."""
        if index is None or self.order is None:
            return self.from_disk(source.read(self, index))
        return self.from_disk(source.read(self, index[:1]))[(slice(None), *index[1:])]


def _moe_at(model: PreTrainedModel, piece: Piece) -> tuple[str, MoELayer]:
    path = moe_path(family_of(model.config).places(model.config)[piece.layer])
    moe = model.get_submodule(path)
    assert isinstance(moe, MoELayer)
    return path, moe


def tensors_of(moe: MoELayer) -> dict[str, Tensor]:
    """The parameters and buffers of a layer by their names in it."""
    return dict(moe.named_parameters()) | dict(moe.named_buffers())


def state_tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Parameters, tied ones once, and the buffers that belong to a model's state."""
    yield from model.named_parameters()
    state = model.state_dict()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in state)


def whole_slot(name: str, inside: str, moe: MoELayer, *, place: Place, layer: int, order: Order | None = None) -> Slot:
    """The slot of a whole tensor of a MoELayer, which the layer calls `inside`."""
    tensor = torch.empty(tensors_of(moe)[inside].shape, device="meta")  # whatever part of it is here
    experts = range(moe.config.num_experts) if inside.startswith("experts.") else (-1,)
    return Slot(
        name=name,
        shape=tuple((tensor if order is None else order.to_disk(tensor)).shape),
        target=f"{moe_path(place)}.{inside}",
        pieces=tuple(Piece(part=part, layer=layer, expert=expert) for expert in experts for part in PARTS[inside]),
        order=order,
        dtype=torch.float32 if inside in FLOAT32 else None,
    )


def stored_dtype(model: PreTrainedModel) -> torch.dtype:
    """The dtype that a model is written in: its parameters', and where those differ the narrowest that holds all."""
    return reduce(torch.promote_types, {parameter.dtype for parameter in model.parameters()})
