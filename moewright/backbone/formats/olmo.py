"""OLMoE (arXiv 2409.02060) and FlexOlmo (arXiv 2507.07024): decoders of the OLMo family whose layers are all sparse."""

from typing import Final

from transformers import PreTrainedConfig

from moewright.backbone.formats.base import Twin
from moewright.backbone.formats.rows import NO_JITTER, Count, EveryLayer, renormalises
from moewright.backbone.formats.runtimes import LLAMA_CPP, SGLANG, VLLM, Verdict, always, never, no, no_renormalising
from moewright.moe.config import MoEConfig

_PARTS: Final = {
    "router.weight": "{layer}.mlp.gate.weight",
    "gate": "{layer}.mlp.experts.{expert}.gate_proj.weight",
    "up": "{layer}.mlp.experts.{expert}.up_proj.weight",
    "down": "{layer}.mlp.experts.{expert}.down_proj.weight",
}
_ROWS: Final = (
    # transformers 5 writes num_local_experts alone; readers of version 4 know only num_experts.
    Count("num_experts", ("num_experts", "num_local_experts")),
    Count("expert_size", ("intermediate_size",)),
    Count("top_k", ("num_experts_per_tok",)),
    renormalises(),
    *NO_JITTER,
)


def _olmoe(config: PreTrainedConfig, moe: MoEConfig) -> Verdict:
    if config.rms_norm_eps != 1e-5:
        return no(f"its norms have eps 1e-5, this model's have {config.rms_norm_eps:g}")
    return no_renormalising(config, moe)


def _sglang(config: PreTrainedConfig, moe: MoEConfig) -> Verdict:
    if config.num_key_value_heads != config.num_attention_heads:
        return no("it knows no key-value heads shared by query heads")
    return _olmoe(config, moe)


OLMOE: Final = Twin(
    name="olmoe",
    architecture="OlmoeForCausalLM",
    backbones=("olmoe",),
    parts=_PARTS,
    rows=_ROWS,
    sparse=EveryLayer(),
    runtimes={VLLM: _olmoe, SGLANG: _sglang, LLAMA_CPP: no_renormalising},
)
FLEX_OLMO: Final = Twin(
    name="flex_olmo",
    architecture="FlexOlmoForCausalLM",
    backbones=("olmo2",),
    parts=_PARTS,
    rows=_ROWS,
    sparse=EveryLayer(),
    runtimes={VLLM: always, SGLANG: never("it has no FlexOlmo"), LLAMA_CPP: never("it has no FlexOlmo")},
)
