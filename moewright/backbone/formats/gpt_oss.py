"""gpt-oss (arXiv 2508.10925): routers and experts with biases, and a clamped activation of gate and up together."""

from typing import Final

from moewright.backbone.formats.base import Twin
from moewright.backbone.formats.rows import ALWAYS_RENORMALISES, Constant, Count, EveryLayer, Only
from moewright.backbone.formats.runtimes import NOT_READ
from moewright.backbone.slots import Order

GPT_OSS: Final = Twin(
    name="gpt_oss",
    architecture="GptOssForCausalLM",
    backbones=("gpt_oss",),
    parts={
        "router.weight": "{layer}.mlp.router.weight",
        "router.linear_bias": "{layer}.mlp.router.bias",
        "experts.gate_up_proj": "{layer}.mlp.experts.gate_up_proj",
        "experts.gate_up_proj_bias": "{layer}.mlp.experts.gate_up_proj_bias",
        "experts.down_proj": "{layer}.mlp.experts.down_proj",
        "experts.down_proj_bias": "{layer}.mlp.experts.down_proj_bias",
    },
    orders={
        "experts.gate_up_proj": Order(interleaved=True, transposed=True),
        "experts.gate_up_proj_bias": Order(interleaved=True),
        "experts.down_proj": Order(transposed=True),
    },
    rows=(
        Count("num_experts", ("num_local_experts",)),
        Count("expert_size", ("intermediate_size",)),
        Count("top_k", ("num_experts_per_tok",)),
        ALWAYS_RENORMALISES,
        Only("router_bias", True, "its routers have biases"),
        Constant("swiglu_alpha", 1.702, "another gain of the sigmoid is not supported; 1.702 is"),
        Constant("swiglu_limit", 7.0, "another limit of the activation is not supported; 7.0 is"),
    ),
    sparse=EveryLayer(),
    biased=True,
    activation="swiglu_oai",
    runtimes=NOT_READ,
)
