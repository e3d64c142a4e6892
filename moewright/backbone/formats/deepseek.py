"""DeepSeek-V3 (arXiv 2412.19437), and what all architectures with its routers have in common."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from moewright.backbone.blocks import moe_layers
from moewright.backbone.formats.base import Twin
from moewright.backbone.formats.qwen import silent_expert
from moewright.backbone.formats.rows import Constant, Count, Fields, Flag, LastLayers, Number, Only, Row
from moewright.backbone.formats.runtimes import NOT_READ
from moewright.backbone.slots import Slot
from moewright.family.table import family_of
from moewright.moe.config import MoEConfig


class SigmoidRouters(Twin):
    """Sigmoid scores with a bias for the choice, within groups (arXiv 2412.19437, section 2.1.2).

    It demands that bias and a shared expert whose output is added. Where a layer has none, they are written as zeros,
    and moewright.json says so. The layers after the last that predict later tokens are not read.

    Weights that are renormalised are divided there by their sum + 1e-20, and here by their sum: the same float32
    number for any sum above 1e-12.
    """

    def remembered(self, moe: MoEConfig) -> dict[str, Any]:
        silent = {} if moe.shared_size else {"shared_expert": "silent"}
        return silent if moe.selection_bias else silent | {"selection_bias": False}

    def unread(self, name: str, fields: Mapping[str, Any], config: PreTrainedConfig) -> bool:
        """Layers that predict later tokens, which count from the last layer on."""
        more = Fields(fields, self.name).whole("num_nextn_predict_layers", default=1, least=0)
        match = re.match(r"model\.layers\.(\d+)\.", name)
        return match is not None and 0 <= int(match[1]) - config.num_hidden_layers < more

    def slots(self, model: PreTrainedModel) -> list[Slot]:
        slots, places = super().slots(model), family_of(model.config).places(model.config)
        for layer, moe in moe_layers(model).items():
            config, path = moe.config, f"{places[layer].layer}.mlp"
            if not config.selection_bias:
                name, shape = f"{path}.gate.e_score_correction_bias", (config.num_experts,)
                slots.append(Slot(name=name, shape=shape, fill=0.0, must_match=True, dtype=torch.float32))
            if not config.shared_size:
                slots += silent_expert(
                    f"{path}.shared_experts", hidden_size=config.hidden_size, size=config.expert_size
                )
        return slots


class SelectionBias(Row):
    """A bias for the choice: always on disk, and zeros where moewright.json says that there is none."""

    setting = "selection_bias"

    def read(self, fields: Fields, record: Fields) -> dict[str, Any]:
        return {"selection_bias": record.flag("selection_bias", default=True)}


@dataclass(frozen=True)
class Groups(Row):
    """Groups of experts that a token may choose from; choosing all of them is choosing among all experts."""

    default: tuple[int, int]
    """Groups, and how many of them a token may choose from, where config.json does not say."""

    settings = frozenset({"num_groups", "top_groups", "group_score"})

    def write(self, config: PreTrainedConfig, moe: MoEConfig) -> dict[str, Any]:
        return {"n_group": moe.num_groups, "topk_group": moe.top_groups}

    def read(self, fields: Fields, record: Fields) -> dict[str, Any]:
        groups = fields.whole("n_group", default=self.default[0])
        top = fields.whole("topk_group", default=self.default[1])
        return {} if top == groups else {"num_groups": groups, "top_groups": top, "group_score": "top2"}

    def refuses(self, moe: MoEConfig) -> str | None:
        if moe.num_experts == 1:
            return "it needs two experts or more"
        other = moe.num_groups > 1 and moe.group_score != "top2"
        return "it ranks groups of experts by the sum of their best two scores" if other else None


class SharedExperts(Row):
    """An expert that every token goes through, whose width is counted in experts."""

    settings = frozenset({"shared_size", "shared_mode"})

    def write(self, config: PreTrainedConfig, moe: MoEConfig) -> dict[str, Any]:
        return {"n_shared_experts": moe.shared_size // moe.expert_size or 1}

    def read(self, fields: Fields, record: Fields) -> dict[str, Any]:
        if record.values.get("shared_expert") == "silent":
            return {}
        count, width = fields.whole("n_shared_experts", default=1), fields.whole("moe_intermediate_size")
        return {"shared_size": count * width, "shared_mode": "added"}

    def refuses(self, moe: MoEConfig) -> str | None:
        if moe.shared_size and moe.shared_mode != "added":
            return "its shared expert is added without a gate"
        if moe.shared_size % moe.expert_size:
            return f"its shared expert is a multiple of expert_size={moe.expert_size} wide, this one {moe.shared_size}"
        return None


def sigmoid_rows(*, groups: tuple[int, int], scale: float) -> tuple[Row, ...]:
    """The rows that they have in common, with what their classes take for missing fields."""
    return (
        Only("score", "sigmoid", "it scores experts with a sigmoid each, and this router with a softmax over them"),
        Count("num_experts", ("n_routed_experts",)),
        Count("expert_size", ("moe_intermediate_size",)),
        Count("top_k", ("num_experts_per_tok",)),
        SelectionBias(),
        Flag("renormalize", "norm_topk_prob", default=True),
        Number("routed_scale", "routed_scaling_factor", default=scale),
        Groups(groups),
        SharedExperts(),
        Constant("num_nextn_predict_layers", 0),
    )


SIGMOID_PARTS: Final = {
    "router.weight": "{layer}.mlp.gate.weight",
    "router.bias": "{layer}.mlp.gate.e_score_correction_bias",
    "shared_gate": "{layer}.mlp.shared_experts.gate_proj.weight",
    "shared_up": "{layer}.mlp.shared_experts.up_proj.weight",
    "shared.down_proj.weight": "{layer}.mlp.shared_experts.down_proj.weight",
    "gate": "{layer}.mlp.experts.{expert}.gate_proj.weight",
    "up": "{layer}.mlp.experts.{expert}.up_proj.weight",
    "down": "{layer}.mlp.experts.{expert}.down_proj.weight",
}

DEEPSEEK_V3: Final = SigmoidRouters(
    name="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    backbones=("deepseek_v3",),
    parts=SIGMOID_PARTS,
    rows=(
        *sigmoid_rows(groups=(8, 4), scale=2.5),
        # transformers does not read these, but serving runtimes take others for a missing one.
        Constant("scoring_func", "sigmoid", "transformers scores experts with a sigmoid whatever the config says"),
        Constant("topk_method", "noaux_tc", "transformers chooses experts with a bias whatever the config says"),
        Constant("moe_layer_freq", 1, "transformers makes every layer after the dense ones sparse"),
    ),
    sparse=LastLayers("first_k_dense_replace", default=3),
    runtimes=NOT_READ,
)
