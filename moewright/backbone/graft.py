"""Put a MoELayer where a feed-forward block is, take it out again, and hand it the token mask."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from transformers import PreTrainedModel

from moewright.errors import UsageError
from moewright.family.table import Place, family_of
from moewright.moe.config import MoEConfig
from moewright.moe.context import RoutingContext
from moewright.moe.layer import MoELayer
from moewright.moe.step import RoutingStep

HOOKS = "_moewright_hooks"
"""Where a grafted model keeps the handles of its hooks."""


def graft(model: PreTrainedModel, layers: Mapping[int, MoEConfig]) -> dict[int, nn.Module]:
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
        like = next(model.get_submodule(moe_path(place)).parameters())
        grafted = MoELayer(config, context=context, device=like.device, dtype=like.dtype)
        grafted.train(model.get_submodule(place.layer).training)
        taken[layer] = _put(model, place, grafted)
    if taken:
        _listen(model)
    return taken


def ungraft(model: PreTrainedModel, blocks: Mapping[int, nn.Module]) -> dict[int, MoELayer]:
    """Put the blocks that `graft` returned back, and return the MoELayers taken out."""
    places, grafted = family_of(model.config).places(model.config), moe_layers(model)
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
        for module in (model, *_inside(model)):
            module.__class__ = type(module).__mro__[1]
    return {layer: grafted[layer] for layer in blocks}


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
        """What the block computes in evaluation."""
        y: Tensor = self.fc2(self.activation_fn(self.fc1(x)))
        return y


def moe_path(place: Place) -> str:
    """Path of the module that is, or would be, a layer's MoELayer."""
    return place.path("") if place.stack.block else f"{place.layer}.fc1"


def moe_layers(model: PreTrainedModel) -> dict[int, MoELayer]:
    """The MoELayers of a model by layer number; empty for a dense model."""
    places = family_of(model.config).places(model.config)
    modules = ((layer, model.get_submodule(moe_path(place))) for layer, place in enumerate(places))
    return {layer: module for layer, module in modules if isinstance(module, MoELayer)}


def routing_contexts(model: PreTrainedModel) -> tuple[RoutingContext, ...]:
    """The records that the MoELayers share, one for each stack that has such layers: none for a dense model."""
    return tuple(_contexts(model).values())


def routing_step(model: PreTrainedModel, group: ProcessGroup | None = None) -> RoutingStep:
    """The protocol of a training step for all MoELayers of a model; without any it does nothing."""
    places, layers = family_of(model.config).places(model.config), moe_layers(model)
    stacks = {
        name: (context, [moe for layer, moe in layers.items() if places[layer].stack.name == name])
        for name, context in _contexts(model).items()
    }
    return RoutingStep(stacks, group=group)


def configure(model: PreTrainedModel, **settings: Any) -> None:
    """Change fields of every MoELayer's config, such as the coefficients of its losses; its parameters stay."""
    for layer in moe_layers(model).values():
        layer.configure(replace(layer.config, **settings))


def _contexts(model: PreTrainedModel) -> dict[str, RoutingContext]:
    places = family_of(model.config).places(model.config)
    return {places[layer].stack.name: moe.context for layer, moe in moe_layers(model).items()}


def _placed(layers: Mapping[int, MoEConfig], places: list[Place], hidden_size: int) -> dict[int, MoEConfig]:
    """Each layer's config as it is in its place; `UsageError` if it cannot be there."""
    found = {}
    for layer, config in layers.items():
        if layer not in range(len(places)):
            raise UsageError(f"layer {layer!r}: this model has the layers 0 to {len(places) - 1}")
        if config.hidden_size != hidden_size:
            raise UsageError(f"hidden_size={config.hidden_size} of layer {layer}: this model has {hidden_size}")
        found[layer] = replace(config, causal=places[layer].stack.causal)
    return found


def _put(model: PreTrainedModel, place: Place, moe: MoELayer) -> nn.Module:
    if place.stack.block:
        block = model.get_submodule(place.path(""))
        model.set_submodule(place.path(""), moe)
        return block
    layer = model.get_submodule(place.layer)
    inline = Inline(layer)
    inline.replace_by(moe, layer)
    return inline


def _listen(model: PreTrainedModel) -> None:
    """Install the hooks that take the mask along, and those by which transformers saves and loads the model."""
    if HOOKS in model.__dict__:
        return
    # On the models inside, which wrappers and generation call too, and which get every mask by keyword.
    inner = (model.get_encoder(), model.get_decoder()) if family_of(model.config).seq2seq else (model.base_model,)
    hooks = [module.register_forward_pre_hook(_record_token_mask, with_kwargs=True) for module in inner]
    model.__dict__[HOOKS] = [*hooks, model.register_load_state_dict_pre_hook(_read_names_on_disk)]
    for module, save in ((model, _save), *((inside, _refuse_to_save) for inside in _inside(model))):
        kind: Any = type(module)
        module.__class__ = _saving(kind, save)


def _inside(model: PreTrainedModel) -> list[PreTrainedModel]:
    """The models that a model is made of: the one without a head, and what that has of encoders and decoders."""
    return [module for module in model.modules() if isinstance(module, PreTrainedModel) and module is not model]


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


@cache
def _saving(kind: Any, save: Callable[..., None]) -> type[PreTrainedModel]:
    """The class of a grafted model: the same by name and in all it does, but for `save_pretrained`.

    The class's own would write grafted layers under the dense architecture's name. A function kept by the model itself
    would have to know the model, and such a circle is freed only when the garbage collector comes by.
    """

    def reduce(self: PreTrainedModel, protocol: object) -> tuple[Any, ...]:
        return _blank, (kind, save), self.__dict__

    named = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind,), named | {"save_pretrained": save, "__reduce_ex__": reduce})


def _blank(kind: Any, save: Callable[..., None]) -> PreTrainedModel:
    """A grafted model of this class before it has got its state: how copies and pickles of one begin."""
    saving = _saving(kind, save)
    model: PreTrainedModel = object.__new__(saving)
    return model


def _save(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
    from moewright.backbone.pretrained import save_pretrained  # which grafts

    save_pretrained(self, *args, **kwargs)


def _refuse_to_save(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
    raise UsageError(
        f"save_pretrained: this {type(self).__name__} is a part of a model with MoE layers, "
        "and no folder holds one alone; save the whole model"
    )


def _read_names_on_disk(model: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Pre-hook of `load_state_dict`, with which others load what `save_pretrained` wrote."""
    from moewright.backbone.pretrained import take_names_on_disk

    assert isinstance(model, PreTrainedModel)
    take_names_on_disk(model, state_dict, prefix, *rest)
