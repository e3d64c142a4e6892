"""Put a MoELayer where a feed-forward block is, take it out again, find it there, and pass the token mask to it.

Nothing here knows of folders; `graft.py` adds how transformers saves and loads such a model.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from transformers import PreTrainedModel

from moewright.errors import UsageError
from moewright.family.row import Place
from moewright.family.table import family_of
from moewright.moe.config import MoEConfig
from moewright.moe.context import RoutingContext
from moewright.moe.layer import MoELayer
from moewright.moe.step import RoutingStep

HOOKS: Final = "_moewright_hooks"
"""Where a model with MoELayers keeps the handles of its hooks."""


def put_in(model: PreTrainedModel, layers: Mapping[int, MoEConfig]) -> dict[int, nn.Module]:
    """Replace the feed-forward block of each given layer by a MoELayer, and return the blocks taken out.

    The new layers have the device and dtype of the old blocks and random weights. From now on the
    model's forward takes the keyword `token_mask`, (B, S) bool, True for a real token; without it a
    2-D `attention_mask` says which tokens are real, and without that all are. An encoder and a decoder go by
    the masks of their own, `attention_mask` and `decoder_attention_mask`.

    Raises `UsageError` for a layer that the model does not have and for a config that makes no sense there, as one
    whose experts choose in a decoder, and `ModelError` for a model of no family that we know. Nothing is changed then.
    """
    places, contexts = family_of(model.config).places(model.config), _contexts(model)
    taken: dict[int, nn.Module] = {}
    for layer, config in _placed(layers, places, model.config.hidden_size).items():
        place = places[layer]
        context = contexts.setdefault(place.stack.name, RoutingContext())
        like = next(_block(model, place).parameters())
        moe = MoELayer(config, context=context, device=like.device, dtype=like.dtype)
        moe.train(model.get_submodule(place.layer).training)
        taken[layer] = _put(model, place, moe)
    if taken and HOOKS not in model.__dict__:
        # On the models inside, which wrappers and generation call too, and which get every mask by keyword.
        inner = (model.get_encoder(), model.get_decoder()) if family_of(model.config).seq2seq else (model.base_model,)
        hooks = [module.register_forward_pre_hook(_record_token_mask, with_kwargs=True) for module in inner]
        model.__dict__[HOOKS] = hooks
    return taken


def take_out(model: PreTrainedModel, blocks: Mapping[int, nn.Module]) -> dict[int, MoELayer]:
    """Put the blocks that `put_in` returned back, and return the MoELayers; with the last of them go the hooks."""
    places, sparse = family_of(model.config).places(model.config), moe_layers(model)
    for layer, block in blocks.items():
        place = places[layer]
        if place.stack.block:
            model.set_submodule(place.path(""), block)
        else:
            assert isinstance(block, Inline)
            block.put_back(model.get_submodule(place.layer))
    if not moe_layers(model):
        for handle in model.__dict__.pop(HOOKS):
            handle.remove()
    return {layer: sparse[layer] for layer in blocks}


class Paired(nn.Module):
    """A MoELayer for a layer whose block returns its router's scores besides, which nobody reads."""

    def __init__(self, moe: MoELayer) -> None:
        super().__init__()
        self.moe = moe

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, None]:
        return self.moe(hidden_states), None


class Inline(nn.Module):
    """A block whose projections stand in the layer itself: what the layer's forward calls between two norms.

    The layer computes `fc2(dropout(activation_fn(fc1(x))))`. A MoELayer takes the place of the first projection, and
    nothing is left to do for the others.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.fc1, self.fc2 = layer.fc1, layer.fc2
        self.activation_fn, self.activation_dropout = layer.activation_fn, layer.activation_dropout

    def replace_by(self, moe: MoELayer, layer: Any) -> None:
        layer.fc1, layer.fc2, layer.activation_fn = moe, nn.Identity(), nn.Identity()
        layer.activation_dropout = 0.0

    def put_back(self, layer: Any) -> None:
        layer.fc1, layer.fc2, layer.activation_fn = self.fc1, self.fc2, self.activation_fn
        layer.activation_dropout = self.activation_dropout

    def forward(self, x: Tensor) -> Tensor:
        """The block's output in evaluation."""
        y: Tensor = self.fc2(self.activation_fn(self.fc1(x)))
        return y


