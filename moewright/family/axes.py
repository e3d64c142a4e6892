"""The units of the dims of a family's tensors, which `moewright grow` needs to make them larger.

A row of `table.py` refers to one of the records below.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final, Literal

from transformers import PreTrainedConfig

Axis = Literal[
    "vocabulary",
    "positions",
    "model",
    "head",
    "heads",
    "kv_heads",
    "qkv",
    "head_qkv",
    "head_dim",
    "feed_forward",
    "gate_up",
]
"""The unit of a dim. `head` is one for each head, `heads` and `kv_heads` are rows of heads, heads * head_dim in
number; `qkv` is the rows of all queries, then all keys, then all values, `head_qkv` the three of one head after those
of the other; `gate_up` is `feed_forward` twice."""


@dataclass(frozen=True)
class Axes:
    """The units of a tensor's dims, and their roles."""

    dims: tuple[Axis, ...]
    inputs: int | None = None
    """The dim that is summed over, and therefore divided by the copies."""
    outputs: int | None = None
    """The dim whose extra neurons AKI takes from the layer above; a norm's weights are no neurons of their own."""
    embeds: bool = False
    """Whether this is a table of input embeddings."""
    feeds_head: bool = False
    """Whether this is of the norm before the output embedding, which takes over the division of a tied one. A norm that
    every layer has feeds it in the last."""


@dataclass(frozen=True)
class Growth:
    """How the models of a family grow."""

    axes: Mapping[str, Axes]
    """Every tensor that the family may have, by its name on disk with {layer} in place of the number."""
    embedding_scale: str | bool = False
    """Config field that says whether embeddings are multiplied by the root of the model width, or whether they are."""
    output_scale: str | None = None
    """Config field that says whether what the output embedding reads is divided by that root, where there is one."""
    fixed_width: str | None = None
    """Why the model width cannot grow, although other sizes can."""

    def scales_embedding(self, config: PreTrainedConfig) -> bool:
        """Whether this model multiplies its embeddings by the root of its width."""
        scale = self.embedding_scale
        return scale if isinstance(scale, bool) else bool(getattr(config, scale))

    def scales_output(self, config: PreTrainedConfig) -> bool:
        """Whether it divides what its output embedding reads by that root."""
        return self.output_scale is not None and bool(getattr(config, self.output_scale, False))


def _linear(name: str, outputs: Axis, inputs: Axis) -> dict[str, Axes]:
    """A projection, with the bias that it may have."""
    return {
        f"{name}.weight": Axes((outputs, inputs), inputs=1, outputs=0),
        f"{name}.bias": Axes((outputs,), outputs=0),
    }


def _norm(name: str, axis: Axis = "model", *, feeds_head: bool = False) -> dict[str, Axes]:
    """A norm, with the bias that it may have."""
    return {f"{name}.{part}": Axes((axis,), feeds_head=feeds_head) for part in ("weight", "bias")}


_EMBEDDING: Final = Axes(("vocabulary", "model"), embeds=True)
_HEAD: Final = Axes(("vocabulary", "model"), inputs=1)
_LAYER: Final = "model.layers.{layer}"

LLAMA: Final = Growth(
    {
        "model.embed_tokens.weight": _EMBEDDING,
        "lm_head.weight": _HEAD,
        **_norm("model.norm", feeds_head=True),
        **_norm(f"{_LAYER}.input_layernorm"),
        **_norm(f"{_LAYER}.post_attention_layernorm"),
        **_linear(f"{_LAYER}.self_attn.q_proj", "heads", "model"),
        **_linear(f"{_LAYER}.self_attn.k_proj", "kv_heads", "model"),
        **_linear(f"{_LAYER}.self_attn.v_proj", "kv_heads", "model"),
        **_linear(f"{_LAYER}.self_attn.o_proj", "model", "heads"),
        **_norm(f"{_LAYER}.self_attn.q_norm", "head_dim"),
        **_norm(f"{_LAYER}.self_attn.k_norm", "head_dim"),
        **_linear(f"{_LAYER}.mlp.gate_proj", "feed_forward", "model"),
        **_linear(f"{_LAYER}.mlp.up_proj", "feed_forward", "model"),
        **_linear(f"{_LAYER}.mlp.down_proj", "model", "feed_forward"),
    }
)
"""Decoders whose tensors are called as llama's, whether they have all of them or not."""

OLMO2: Final = Growth(
    {
        **LLAMA.axes,
        **_norm(f"{_LAYER}.post_feedforward_layernorm"),
        **_norm(f"{_LAYER}.self_attn.q_norm", "heads"),  # over all heads together
        **_norm(f"{_LAYER}.self_attn.k_norm", "kv_heads"),
    }
)

