"""The tensors of the sparse model, each made of the dense one's on request, and the memory for that.

A tensor on disk is a `Slot`; where it is of a MoELayer it consists of pieces, one projection of one expert each, and a
piece is made of the part of the dense block that holds its neurons (`methods.py`).
"""

import math
from collections.abc import Hashable, Iterable, Iterator

import torch
from torch import Tensor

from moewright.backbone.sizes import bytes_of, parameter_counts
from moewright.backbone.slots import Piece, Slices, Slot
from moewright.convert.conversion import TensorMaker
from moewright.errors import ModelError
from moewright.upcycle.cluster import activation_features, unit_rows
from moewright.upcycle.measure import Measurements
from moewright.upcycle.methods import expert_part, new_neurons, scaled
from moewright.upcycle.neurons import Held, held_neurons
from moewright.upcycle.plan import UpcyclePlan
from moewright.upcycle.routers import start_router
from moewright.upcycle.scale import Factors, factors


class SparseTensors(TensorMaker):
    """The tensors of a plan's sparse model, given the measurements.

    `factors` are those of the projections of each layer. No tensor depends on another being made before: any part of
    the model can be made alone. Reading raises `ModelError` for a value that float16 cannot hold, and as `ModelFolder`.
    """

    def __init__(self, plan: UpcyclePlan, measured: Measurements) -> None:
        self.plan = plan
        self.measured = measured
        self.factors: dict[int, Factors] = {
            layer: factors(plan.config, moe, weight_sum=measured.weight_sums.get(layer))
            for layer, moe in plan.layers.items()
        }
        self._held: dict[int, Held] = {}

    def read(self, slot: Slot, index: Slices | None = None) -> Tensor:
        """The tensor of a slot, or the part `index` of it: of a stack of experts only those inside are made."""
        if not slot.pieces:
            return self._without_pieces(slot, index)
        index = index or ()
        pieces, shape = slot.pieces, slot.shape
        if len({piece.expert for piece in pieces}) > 1:  # a stack, whose first dim counts experts
            each = len(pieces) // shape[0]
            experts = range(shape[0])[index[0] if index else slice(None)]
            pieces, shape = pieces[experts.start * each : experts.stop * each], (len(experts), *shape[1:])
            index = (slice(None), *index[1:])
        made = [piece.flatten() for piece in self._made(slot, pieces)]
        return (made[0] if len(made) == 1 else torch.cat(made)).view(shape)[index]

    def pieces(self, slot: Slot) -> Iterator[Tensor]:
        """The tensor of a slot a piece at a time."""
        return self._made(slot, slot.pieces) if slot.pieces else iter([self._without_pieces(slot)])

    def keys(self, slot: Slot) -> tuple[Hashable, ...]:
        """Equal for the copies of an expert, and for a tied head and its table."""
        if not slot.pieces:
            return (slot.target,) if len(slot.shape) <= 2 else ()
        count = len(slot.pieces) // (slot.shape[0] if len(slot.shape) > 2 else 1)
        keys = [self._key(piece) for piece in slot.pieces]
        leaves = [keys[at : at + count] for at in range(0, len(keys), count)]
        return tuple(None if None in leaf else (slot.factor, *leaf) for leaf in leaves)

    def held(self, layer: int) -> Held:
        """The neurons that the layer's experts hold; dealt out when first asked for."""

        def features() -> Tensor:
            if layer in self.measured.hidden:
                return activation_features(self.measured.hidden[layer])
            first = "gate" if self.plan.layers[layer].gated else "up"
            name, rows = source.family.projection(source.backbone, first, layer)
            return unit_rows(self.plan.folder.read(name)[rows])

        source = self.plan.source
        if layer not in self._held:
            self._held[layer] = held_neurons(
                self.plan.config,
                width=source.family.size_of(source.backbone, layer),
                layer=layer,
                features=features,
                importance_W=self.measured.importance.get(layer),
            )
        return self._held[layer]

    def router(self, layer: int) -> Tensor:
        """The router of a layer, (E, D), in the dtype written."""
        return start_router(
            self.plan.config,
            self.measured.router_rows.get(layer),
            hidden_size=self.plan.layers[layer].hidden_size,
            layer=layer,
            dtype=self.plan.dtype,
        )

    def memory_needed(self) -> int:
        """Bytes held at a time: a dense block and two pieces of experts while writing, and the model while measuring.

        A comparison with the source loads both models besides.
        """
        source, first = self.plan.source, min(self.plan.layers)
        form = source.family.form_of(source.backbone)
        parts = ("gate", "up", "down") if form.gated and not form.fused else ("up", "down")
        names = [source.family.projection(source.backbone, part, first)[0] for part in parts]
        block = sum(bytes_of(source.model.get_parameter(name)) for name in names) * len(source.folders)
        slots = self.plan.format.slots(self.plan.model)
        piece = max(self._bytes(slot) // len(slot.pieces) for slot in slots if slot.pieces)
        whole = max(self._bytes(slot) for slot in slots if not slot.pieces)
        measuring = 4 * parameter_counts(source.model).total if self.measured.model_was_loaded else 0
        return max(block + 2 * piece, 2 * whole, measuring)

    def _bytes(self, slot: Slot) -> int:
        return math.prod(slot.shape) * (slot.dtype or self.plan.dtype).itemsize

    def _without_pieces(self, slot: Slot, index: Slices | None = None) -> Tensor:
        """A tensor of the dense model, or one that no part of a model is."""
        dtype = slot.dtype or self.plan.dtype
        if slot.fill is not None:
            return slot.constant(dtype)[index or ()]
        assert slot.target is not None, "a tensor without pieces is one of the dense model"
        return self._in_range(slot, self.plan.source.tensor(slot.target, dtype=dtype, index=index))

    def _made(self, slot: Slot, pieces: Iterable[Piece]) -> Iterator[Tensor]:
        for piece in pieces:
            made = self._piece(piece, dtype=slot.dtype or self.plan.dtype)
            yield self._in_range(slot, slot.to_disk(made))

    def _piece(self, piece: Piece, *, dtype: torch.dtype) -> Tensor:
        """Make one part of one expert, of the shared expert, or a router."""
        part, layer = piece.part, piece.layer
        if part == "router":
            return self.router(layer).to(dtype)
        moe, config = self.plan.layers[layer], self.plan.config
        if part.startswith("shared_switch"):
            rows = 1 if moe.shared_mode == "gated" else 2
            return torch.zeros((rows, moe.hidden_size) if part == "shared_switch" else rows, dtype=dtype)
        shared = part.startswith("shared_")
        part = part.removeprefix("shared_")
        dense = self.plan.source.part(part, layer=layer, expert=piece.expert, dtype=self.plan.dtype)
        factor = getattr(self.factors[layer], piece.part, 1.0)
        if part == "down_bias":
            made = scaled(dense, factor=factor, dtype=dtype)
        elif shared and config.shared_neurons == "new":
            new = new_neurons(dense, part, size=config.shared_size, layer=layer, seed=config.seed)
            made = scaled(new, factor=factor, dtype=dtype)
        elif shared:
            neurons_S = self.held(layer).shared_S
            assert neurons_S is not None, "a shared expert of old neurons"
            made = expert_part(dense, part, neurons_F=neurons_S, layer=layer, expert=-1, factor=factor, dtype=dtype)
        else:
            held = self.held(layer)
            if part == "down" and held.factors_EF is not None:
                factor = factor * held.factors_EF[piece.expert]
            made = expert_part(
                dense,
                part,
                neurons_F=held.routed_EF[piece.expert],
                layer=layer,
                expert=piece.expert,
                config=config,
                factor=factor,
                dtype=dtype,
            )
        return made.contiguous()

    def _key(self, piece: Piece) -> Hashable:
        """Equal for pieces that are copies of one another; None where experts differ."""
        config = self.plan.config
        if piece.expert < 0 or config.permute or config.neurons == "important" or config.noise or config.redraw:
            return None
        return piece.layer, piece.part, self.plan.source.owner(piece.expert), piece.expert % config.granularity

    def _in_range(self, slot: Slot, tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.float16 and not self.plan.folder.allow_nonfinite and not bool(tensor.isfinite().all()):
            raise ModelError(
                f"{slot.name}: larger than the 65504 that float16 holds; write --dtype bfloat16 or float32"
            )
        return tensor
