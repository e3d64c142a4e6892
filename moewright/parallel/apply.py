"""Putting a model on several ranks, from outside, in one order: slice the dense parts, divide the experts, shard."""

from dataclasses import dataclass, field
from typing import Final

from torch import nn
from transformers import PreTrainedModel

from moewright.backbone.blocks import moe_configs, moe_layers
from moewright.errors import UsageError
from moewright.family.table import family_of
from moewright.parallel.config import Degrees, ParallelConfig, resolve
from moewright.parallel.experts import divide_experts
from moewright.parallel.mesh import Meshes
from moewright.parallel.offload import Offload
from moewright.parallel.ranks import Ranks
from moewright.parallel.shard import reduce_gradients_at_the_end, reshard, shard
from moewright.parallel.tensor import slice_dense, sliced_sizes

NOTHING: Final = Offload()
"""Everything on the device."""


def apply(model: PreTrainedModel, meshes: Meshes, *, offload: Offload = NOTHING) -> None:
    """Put `model` on the ranks of `meshes`; every rank calls it, and the model is changed in place.

    1. Dense parts: each rank of the axis `tp` keeps its slice.
    2. Experts: each rank keeps its own of the axis `ep`, and of `etp` its slice of them; the layers' exchange becomes
       an all-to-all. Ranks of one `tp` group have the same tokens, of which each sends its share.
    3. Sharding: the experts on the other axes of their mesh, the blocks and what is outside of them on the dense mesh.

    Recomputation is turned on before, by `recompute`. The model may be a skeleton on meta, which `fill` with
    `parts.boxes_of` and `parts.with_part` then gives each rank's part; or a live one, on its device and the same on all
    ranks, of which each rank keeps its part. Afterwards parameters are DTensors, and gradients are sums over all ranks:
    the loss must be divided by the targets of all. Make the optimiser after this.

    What `offload` has outside of the device comes there for each pass of a block. It is put outside by `fill` with
    `offload.with_part(model)` in place of `parts.with_part`, or of a live model by `offload.put(model)`.

    Raises UsageError for a layer whose experts `ep` does not divide, or whose width `etp` does not, and for what
    `tensor.slice_dense` refuses.
    """
    layers = moe_layers(model)
    for number, layer in layers.items():
        sizes = {"ep": (layer.config.num_experts, "experts"), "etp": (layer.config.expert_size, "units an expert")}
        for name, (size, what) in sizes.items():
            if size % (degree := getattr(meshes.degrees, name)):
                raise UsageError(f"{name}={degree}: layer {number} has {size} {what}; choose a divisor")
    slice_dense(model, meshes.dense["tp"])
    for layer in layers.values():
        divide_experts(layer, meshes)
    places = family_of(model.config).places(model.config)
    blocks = [model.get_submodule(place.layer) for place in places]
    shard(model, blocks, layers.values(), meshes, offload=offload)


def degrees_for(model: PreTrainedModel, config: ParallelConfig | None, *, ranks: int) -> Degrees:
    """The degrees that the settings, or E+D without them, give this model on so many ranks.

    Raises UsageError, with the choices that there are, for degrees that do not divide the ranks, the experts, their
    width, or what tensor slicing divides.
    """
    layers = moe_configs(model)
    return resolve(
        config,
        ranks=ranks,
        experts=[layer.num_experts for layer in layers.values()],
        widths=[layer.expert_size for layer in layers.values()],
        sliced=sliced_sizes(model.config, layers),
    )


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """How a run is parallel: its ranks and their degrees; by default one process. UsageError if they do not agree."""

    ranks: Ranks = field(default_factory=Ranks)
    degrees: Degrees = field(default_factory=Degrees)
    offload: Offload = NOTHING

    def __post_init__(self) -> None:
        if (self.ranks.size, self.ranks.tp) != (self.degrees.ranks, self.degrees.tp):
            raise UsageError(
                f"{self.ranks.size} ranks with tp={self.ranks.tp}, and degrees of {self.degrees.ranks} with "
                f"tp={self.degrees.tp}: give dataclasses.replace(ranks, tp=degrees.tp)"
            )

    def begin_backward(self, model: nn.Module, *, last: bool) -> None:
        """Before a micro-batch's backward pass: gradients are reduced in the `last`, or from stage 2 on in each."""
        reduce_gradients_at_the_end(model, last=last or self.degrees.zero >= 2)

    def end_evaluation(self, model: nn.Module) -> None:
        """After forward passes that no backward pass follows."""
        reshard(model)


ALONE: Final = Parallel()
"""One process."""
