"""The tensors of a folder as views of a model: said once, used to read and to write.

Each tensor on disk is a `Slot`: a parameter or buffer of the model as it is, one or several pieces of a MoELayer (a
router, one projection of one expert, all of a stack), or something that only the layout demands (an output embedding
written out although it is tied, biases and a shared expert that are zero).
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Final

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moewright.backbone.graft import moe_layers, moe_path
from moewright.backbone.skeleton import embedding_of, has_tied_head
from moewright.family.table import Place, family_of
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

FLOAT32: Final = ("router.bias", "balance_coefficient", "previous_counts")
"""Those that are float32 whatever the model's dtype, in memory and on disk."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One part of one layer, and of one expert where experts have it."""

    part: str
    layer: int
    expert: int = -1

    def name(self, moe: MoELayer) -> str:
        """What the layer calls the tensor that holds it."""
        held = dict(moe.named_parameters()) | dict(moe.named_buffers())
        return next(name for name, parts in PARTS.items() if self.part in parts and name in held)

    def view(self, moe: MoELayer) -> Tensor:
        """It, in the layer's own memory."""
        held = dict(moe.named_parameters()) | dict(moe.named_buffers())
        parts = PARTS[name := self.name(moe)]
        tensor = held[name][self.expert] if self.expert >= 0 else held[name]
        return tensor.chunk(len(parts))[parts.index(self.part)]


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One tensor of a folder."""

    name: str
    """Its name on disk."""
    shape: tuple[int, ...]
    target: str | None = None
    """Name of the parameter or buffer of the model that it is, where it is one as a whole."""
    pieces: tuple[Piece, ...] = ()
    """What it consists of, one after the other in its memory; none for what is not of a MoELayer."""
    factor: float = 1.0
    """What the pieces are multiplied with on disk."""
    fill: float | None = None
    """The value of all its elements, for what no part of the model is."""
    must_match: bool = False
    """Whether another value than `fill` would change what the model computes."""
    tied: bool = False
    """Whether it repeats its target, which another slot holds."""
    dtype: torch.dtype | None = None
    """Where it is not that of the folder."""

    def view(self, model: PreTrainedModel) -> Tensor:
        """The part of the model that this tensor is; what has a `fill` is none."""
        if self.target is not None:
            tensor: Tensor = attrgetter(self.target)(model)
            return tensor
        (piece,) = self.pieces
        return piece.view(_moe_at(model, piece)[1])

    def name_in_memory(self, model: PreTrainedModel) -> str:
        """Name of the model's tensor that `view` is, or is part of."""
        if self.target is not None:
            return self.target
        (piece,) = self.pieces
        path, moe = _moe_at(model, piece)
        return f"{path}.{piece.name(moe)}"


def _moe_at(model: PreTrainedModel, piece: Piece) -> tuple[str, MoELayer]:
    path = moe_path(family_of(model.config).places(model.config)[piece.layer])
    moe = model.get_submodule(path)
    assert isinstance(moe, MoELayer)
    return path, moe


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a sparse architecture calls its tensors."""

    parts: Mapping[str, str]
    """Names on disk by what they are, with {layer} for the path of the layer and {expert}: a part of each expert or of
    the layer, or a tensor of PARTS as a whole."""
    renames: tuple[tuple[str, str], ...] = ()
    """Regular expressions and their replacements, from our names of all other tensors to those on disk."""
    unties: bool = True
    """Whether a tied output embedding is written out, as some runtimes demand."""

    def keeps_float32(self, name: str) -> bool:
        """Whether a tensor on disk is float32 whatever the dtype of the folder."""
        ends = tuple(self.parts[part].removeprefix("{layer}") for part in FLOAT32 if part in self.parts)
        return name.endswith(ends)

    def renamed(self, name: str) -> str:
        """The name on disk of a tensor that is not of a MoELayer, or of a layer's path."""
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name)
        return name


