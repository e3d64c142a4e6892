"""GLM-4.5's architecture, the twin of layers with sigmoid scores."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from moewright.backbone.graft import moe_layers
from moewright.backbone.layout import Layout, Slot
from moewright.backbone.twin import Layers, Twin, head_size, number, slides, truth, whole_number
from moewright.errors import ModelError
from moewright.family.table import family_of
from moewright.moe.config import MoEConfig


@dataclass(frozen=True, kw_only=True)
class Glm(Twin):
    """Glm4Moe: sigmoid scores with a bias for the choice (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).

    It demands that bias and a shared expert whose output is added. Where a layer has none, they are written as zeros,
    and moewright.json says so. Its attention is Llama's, with biases of query, key and value (Qwen2's) or norms of
    query and key (Qwen3's) or both, and may rotate a part of each head alone. No dense family has the last two, so a
    folder that does not say what it was is read with Glm4Moe's own class around our layers.

    Weights that are renormalised are divided there by their sum + 1e-20, and here by their sum: the same float32
    number for any sum above 1e-12.
    """

    def refuses_layers(self, config: PreTrainedConfig, layers: Layers) -> str | None:
        moe = next(iter(layers.values()))
        if moe.score != "sigmoid":
            return "it scores experts with a sigmoid each, and this router with a softmax over them"
        if moe.num_experts == 1:
            return "it needs two experts or more"
        if moe.num_groups > 1 and moe.group_score != "top2":
            return "it ranks groups of experts by the sum of their best two scores"
        if moe.shared_size and moe.shared_mode != "added":
            return "its shared expert is added without a gate"
        if moe.shared_size % moe.expert_size:
            return f"its shared expert is a multiple of expert_size={moe.expert_size} wide, this one {moe.shared_size}"
        if sorted(layers) != list(range(min(layers), config.num_hidden_layers)):
            return "its dense layers are the first ones"
        if config.model_type in ("llama", "qwen3") and config.attention_bias:
            return "it has no bias on the output projection of attention"
        return "it has no sliding attention" if any(slides(config)) else None

    def own_fields(self, config: PreTrainedConfig, layers: Layers) -> dict[str, Any]:
        moe, rope = next(iter(layers.values())), dict(config.rope_parameters)
        part = rope.setdefault("partial_rotary_factor", 1.0)  # a missing one is taken for 0.5
        own = config.model_type == self.model_type
        return {
            "attention_bias": config.attention_bias if own else config.model_type == "qwen2",
            "use_qk_norm": config.use_qk_norm if own else config.model_type == "qwen3",
            "head_dim": head_size(config),
            "rope_parameters": rope,
            "partial_rotary_factor": part,
            "first_k_dense_replace": min(layers),
            "n_shared_experts": moe.shared_size // moe.expert_size or 1,
            "n_group": moe.num_groups,
            "topk_group": moe.top_groups,
            "norm_topk_prob": moe.renormalize,
            "routed_scaling_factor": moe.routed_scale,
            "num_nextn_predict_layers": 0,
        }

    def own_settings(self, fields: Mapping[str, Any], *, record: Mapping[str, Any]) -> dict[str, Any]:
        groups, top = (
            whole_number(fields, name, what=self.model_type, default=1) for name in ("n_group", "topk_group")
        )
        settings: dict[str, Any] = {
            "score": "sigmoid",
            "selection_bias": truth(
                record, "selection_bias", default=True, what=self.model_type, file="moewright.json"
            ),
            "renormalize": truth(fields, "norm_topk_prob", default=True, what=self.model_type),
            "routed_scale": number(fields, "routed_scaling_factor", default=1.0, what=self.model_type),
        }
        if top != groups:  # choosing all groups is choosing among all experts
            settings |= {"num_groups": groups, "top_groups": top, "group_score": "top2"}
        if record.get("shared_expert") != "silent":
            count = whole_number(fields, "n_shared_experts", what=self.model_type, default=1)
            width = whole_number(fields, *self.size_fields, what=self.model_type)
            settings |= {"shared_size": count * width, "shared_mode": "added"}
        return settings

    def record(self, moe: MoEConfig) -> dict[str, Any]:
        silent = {} if moe.shared_size else {"shared_expert": "silent"}
        return silent if moe.selection_bias else silent | {"selection_bias": False}

    def sparse_layers(self, fields: Mapping[str, Any], config: PreTrainedConfig) -> list[int]:
        dense = fields.get("first_k_dense_replace", 1)
        if type(dense) is not int or dense < 0:
            raise ModelError(f"config.json of type {self.model_type}: first_k_dense_replace={dense!r} is no number")
        return list(range(dense, config.num_hidden_layers))

    def backbone_fields(self, fields: Mapping[str, Any], *, backbone: str) -> dict[str, Any]:
        if backbone == self.model_type:
            return {}
        # In the order in which transformers looks for them.
        rope = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
        if not isinstance(rope, dict):
            raise ModelError(f"config.json of type {self.model_type}: rope settings {rope!r} are no table")
        part = rope.get("partial_rotary_factor", fields.get("partial_rotary_factor", 0.5))
        if part != 1:
            raise ModelError(
                f"partial_rotary_factor={part!r}: {backbone}, which moewright.json names, rotates whole heads; "
                "delete moewright.json to load the folder by config.json alone"
            )
        rope = {key: value for key, value in rope.items() if key != "partial_rotary_factor"}
        whole = {"rope_parameters": rope or None, "rope_scaling": None, "partial_rotary_factor": None}
        return whole | {"sliding_window": None}

    def unread(self, name: str, fields: Mapping[str, Any], config: PreTrainedConfig) -> bool:
        """Layers that predict later tokens, which count from the last layer on."""
        more = whole_number(fields, "num_nextn_predict_layers", what=self.model_type, default=1, least=0)
        match = re.match(r"model\.layers\.(\d+)\.", name)
        return match is not None and 0 <= int(match[1]) - config.num_hidden_layers < more

    def slots(self, model: PreTrainedModel) -> list[Slot]:
        found, places = super().slots(model), family_of(model.config).places(model.config)
        for layer, moe in moe_layers(model).items():
            E, D, F = moe.config.num_experts, moe.config.hidden_size, moe.config.expert_size
            path = f"{places[layer].layer}.mlp"
            if not moe.config.selection_bias:
                name = f"{path}.gate.e_score_correction_bias"
                found.append(Slot(name=name, shape=(E,), fill=0.0, must_match=True, dtype=torch.float32))
            if not moe.config.shared_size:
                found += [
                    Slot(name=f"{path}.shared_experts.gate_proj.weight", shape=(F, D), fill=0.0),
                    Slot(name=f"{path}.shared_experts.up_proj.weight", shape=(F, D), fill=0.0),
                    Slot(name=f"{path}.shared_experts.down_proj.weight", shape=(D, F), fill=0.0, must_match=True),
                ]
        return found


_HOLDS: Final = (
    *("score", "router_order", "selection_bias", "renormalize", "routed_scale"),
    *("num_groups", "top_groups", "group_score", "shared_size", "shared_mode"),
)
GLM4_MOE: Final = Glm(
    model_type="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    backbones=("glm4_moe", "llama", "mistral", "qwen2", "qwen3"),
    layout=Layout(
        parts={
            "router.weight": "{layer}.mlp.gate.weight",
            "router.bias": "{layer}.mlp.gate.e_score_correction_bias",
            "shared_gate": "{layer}.mlp.shared_experts.gate_proj.weight",
            "shared_up": "{layer}.mlp.shared_experts.up_proj.weight",
            "shared.down_proj.weight": "{layer}.mlp.shared_experts.down_proj.weight",
            "gate": "{layer}.mlp.experts.{expert}.gate_proj.weight",
            "up": "{layer}.mlp.experts.{expert}.up_proj.weight",
            "down": "{layer}.mlp.experts.{expert}.down_proj.weight",
        }
    ),
    experts_fields=("n_routed_experts",),
    size_fields=("moe_intermediate_size",),
    holds=frozenset(_HOLDS),
)
