"""The sizes of a model that its memory and its time follow from.

Letters: D model width, F expert width, E experts, K experts a token, S tokens of a row, V vocabulary.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from moewright.backbone.blocks import moe_layers
from moewright.backbone.sizes import parameter_counts
from moewright.family.table import family_of
from moewright.moe.config import MoEConfig
from moewright.parallel.tensor import sliced_sizes


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Numbers of parameters, and what divides them."""

    total: int
    active: int
    """That a token uses."""
    multiplied: int
    """That a token is multiplied with."""
    experts: int
    """Of all routed experts."""
    block: int
    """The dense parts of the largest block."""
    outside: int
    """Embeddings, head and last norm, which make up one group of `fully_shard`."""
    expert_block: int
    """The experts of the layer that has most."""
    layers: int
    hidden: int
    vocabulary: int
    attention: int
    """Heads times their width."""
    sparse: tuple[MoEConfig, ...]
    """The layers with experts."""
    divisors: Mapping[str, int]
    """What `tp` must divide, by name."""

    @property
    def dense(self) -> int:
        """All parameters but those of routed experts."""
        return self.total - self.experts

    @property
    def most_experts(self) -> int:
        """The largest number of ranks that `ep` can be."""
        return math.gcd(*(layer.num_experts for layer in self.sparse))

    @property
    def widths(self) -> int:
        """What `etp` must divide."""
        return math.gcd(*(layer.expert_size for layer in self.sparse))


def sizes_of(model: PreTrainedModel) -> Sizes:
    """The sizes of a model, on any device."""
    layers, config = moe_layers(model), model.config
    counts = parameter_counts(model)
    experts = [_count(layer.experts) for layer in layers.values()]
    places = family_of(config).places(config)
    blocks = [_count(model.get_submodule(place.layer)) for place in places]
    inside = sum(blocks)
    for number, layer in zip(layers, experts, strict=True):
        blocks[number] -= layer
    heads, each = getattr(config, "num_attention_heads", 0), getattr(config, "head_dim", None)
    return Sizes(
        total=counts.total,
        active=counts.active,
        multiplied=counts.multiplied,
        experts=sum(experts),
        block=max(blocks),
        outside=counts.total - inside,
        expert_block=max(experts, default=0),
        layers=len(places),
        hidden=config.hidden_size,
        vocabulary=config.vocab_size,
        attention=heads * each if each else config.hidden_size,
        sparse=tuple(layer.config for layer in layers.values()),
        divisors=sliced_sizes(config, {number: layer.config for number, layer in layers.items()}),
    )


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def facts_of(sizes: Sizes) -> dict[str, Any]:
    """For people: in plain types."""
    return {
        "parameters": sizes.total,
        "active": sizes.active,
        "dense": sizes.dense,
        "experts": sizes.experts,
        "layers": sizes.layers,
        "sparse_layers": len(sizes.sparse),
    }