def moe_path(place: Place) -> str:
    """Path of the module that is, or would be, a layer's MoELayer."""
    if not place.stack.block:
        return f"{place.layer}.fc1"
    return place.path("moe" if place.stack.paired else "")


def moe_layers(model: PreTrainedModel) -> dict[int, MoELayer]:
    """The MoELayers of a model by layer number; empty for a dense model."""
    places = family_of(model.config).places(model.config)
    modules = ((layer, _block(model, place)) for layer, place in enumerate(places))
    return {layer: module for layer, module in modules if isinstance(module, MoELayer)}


def _block(model: PreTrainedModel, place: Place) -> nn.Module:
    block = model.get_submodule(place.path("") if place.stack.block else moe_path(place))
    return block.moe if isinstance(block, Paired) else block


def moe_configs(model: PreTrainedModel) -> dict[int, MoEConfig]:
    """Their configs; empty for a dense model."""
    return {layer: moe.config for layer, moe in moe_layers(model).items()}


def routing_contexts(model: PreTrainedModel) -> tuple[RoutingContext, ...]:
    """The records that the MoELayers share, one for each stack that has such layers: none for a dense model."""
    return tuple(_contexts(model).values())


def routing_step(model: PreTrainedModel, group: ProcessGroup | None = None, *, copies: int = 1) -> RoutingStep:
    """The protocol of a training step for all MoELayers of a model; without any it does nothing."""
    places, layers = family_of(model.config).places(model.config), moe_layers(model)
    stacks = {
        name: (context, [moe for layer, moe in layers.items() if places[layer].stack.name == name])
        for name, context in _contexts(model).items()
    }
    return RoutingStep(stacks, group=group, copies=copies)


def configure(model: PreTrainedModel, **settings: Any) -> None:
    """Change fields of every MoELayer's config, such as the coefficients of its losses; its parameters stay."""
    for layer in moe_layers(model).values():
        layer.configure(replace(layer.config, **settings))


def _contexts(model: PreTrainedModel) -> dict[str, RoutingContext]:
    places = family_of(model.config).places(model.config)
    return {places[layer].stack.name: moe.context for layer, moe in moe_layers(model).items()}


def _placed(layers: Mapping[int, MoEConfig], places: list[Place], hidden_size: int) -> dict[int, MoEConfig]:
    """Each layer's config as it is in its place; `UsageError` if it cannot be there."""
    placed = {}
    for layer, config in layers.items():
        if layer not in range(len(places)):
            raise UsageError(f"layer {layer!r}: this model has the layers 0 to {len(places) - 1}")
        if config.hidden_size != hidden_size:
            raise UsageError(f"hidden_size={config.hidden_size} of layer {layer}: this model has {hidden_size}")
        placed[layer] = replace(config, causal=places[layer].stack.causal)
    return placed


def _put(model: PreTrainedModel, place: Place, moe: MoELayer) -> nn.Module:
    if place.stack.block:
        block = model.get_submodule(place.path(""))
        model.set_submodule(place.path(""), Paired(moe) if place.stack.paired else moe)
        return block
    layer = model.get_submodule(place.layer)
    inline = Inline(layer)
    inline.replace_by(moe, layer)
    return inline


def _context_in(module: nn.Module) -> RoutingContext | None:
    return next((inner.context for inner in module.modules() if isinstance(inner, MoELayer)), None)


def _record_token_mask(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook: a transformers block calls `mlp(hidden_states)` and passes no mask, so the mask goes by here.

    The record is looked up at each call, not bound, so that a deep copy of the model has its own.
    """
    context = _context_in(model)
    mask: Tensor | None = kwargs.pop("token_mask", None)
    if context is None:  # a stack without sparse layers
        return args, kwargs
    if mask is None:
        attention_mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        inputs = (args[0] if args else None, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        tokens = next((tensor for tensor in inputs if tensor is not None), None)
        if tokens is not None and isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
            mask = attention_mask[:, -tokens.shape[1] :]  # with a cache, the mask also covers what the cache holds
    context.token_mask = None if mask is None else mask.reshape(-1).to(torch.bool)
    return args, kwargs
