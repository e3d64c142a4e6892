"""The sizes of a transformers model, and the config of the model that it grows into."""

from typing import Any

import torch
from transformers import PreTrainedConfig

from moewright.errors import ModelError, UsageError
from moewright.family.config import backbone_config, dense_fields
from moewright.family.table import family_of
from moewright.grow.config import DEPTHS, Sizes
from moewright.grow.maps import layer_map


def sizes_of(config: PreTrainedConfig) -> Sizes:
    """The sizes that growth changes; `ModelError` where encoder and decoder have different ones."""
    stacks = family_of(config).stacks
    sizes = {tuple(getattr(config, name) for name in (stack.size, stack.count, stack.heads)) for stack in stacks}
    if len(sizes) > 1:
        raise ModelError(
            f"encoder and decoder of this {config.model_type} model differ in layers, heads or feed-forward width; "
            "growing such a model is not supported yet"
        )
    intermediate_size, layers, heads = sizes.pop()
    return Sizes(
        hidden_size=config.hidden_size,
        intermediate_size=intermediate_size,
        layers=layers,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
    )


def grown_config(config: PreTrainedConfig, sizes: Sizes, *, depth: str, dtype: torch.dtype) -> PreTrainedConfig:
    """The config with other sizes; a layer keeps the kind of attention of the layer that it copies.

    `UsageError` if that is a pattern which readers who know no `layer_types` would not be told.
    """
    fields = _grown_fields(config, sizes, depth=depth, dtype=dtype)
    if sizes.layers > sizes_of(config).layers and not _is_told(fields):
        other = next(name for name in DEPTHS if name != depth)
        told = _is_told(_grown_fields(config, sizes, depth=other, dtype=dtype))
        raise UsageError(
            f"depth={depth} with layers={sizes.layers}, of a model that mixes full and sliding attention: not every "
            "runtime can be told which of the layers slide; "
            + (f"use depth={other}" if told else "grow hidden_size or intermediate_size instead")
        )
    return backbone_config(fields)


def _grown_fields(config: PreTrainedConfig, sizes: Sizes, *, depth: str, dtype: torch.dtype) -> dict[str, Any]:
    fields = dense_fields(config, dtype=dtype) | {
        config.attribute_map.get("hidden_size", "hidden_size"): sizes.hidden_size,
        "num_key_value_heads": sizes.kv_heads,
    }
    for stack in family_of(config).stacks:
        fields |= {stack.size: sizes.intermediate_size, stack.count: sizes.layers, stack.heads: sizes.heads}
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        fields["layer_types"] = [kinds[layer] for layer in layer_map(len(kinds), sizes.layers, depth=depth)]
        if "sliding_attention" in kinds:  # how readers that know no layer_types are told the same
            fields["max_window_layers"] = fields["layer_types"].index("sliding_attention")
    return fields


def _is_told(fields: dict[str, Any]) -> bool:
    """Whether the other fields say which layers slide, or the family's own pattern does."""
    guessed = backbone_config({name: value for name, value in fields.items() if name != "layer_types"})
    return getattr(guessed, "layer_types", None) == fields.get("layer_types")
