"""NLLB-MoE (arXiv 2207.04672), whose blocks transformers 5.23 computes wrongly."""

import warnings
from typing import Any, Final

from transformers import PreTrainedConfig

from moewright.backbone.formats.base import Twin
from moewright.backbone.formats.rows import NO_ROUTER_BIAS, Constant, Count, EveryNth, Fields, Number, Only, Row
from moewright.backbone.formats.switch import NO_RUNTIME
from moewright.errors import ModelError
from moewright.moe.config import MoEConfig


class Steps(EveryNth):
    """The last layer of each step is sparse; a step of 0 makes a stack dense."""

    def is_sparse(self, index: int, step: int) -> bool:
        return step > 0 and (index + 1) % step == 0


class Capacity(Row):
    """As many places as tokens in evaluation, so that none is dropped; we drop none whatever a folder says."""

    def write(self, config: PreTrainedConfig, moe: MoEConfig) -> dict[str, Any]:
        return {"moe_eval_capacity_token_fraction": 1.0}

    def read(self, fields: Fields, record: Fields) -> dict[str, Any]:
        if (share := fields.number("moe_eval_capacity_token_fraction", default=1.0)) < 1:
            warnings.warn(
                f"moe_eval_capacity_token_fraction={share}: there experts drop tokens in evaluation, here they do not",
                stacklevel=2,
            )
        return {}


class Width(Count):
    """One width for both stacks."""

    def read(self, fields: Fields, record: Fields) -> dict[str, Any]:
        if len({fields.values.get(name) for name in self.fields}) > 1:
            raise ModelError(f"{' and '.join(self.fields)} of a nllb-moe folder differ: that is not supported")
        return super().read(fields, record)


_TWO: Final = "it routes each token to two experts, whose weights sum to 1"

NLLB_MOE: Final = Twin(
    name="nllb-moe",
    architecture="NllbMoeForConditionalGeneration",
    backbones=("m2m_100",),
    parts={
        "router.weight": "{layer}.ffn.router.classifier.weight",
        "up": "{layer}.ffn.experts.expert_{expert}.fc1.weight",
        "up_bias": "{layer}.ffn.experts.expert_{expert}.fc1.bias",
        "down": "{layer}.ffn.experts.expert_{expert}.fc2.weight",
        "down_bias": "{layer}.ffn.experts.expert_{expert}.fc2.bias",
    },
    renames=(
        (r"\.(fc[12])\.", r".ffn.\1."),
        (r"\.final_layer_norm\.", ".ff_layer_norm."),
        (r"\.encoder_attn", ".cross_attention"),
    ),
    unties=False,
    rows=(
        Only("top_k", 2, _TWO),
        Only("router_order", "topk-softmax", _TWO),
        Count("num_experts", ("num_experts",)),
        Width("expert_size", ("encoder_ffn_dim", "decoder_ffn_dim")),
        Number("output_masking", "moe_token_dropout", default=0.2),
        Capacity(),
        NO_ROUTER_BIAS,
        Constant("second_expert_policy", "all", 'the second expert may be left out at random; set "all"'),
        Constant("router_dtype", "float32"),
    ),
    sparse=Steps(),
    gated=False,
    biased=True,
    faulty=True,
    runtimes=NO_RUNTIME,
)
