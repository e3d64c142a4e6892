"""The tensors of the grown model, each made of one or two of the source's on request, and the memory for that."""

import math
import re
from dataclasses import replace

from torch import Tensor

from moewright.backbone.slots import Slices, Slot
from moewright.convert.conversion import TensorMaker
from moewright.errors import ModelError
from moewright.family.axes import Axes
from moewright.grow.maps import grow_tensor
from moewright.grow.plan import GrowPlan


class GrownTensors(TensorMaker):
    """The tensors of a plan's grown model; `ModelError` if there is one of which no rule says how it grows."""

    def __init__(self, plan: GrowPlan) -> None:
        self.plan = plan
        self.slots = plan.format.slots(plan.model)
        for slot in self.slots:
            self._origin(slot.name)

    def read(self, slot: Slot, index: Slices | None = None) -> Tensor:
        """The tensor of a slot, in the dtype to be written; a part is cut from the whole, which is made first."""
        plan = self.plan
        axes, own, above = self._origin(slot.name)
        tensor = grow_tensor(
            plan.folder.read(own),
            None if above is None else plan.folder.read(above),
            axes=axes,
            maps=plan.maps,
            tied=plan.tied,
            dtype=plan.dtype,
            divisor=self._divisor(slot.name, axes),
            offset=plan.family.norm_offset if axes.feeds_head and slot.name.endswith(".weight") else 0.0,
        )
        return tensor[index or ()]

    def memory_needed(self) -> int:
        """Bytes held at a time while writing."""
        needed = 0
        for slot in self.slots:
            _, own, above = self._origin(slot.name)
            info = self.plan.folder.tensors[own]
            read = (info.end - info.start) * (1 if above is None else 2)
            made = math.prod(slot.shape) * self.plan.dtype.itemsize
            needed = max(needed, 3 * read + 2 * made)  # as read, joined, divided; one dim grown, both grown
        return needed

    def _origin(self, name: str) -> tuple[Axes, str, str | None]:
        """The axes of a tensor, the source tensor that it copies, and the one a layer above from which AKI takes."""
        plan = self.plan
        number = re.search(r"\.(\d+)\.", name)
        template = name if number is None else name.replace(number[0], ".{layer}.", 1)
        axes = plan.growth.axes.get(template)
        if axes is None:
            raise ModelError(f"{plan.folder.path}: no rule says how {name} grows; please report this model")
        if number is None:
            return axes, name, None
        layer = plan.source_layers[int(number[1])]
        if axes.feeds_head and int(number[1]) + 1 < plan.sizes.layers:
            axes = replace(axes, feeds_head=False)  # it feeds the next layer
        takes = plan.config.width == "aki" and axes.outputs is not None and axes.dims[axes.outputs] in plan.maps
        above = template.format(layer=layer + 1) if takes and layer + 1 < plan.source_sizes.layers else None
        return axes, template.format(layer=layer), above

    def _divisor(self, name: str, axes: Axes) -> float:
        """The divisor of a tensor that makes up for a model that multiplies or divides with the root of its width."""
        plan, config = self.plan, self.plan.dense.config
        root = math.sqrt(plan.sizes.hidden_size / plan.source_sizes.hidden_size)
        embeds = plan.growth.scales_embedding(config)
        if axes.embeds:
            return root if embeds else 1.0
        if not (axes.feeds_head if plan.tied else name == plan.family.on_disk(plan.family.head)):
            return 1.0
        # A tied output embedding was divided as the table that it is.
        return root ** -(plan.growth.scales_output(config) + (embeds and plan.tied))
