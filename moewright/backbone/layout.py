"""The tensors of a folder as views of a model: said once, used to read and to write.

Each tensor on disk is a `Slot`: either a view of a parameter (a whole dense weight, a router, one
projection of one expert inside the stacked weights), or something that only the layout demands (an
output embedding written out although it is tied, biases and a shared expert that are zero).
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from transformers import PreTrainedModel

from moewright.backbone.family import family_of
from moewright.backbone.graft import layer_numbers, moe_layers
from moewright.backbone.twins import SHARED_EXPERT_SIZE, Twin

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

Part = Literal["dense", "tied", "router", "gate", "up", "down", "constant"]


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One tensor of a folder."""

    name: str
    """Its name on disk."""
    part: Part
    shape: tuple[int, ...]
    layer: int = -1
    expert: int = -1
    fill: float = 0.0
    """The value of a `constant`'s elements."""
    must_match: bool = False
    """Whether a `constant` with another value would change what the model computes."""

    def view(self, model: PreTrainedModel) -> Tensor:
        """The part of the model that this tensor is; a `constant` has none."""
        assert self.part != "constant"
        if self.part in ("dense", "tied"):
            return model.get_parameter(self.name if self.part == "dense" else EMBEDDING)
        moe = model.get_submodule(family_of(model.config).feed_forward.format(layer=self.layer))
        if self.part == "router":
            return moe.get_parameter("router.weight")
        if self.part == "down":
            return moe.get_parameter("experts.down_proj")[self.expert]
        gate_up = moe.get_parameter("experts.gate_up_proj")[self.expert]
        width = gate_up.shape[0] // 2
        return gate_up[:width] if self.part == "gate" else gate_up[width:]


def slots(model: PreTrainedModel, twin: Twin | None) -> list[Slot]:
    """Every tensor of the folder that this model is written to, in the order of writing."""
    family, sparse = family_of(model.config), moe_layers(model)
    blocks = tuple(f"{family.feed_forward.format(layer=layer)}." for layer in sparse)
    found = [
        Slot(name=name, part="dense", shape=tuple(parameter.shape))
        for name, parameter in model.named_parameters()
        if not name.startswith(blocks)
    ]
    if twin is None:
        return found
    if model.config.tie_word_embeddings:
        found.append(Slot(name=HEAD, part="tied", shape=tuple(model.get_parameter(EMBEDDING).shape)))
    if twin.attention_biases and not any(slot.name.endswith("self_attn.q_proj.bias") for slot in found):
        found += _zero_biases(model)
    for layer, moe in sparse.items():
        E, D, F = moe.config.num_experts, moe.config.hidden_size, moe.config.expert_size
        found.append(Slot(name=twin.router.format(layer=layer), part="router", shape=(E, D), layer=layer))
        parts: tuple[tuple[Part, str, tuple[int, int]], ...] = (
            ("gate", twin.gate, (F, D)),
            ("up", twin.up, (F, D)),
            ("down", twin.down, (D, F)),
        )
        for expert in range(E):
            for part, name, shape in parts:
                name = name.format(layer=layer, expert=expert)
                found.append(Slot(name=name, part=part, shape=shape, layer=layer, expert=expert))
        if twin.shared_expert:
            found += _silent_shared_expert(twin.shared_expert.format(layer=layer), hidden_size=D)
    return found


def _zero_biases(model: PreTrainedModel) -> list[Slot]:
    """Query, key and value biases of the Qwen2 layout, for a backbone that has none."""
    return [
        Slot(
            name=f"{attention}.{projection}.bias",
            part="constant",
            shape=(model.get_parameter(f"{attention}.{projection}.weight").shape[0],),
            must_match=True,
        )
        for attention in (f"model.layers.{layer}.self_attn" for layer in layer_numbers(model))
        for projection in ("q_proj", "k_proj", "v_proj")
    ]


def _silent_shared_expert(path: str, *, hidden_size: int) -> list[Slot]:
    """A shared expert whose output is zero: its down projection is.

    Its gate is not, since llama.cpp computes silu(gate)/gate there.
    """
    D, S = hidden_size, SHARED_EXPERT_SIZE
    return [
        Slot(name=f"{path}.gate_proj.weight", part="constant", shape=(S, D)),
        Slot(name=f"{path}.up_proj.weight", part="constant", shape=(S, D)),
        Slot(name=f"{path}.down_proj.weight", part="constant", shape=(D, S), must_match=True),
        Slot(name=f"{path}_gate.weight", part="constant", shape=(1, D), fill=1.0 / D),
    ]
