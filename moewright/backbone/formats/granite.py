"""GraniteMoe, and GraniteMoeShared with a shared expert: decoders whose experts are stacked on disk."""

from typing import Final

from moewright.backbone.formats.base import Twin
from moewright.backbone.formats.rows import ALWAYS_RENORMALISES, NO_JITTER, Count, EveryLayer, Only
from moewright.backbone.formats.runtimes import LLAMA_CPP, NO_CONVERTER_READ, SGLANG, VLLM, always, never, whole_theta

_PARTS: Final = {
    "router.weight": "{layer}.block_sparse_moe.router.layer.weight",
    "experts.gate_up_proj": "{layer}.block_sparse_moe.input_linear.weight",
    "experts.down_proj": "{layer}.block_sparse_moe.output_linear.weight",
}
_ROWS: Final = (
    Count("num_experts", ("num_local_experts",)),
    Count("expert_size", ("intermediate_size",)),
    Count("top_k", ("num_experts_per_tok",)),
    ALWAYS_RENORMALISES,
    *NO_JITTER,
)
_SHARED: Final = "it has one shared expert, whose output is added"

GRANITEMOE: Final = Twin(
    name="granitemoe",
    architecture="GraniteMoeForCausalLM",
    backbones=("granite",),
    parts=_PARTS,
    rows=_ROWS,
    sparse=EveryLayer(),
    runtimes={VLLM: always, SGLANG: whole_theta, LLAMA_CPP: NO_CONVERTER_READ},
)
GRANITEMOESHARED: Final = Twin(
    name="granitemoeshared",
    architecture="GraniteMoeSharedForCausalLM",
    backbones=("granite",),
    parts=_PARTS
    | {
        "shared.gate_up_proj.weight": "{layer}.shared_mlp.input_linear.weight",
        "shared.down_proj.weight": "{layer}.shared_mlp.output_linear.weight",
    },
    rows=(
        Count("shared_size", ("shared_intermediate_size",), refusal=_SHARED),
        Only("shared_mode", "added", _SHARED),
        *_ROWS,
    ),
    sparse=EveryLayer(),
    runtimes={VLLM: always, SGLANG: never("it has no GraniteMoeShared"), LLAMA_CPP: NO_CONVERTER_READ},
)
