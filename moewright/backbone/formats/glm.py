"""GLM-4.5 (arXiv 2508.06471), the twin of layers with sigmoid scores."""

from collections.abc import Mapping
from typing import Any, Final

from transformers import PreTrainedConfig

from moewright.backbone.formats.deepseek import SIGMOID_PARTS, SigmoidRouters, sigmoid_rows
from moewright.backbone.formats.rows import LastLayers, Layers, OfBackbone
from moewright.backbone.formats.runtimes import LLAMA_CPP, SGLANG, VLLM, YES, Verdict, no
from moewright.errors import ModelError
from moewright.family.config import head_size, slides
from moewright.moe.config import MoEConfig


class Glm(SigmoidRouters):
    """Glm4Moe, whose attention is Llama's, with biases of query, key and value (Qwen2's) or norms of query and key
    (Qwen3's) or both, and may rotate a part of each head alone.

    No dense family has the last two, so a folder that does not say what it was is read with Glm4Moe's own class around
    our layers.
    """

    def refuses_more(self, config: PreTrainedConfig, layers: Layers) -> str | None:
        if config.model_type in ("llama", "qwen3") and config.attention_bias:
            return "it has no bias on the output projection of attention"
        return "it has no sliding attention" if any(slides(config)) else None

    def more_fields(self, config: PreTrainedConfig, layers: Layers) -> dict[str, Any]:
        rope, own = dict(config.rope_parameters), config.model_type == self.name
        part = rope.setdefault("partial_rotary_factor", 1.0)  # a missing one is taken for 0.5
        return {
            "attention_bias": config.attention_bias if own else config.model_type == "qwen2",
            "use_qk_norm": config.use_qk_norm if own else config.model_type == "qwen3",
            "rope_parameters": rope,
            "partial_rotary_factor": part,
        }

    def backbone_fields(self, fields: Mapping[str, Any], *, backbone: str) -> dict[str, Any]:
        if backbone == self.name:
            return {}
        # In the order in which transformers looks for them.
        rope = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
        if not isinstance(rope, dict):
            raise ModelError(f"config.json of type {self.name}: rope settings {rope!r} are no table")
        part = rope.get("partial_rotary_factor", fields.get("partial_rotary_factor", 0.5))
        if part != 1:
            raise ModelError(
                f"partial_rotary_factor={part!r}: {backbone}, which moewright.json names, rotates whole heads; "
                "delete moewright.json to load the folder by config.json alone"
            )
        rope = {key: value for key, value in rope.items() if key != "partial_rotary_factor"}
        whole = {"rope_parameters": rope or None, "rope_scaling": None, "partial_rotary_factor": None}
        return whole | {"sliding_window": None}


def _silu(config: PreTrainedConfig, moe: MoEConfig) -> Verdict:
    other = config.hidden_act != "silu"
    return no(f"it knows no activation but silu, and this is {config.hidden_act}") if other else YES


def _llama_cpp(config: PreTrainedConfig, moe: MoEConfig) -> Verdict:
    return no("it chooses among all experts, whatever their groups") if moe.num_groups > 1 else _silu(config, moe)


GLM4_MOE: Final = Glm(
    name="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    backbones=("glm4_moe", "llama", "mistral", "qwen2", "qwen3"),
    parts=SIGMOID_PARTS,
    rows=(*sigmoid_rows(groups=(1, 1), scale=1.0), OfBackbone("head_dim", head_size)),
    sparse=LastLayers("first_k_dense_replace", default=1),
    runtimes={VLLM: _silu, SGLANG: _silu, LLAMA_CPP: _llama_cpp},
)