def slots(model: PreTrainedModel, layout: Layout | None) -> list[Slot]:
    """Every tensor of the folder that this model is written to, in the order of writing.

    Without a `layout` the names are the model's own: a dense folder, or one of our own model type.
    """
    family, sparse = family_of(model.config), moe_layers(model)
    places = family.places(model.config)
    paths = {f"{moe_path(places[layer])}.": layer for layer in sparse}
    found: list[Slot] = []
    for name, tensor in _tensors(model):
        path = next((path for path in paths if name.startswith(path)), None)
        if path is None:
            on_disk = family.on_disk(name) if layout is None else layout.renamed(name)
            found.append(Slot(name=on_disk, shape=tuple(tensor.shape), target=name))
        elif layout is None:
            found.append(_own(name, tensor, places[paths[path]], sparse[paths[path]], layer=paths[path]))
    if layout is None:
        return found
    if layout.unties and has_tied_head(model):
        shape = tuple(embedding_of(model).shape)
        found.append(Slot(name=layout.renamed(family.head), shape=shape, target=family.embedding, tied=True))
    for layer, moe in sparse.items():
        found += _named(moe, layout, place=places[layer], layer=layer)
    return found


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Parameters, tied ones once, and the buffers that belong to a model's state."""
    yield from model.named_parameters()
    state = model.state_dict()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in state)


def own_name(place: Place, inside: str) -> str:
    """What our own type calls a tensor of a MoELayer; where a layer has no module for it, below `moe`."""
    return f"{moe_path(place) if place.stack.block else f'{place.layer}.moe'}.{inside}"


def _own(name: str, tensor: Tensor, place: Place, moe: MoELayer, *, layer: int) -> Slot:
    """A tensor of a MoELayer as our own type holds it."""
    inside = name.removeprefix(f"{moe_path(place)}.")
    on_disk = own_name(place, inside)
    pieces = _pieces(inside, moe, layer=layer)
    return Slot(name=on_disk, shape=tuple(tensor.shape), target=name, pieces=pieces, dtype=_dtype(inside))


def _dtype(inside: str) -> torch.dtype | None:
    """The dtype on disk of a tensor of a MoELayer, where it is not that of the folder."""
    return torch.float32 if inside in FLOAT32 else None


def _pieces(inside: str, moe: MoELayer, *, layer: int) -> tuple[Piece, ...]:
    """What a tensor of a MoELayer consists of, in the order of its memory."""
    experts = range(moe.config.num_experts) if inside.startswith("experts.") else (-1,)
    return tuple(Piece(part=part, layer=layer, expert=expert) for expert in experts for part in PARTS[inside])


def _named(moe: MoELayer, layout: Layout, *, place: Place, layer: int) -> list[Slot]:
    """The tensors of a MoELayer by the names of a layout: what is of all experts, then one expert after the other."""
    path, found = layout.renamed(place.layer), []
    whole = dict(moe.named_parameters()) | dict(moe.named_buffers())
    for inside, template in layout.parts.items():
        if inside in whole:
            target, pieces = f"{moe_path(place)}.{inside}", _pieces(inside, moe, layer=layer)
            name, shape = template.format(layer=path), tuple(whole[inside].shape)
            found.append(Slot(name=name, shape=shape, target=target, pieces=pieces, dtype=_dtype(inside)))
    single = {part: template for part, template in layout.parts.items() if part not in PARTS}
    held = {part for inside in whole if inside in PARTS for part in PARTS[inside]}
    for expert in range(moe.config.num_experts):
        for part, template in single.items():
            of_expert = "{expert}" in template
            if part in held and (of_expert or expert == 0):
                piece = Piece(part=part, layer=layer, expert=expert if of_expert else -1)
                name = template.format(layer=path, expert=expert)
                found.append(Slot(name=name, shape=tuple(piece.view(moe).shape), pieces=(piece,)))
    return found
