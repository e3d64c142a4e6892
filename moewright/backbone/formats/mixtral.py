"""Mixtral (arXiv 2401.04088): what a llama or mistral becomes whose layers are all sparse."""

from typing import Final

from transformers import PreTrainedConfig

from moewright.backbone.formats.base import Twin
from moewright.backbone.formats.rows import ALWAYS_RENORMALISES, NO_JITTER, Count, EveryLayer, Layers, OfBackbone
from moewright.backbone.formats.runtimes import LLAMA_CPP, SGLANG, VLLM, Verdict, always, no, whole_heads, whole_theta
from moewright.family.config import head_size
from moewright.moe.config import MoEConfig


class Mixtral(Twin):
    def refuses_more(self, config: PreTrainedConfig, layers: Layers) -> str | None:
        return refuses_attention_biases(config)


def refuses_attention_biases(config: PreTrainedConfig) -> str | None:
    """Llama's, which are on the output projection, too."""
    if config.model_type == "llama" and config.attention_bias:
        return "it has no biases on all four projections of attention"
    return None


def _sglang(config: PreTrainedConfig, moe: MoEConfig) -> Verdict:
    if not whole_heads(config):
        return no("it ignores head_dim")
    if (config.rope_parameters or {}).get("rope_type", "default") != "default":
        return no("it ignores rope scaling")
    if getattr(config, "sliding_window", None) is not None:
        return no("it ignores the sliding window")
    return whole_theta(config, moe)


MIXTRAL: Final = Mixtral(
    name="mixtral",
    architecture="MixtralForCausalLM",
    backbones=("mistral", "llama"),
    parts={
        "router.weight": "{layer}.block_sparse_moe.gate.weight",
        "gate": "{layer}.block_sparse_moe.experts.{expert}.w1.weight",
        "up": "{layer}.block_sparse_moe.experts.{expert}.w3.weight",
        "down": "{layer}.block_sparse_moe.experts.{expert}.w2.weight",
    },
    rows=(
        Count("num_experts", ("num_local_experts",)),
        Count("expert_size", ("intermediate_size",)),
        Count("top_k", ("num_experts_per_tok",)),
        ALWAYS_RENORMALISES,
        OfBackbone("head_dim", head_size),
        *NO_JITTER,
    ),
    sparse=EveryLayer(),
    runtimes={VLLM: always, SGLANG: _sglang, LLAMA_CPP: always},
)
