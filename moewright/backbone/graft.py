"""Put a MoELayer where a feed-forward block is, take it out again, and hand it the token mask."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moewright.backbone.family import family_of
from moewright.errors import ModelError
from moewright.moe.config import MoEConfig
from moewright.moe.context import RoutingContext
from moewright.moe.layer import MoELayer

HOOK = "_moewright_hook"
"""Where a grafted model keeps the handle of its pre-hook."""


def graft(model: PreTrainedModel, layers: Mapping[int, MoEConfig]) -> dict[int, nn.Module]:
    """Replace the feed-forward block of each given layer by a MoELayer, and return the blocks taken out.

    The new layers have the device and dtype of the old blocks and random weights. From now on the
    model's forward takes the keyword `token_mask`, (B, S) bool, True for a real token; without it a
    2-D `attention_mask` says which tokens are real, and without that all are.
    """
    family, context = family_of(model.config), routing_context(model) or RoutingContext()
    taken: dict[int, nn.Module] = {}
    for layer, config in layers.items():
        path = family.feed_forward.format(layer=layer)
        block = model.get_submodule(path)
        like = next(block.parameters())
        grafted = MoELayer(config, context=context, device=like.device, dtype=like.dtype)
        grafted.train(block.training)
        model.set_submodule(path, grafted)
        taken[layer] = block
    if taken and HOOK not in model.__dict__:
        # On the model inside, which wrappers and generation call too, and which gets every mask by keyword.
        model.__dict__[HOOK] = model.base_model.register_forward_pre_hook(_record_token_mask, with_kwargs=True)
        model.__dict__["save_pretrained"] = _refuse_to_save
    return taken


def ungraft(model: PreTrainedModel, blocks: Mapping[int, nn.Module]) -> dict[int, MoELayer]:
    """Put the blocks that `graft` returned back, and return the MoELayers taken out."""
    family, grafted = family_of(model.config), moe_layers(model)
    for layer, block in blocks.items():
        model.set_submodule(family.feed_forward.format(layer=layer), block)
    if not moe_layers(model):
        model.__dict__.pop(HOOK).remove()
        del model.__dict__["save_pretrained"]
    return {layer: grafted[layer] for layer in blocks}


def moe_layers(model: PreTrainedModel) -> dict[int, MoELayer]:
    """The MoELayers of a model by layer number; empty for a dense model."""
    family = family_of(model.config)
    modules = ((layer, model.get_submodule(family.feed_forward.format(layer=layer))) for layer in layer_numbers(model))
    return {layer: module for layer, module in modules if isinstance(module, MoELayer)}


def layer_numbers(model: PreTrainedModel) -> range:
    """Numbers of all decoder layers."""
    return range(model.config.num_hidden_layers)


def routing_context(model: PreTrainedModel) -> RoutingContext | None:
    """The record that all MoELayers of a model share; None for a dense model."""
    return _context_in(model)


def configure(model: PreTrainedModel, **settings: Any) -> None:
    """Change fields of every MoELayer's config, such as the coefficients of its losses; its parameters stay."""
    for layer in moe_layers(model).values():
        layer.configure(replace(layer.config, **settings))


def _context_in(module: nn.Module) -> RoutingContext | None:
    return next((inner.context for inner in module.modules() if isinstance(inner, MoELayer)), None)


def _record_token_mask(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook: a transformers block calls `mlp(hidden_states)` and passes no mask, so the mask goes by here.

    The record is looked up at each call, not bound, so that a deep copy of the model has its own.
    """
    context = _context_in(model)
    assert context is not None, "the hook is removed with the last MoELayer"
    mask: Tensor | None = kwargs.pop("token_mask", None)
    if mask is None:
        attention_mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        inputs = (args[0] if args else None, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        tokens = next((tensor for tensor in inputs if tensor is not None), None)
        if tokens is not None and isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
            mask = attention_mask[:, -tokens.shape[1] :]  # with a cache, the mask also covers what the cache holds
    context.token_mask = None if mask is None else mask.reshape(-1).to(torch.bool)
    return args, kwargs


def _refuse_to_save(*_: Any, **__: Any) -> None:
    """In place of `save_pretrained`, which would write grafted layers under the dense architecture's name."""
    raise ModelError(
        "save_pretrained of a model with MoE layers would write a folder that nothing loads; "
        "use moewright.backbone.folder.save_model"
    )
