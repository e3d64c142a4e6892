"""Putting a model on several ranks, from outside, in one order: divide the experts, then shard everything."""

import math
from dataclasses import dataclass, field
from typing import Final

from torch import nn
from transformers import PreTrainedModel

from moewright.backbone.blocks import moe_layers
from moewright.errors import UsageError
from moewright.family.table import family_of
from moewright.parallel.config import Degrees
from moewright.parallel.experts import divide_experts
from moewright.parallel.mesh import Meshes
from moewright.parallel.ranks import Ranks
from moewright.parallel.shard import reduce_gradients_at_the_end, reshard, shard


def apply(model: PreTrainedModel, meshes: Meshes) -> None:
    """Put `model` on the ranks of `meshes`; every rank calls it, and the model is changed in place.

    1. Experts: each rank of the axis `ep` keeps its own, and the layers' exchange becomes an all-to-all.
    2. Sharding: the experts on the other axes of their mesh, the blocks and what is outside of them on the dense mesh.

    Recomputation is turned on before, through transformers. The model may be a skeleton on meta, which `fill` with
    `parts.boxes_of` and `parts.with_part` then gives each rank's part; or a live one, on its device and the same on all
    ranks, of which each rank keeps its part. Afterwards parameters are DTensors, and gradients are sums over all ranks:
    the loss must be divided by the targets of all. Make the optimiser after this.

    Raises UsageError for a layer whose experts `ep` does not divide.
    """
    layers = moe_layers(model)
    for number, layer in layers.items():
        if layer.config.num_experts % meshes.degrees.ep:
            raise UsageError(
                f"ep={meshes.degrees.ep}: layer {number} has {layer.config.num_experts} experts; choose a divisor"
            )
    for layer in layers.values():
        divide_experts(layer, meshes.experts["ep"])
    places = family_of(model.config).places(model.config)
    shard(model, [model.get_submodule(place.layer) for place in places], layers.values(), meshes)


def sliced_sizes(model: PreTrainedModel) -> dict[str, int]:
    """The sizes that tensor slicing must divide, by what messages call them."""
    names = {
        "attention heads": "num_attention_heads",
        "key-value heads": "num_key_value_heads",
        "units of a dense block": "intermediate_size",
    }
    sizes = {words: getattr(model.config, name, None) for words, name in names.items()}
    shared = (layer.config.shared_size for layer in moe_layers(model).values())
    sizes["units of a shared expert"] = math.gcd(*shared)
    return {words: size for words, size in sizes.items() if size}


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """How a run is parallel: its ranks and their degrees; by default one process."""

    ranks: Ranks = field(default_factory=Ranks)
    degrees: Degrees = field(default_factory=Degrees)

    def begin_backward(self, model: nn.Module, *, last: bool) -> None:
        """Before a micro-batch's backward pass: gradients are reduced in the `last`, or from stage 2 on in each."""
        if self.ranks.size > 1:
            reduce_gradients_at_the_end(model, last=last or self.degrees.zero >= 2)

    def end_evaluation(self, model: nn.Module) -> None:
        """After forward passes that no backward pass follows."""
        if self.ranks.size > 1:
            reshard(model)


ALONE: Final = Parallel()
"""One process."""