GEMMA: Final = Growth(
    {
        **LLAMA.axes,
        **_norm(f"{_LAYER}.pre_feedforward_layernorm"),
        **_norm(f"{_LAYER}.post_feedforward_layernorm"),
    },
    embedding_scale=True,
)

PHI3: Final = Growth(
    {
        **LLAMA.axes,
        **_linear(f"{_LAYER}.self_attn.qkv_proj", "qkv", "model"),
        **_linear(f"{_LAYER}.mlp.gate_up_proj", "gate_up", "model"),
    }
)

_NEOX: Final = "gpt_neox.layers.{layer}"

GPT_NEOX: Final = Growth(
    {
        "gpt_neox.embed_in.weight": _EMBEDDING,
        "embed_out.weight": _HEAD,
        **_norm("gpt_neox.final_layer_norm", feeds_head=True),
        **_norm(f"{_NEOX}.input_layernorm"),
        **_norm(f"{_NEOX}.post_attention_layernorm"),
        **_linear(f"{_NEOX}.attention.query_key_value", "head_qkv", "model"),
        **_linear(f"{_NEOX}.attention.dense", "model", "heads"),
        **_linear(f"{_NEOX}.mlp.dense_h_to_4h", "feed_forward", "model"),
        **_linear(f"{_NEOX}.mlp.dense_4h_to_h", "model", "feed_forward"),
    }
)


def _t5_stack(name: str, *attentions: str) -> dict[str, Axes]:
    layer = f"{name}.block.{{layer}}.layer"
    block = f"{layer}.{len(attentions)}"
    axes = {
        **_norm(f"{name}.final_layer_norm", feeds_head=name == "decoder"),
        f"{layer}.0.SelfAttention.relative_attention_bias.weight": Axes(("positions", "head")),
        **_norm(f"{block}.layer_norm"),
        **_linear(f"{block}.DenseReluDense.wo", "model", "feed_forward"),
    }
    for inner in ("wi", "wi_0", "wi_1"):
        axes |= _linear(f"{block}.DenseReluDense.{inner}", "feed_forward", "model")
    for place, attention in enumerate(attentions):
        axes |= _norm(f"{layer}.{place}.layer_norm")
        axes |= _linear(f"{layer}.{place}.{attention}.o", "model", "heads")
        for part in "qkv":
            axes |= _linear(f"{layer}.{place}.{attention}.{part}", "heads", "model")
    return axes


T5: Final = Growth(
    {
        "shared.weight": _EMBEDDING,
        "lm_head.weight": _HEAD,
        **_t5_stack("encoder", "SelfAttention"),
        **_t5_stack("decoder", "SelfAttention", "EncDecAttention"),
    },
    output_scale="scale_decoder_outputs",
)


def _fairseq_stack(name: str, *attentions: str) -> dict[str, Axes]:
    layer = f"model.{name}.layers.{{layer}}"
    axes = {
        f"model.{name}.embed_tokens.weight": _EMBEDDING,  # where it is not the shared one
        f"model.{name}.embed_positions.weight": Axes(("positions", "model")),
        **_norm(f"model.{name}.layernorm_embedding"),
        **_norm(f"model.{name}.layer_norm", feeds_head=name == "decoder"),
        **_norm(f"{layer}.final_layer_norm"),
        **_linear(f"{layer}.fc1", "feed_forward", "model"),
        **_linear(f"{layer}.fc2", "model", "feed_forward"),
    }
    for attention in attentions:
        axes |= _norm(f"{layer}.{attention}_layer_norm")
        axes |= _linear(f"{layer}.{attention}.out_proj", "model", "heads")
        for part in "qkv":
            axes |= _linear(f"{layer}.{attention}.{part}_proj", "heads", "model")
    return axes


MBART: Final = Growth(
    {
        "model.shared.weight": _EMBEDDING,
        "lm_head.weight": _HEAD,
        "final_logits_bias": Axes(("positions", "vocabulary")),
        **_fairseq_stack("encoder", "self_attn"),
        **_fairseq_stack("decoder", "self_attn", "encoder_attn"),
    },
    embedding_scale="scale_embedding",
)

# The norms come after the residual sums, and no other comes after the last layer.
BART: Final = replace(
    MBART, axes={**MBART.axes, **_norm("model.decoder.layers.{layer}.final_layer_norm", feeds_head=True)}
)

M2M_100: Final = replace(MBART, fixed_width="its positions are sines of the model width, which are no copies")
