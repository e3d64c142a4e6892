"""The families of transformers models, one row each.

A row says where a family keeps its feed-forward blocks and what their parts are called. The rest of the project
knows a family only through its row. Layers have one number each: those of an encoder come first, then the decoder's.
"""

from typing import Final

from transformers import PreTrainedConfig

from moewright.errors import ModelError
from moewright.family.axes import BART, GEMMA, GPT_NEOX, LLAMA, M2M_100, MBART, OLMO2, PHI3, T5, Growth
from moewright.family.row import Family, Form, Stack


def _fairseq(name: str, norm: str) -> Stack:
    """A stack of the models that come from fairseq: two projections in the layer itself."""
    return Stack(
        layer=f"model.{name}.layers.{{layer}}",
        block="",
        norm=norm,
        name=name,
        causal=name == "decoder",
        count=f"{name}_layers",
        size=f"{name}_ffn_dim",
        heads=f"{name}_attention_heads",
    )


def _t5_stack(name: str, place: int, count: str) -> Stack:
    return Stack(
        layer=f"{name}.block.{{layer}}.layer.{place}",
        block="DenseReluDense",
        norm="layer_norm",
        name=name,
        causal=name == "decoder",
        count=count,
        size="d_ff",
        heads="num_heads",
    )


def _sliced(attention: str, parts: str, output: str) -> dict[str, str]:
    """The styles of an attention module whose heads are divided."""
    styles = {f"{attention}.{part}": "colwise" for part in parts.split()}
    return styles | {f"{attention}.{output}": "rowwise"}


def _fairseq_slices(name: str, *attentions: str) -> dict[str, str]:
    layer = f"model.{name}.layers.*"
    styles = {f"{layer}.fc1": "colwise", f"{layer}.fc2": "rowwise"}
    for attention in attentions:
        styles |= _sliced(f"{layer}.{attention}", "q_proj k_proj v_proj", "out_proj")
    return styles


def _t5_slices(name: str, *attentions: str) -> dict[str, str]:
    layer = f"{name}.block.*.layer"
    block = f"{layer}.{len(attentions)}.DenseReluDense"
    styles = {f"{block}.{up}": "colwise" for up in ("wi", "wi_0", "wi_1")} | {f"{block}.wo": "rowwise"}
    for place, attention in enumerate(attentions):
        styles |= _sliced(f"{layer}.{place}.{attention}", "q k v", "o")
        styles[f"{layer}.{place}.{attention}.relative_attention_bias"] = "embedding_by_head"
    return styles


def _fairseq_family(model_type: str, *norms: str, growth: Growth) -> Family:
    return Family(
        model_type=model_type,
        stacks=(_fairseq("encoder", norms[0]), _fairseq("decoder", norms[-1])),
        form=Form(up="fc1", down="fc2"),
        bias=True,
        activation="activation_function",
        activation_dropout="activation_dropout",
        seq2seq=True,
        embedding="model.shared.weight",
        growth=growth,
        slices={
            "lm_head": "colwise_gather_output",
            **_fairseq_slices("encoder", "self_attn"),
            **_fairseq_slices("decoder", "self_attn", "encoder_attn"),
        },
    )


def _t5_form(config: PreTrainedConfig) -> Form:
    return Form(gate="wi_0", up="wi_1", down="wo") if config.is_gated_act else Form(up="wi", down="wo")


def _t5_family(model_type: str) -> Family:
    return Family(
        model_type=model_type,
        stacks=(_t5_stack("encoder", 1, "num_layers"), _t5_stack("decoder", 2, "num_decoder_layers")),
        form=_t5_form,
        activation="dense_act_fn",
        activation_dropout="dropout_rate",
        seq2seq=True,
        embedding="shared.weight",
        config_tells_ties=False,
        growth=T5,
        slices={
            "lm_head": "colwise_gather_output",
            **_t5_slices("encoder", "SelfAttention"),
            **_t5_slices("decoder", "SelfAttention", "EncDecAttention"),
        },
        counts_heads="n_heads",
    )


_GEMMA: Final = (Stack(norm="pre_feedforward_layernorm"),)
_ATTENTION: Final = "model.layers.*.self_attn"

FAMILIES: Final = {
    family.model_type: family
    for family in (
        Family(model_type="llama", bias="mlp_bias", growth=LLAMA),
        Family(model_type="mistral", growth=LLAMA),
        Family(model_type="qwen2", growth=LLAMA),
        Family(model_type="qwen3", growth=LLAMA),
        Family(model_type="olmo2", stacks=(Stack(norm=None),), growth=OLMO2),
        *(
            Family(
                model_type=name,
                stacks=_GEMMA,
                activation="hidden_activation",
                norm_offset=1.0,
                logits_softcap="final_logit_softcapping",
                growth=GEMMA,
            )
            for name in ("gemma2", "gemma3_text")
        ),
        Family(model_type="phi3", form=Form(up="gate_up_proj", fused=True), growth=PHI3),
        Family(model_type="granite", bias="mlp_bias", logits_divisor="logits_scaling", growth=LLAMA),
        Family(
            model_type="nemotron",
            form=Form(),
            bias="mlp_bias",
            norm_offset=1.0,
            growth=LLAMA,
            slices={  # as in transformers since 5.23 or a little earlier
                **_sliced(_ATTENTION, "q_proj k_proj v_proj", "o_proj"),
                "model.layers.*.mlp.up_proj": "colwise",
                "model.layers.*.mlp.down_proj": "rowwise",
                "lm_head": "colwise_gather_output",
            },
        ),
        Family(
            model_type="gpt_neox",
            stacks=(Stack(layer="gpt_neox.layers.{layer}"),),
            form=Form(up="dense_h_to_4h", down="dense_4h_to_h"),
            bias=True,
            embedding="gpt_neox.embed_in.weight",
            renames={"lm_head.weight": "embed_out.weight"},
            growth=GPT_NEOX,
        ),
        # m2m_100 is NLLB's type, too. BART's norms come after the residual sum, so a block reads the one before it.
        _fairseq_family("m2m_100", "final_layer_norm", growth=M2M_100),
        _fairseq_family("mbart", "final_layer_norm", growth=MBART),
        _fairseq_family("bart", "self_attn_layer_norm", "encoder_attn_layer_norm", growth=BART),
        _t5_family("t5"),
        _t5_family("mt5"),
        Family(model_type="olmoe", dense=False),
        Family(
            model_type="glm4_moe",
            # Its plan leaves out the norms of queries and keys, which the larger models have.
            slices={f"{_ATTENTION}.{norm}": "replicated_with_grad_allreduce" for norm in ("q_norm", "k_norm")},
            dense=False,
        ),
        Family(model_type="deepseek_v3", dense=False),
        Family(
            model_type="gpt_oss",
            stacks=(Stack(paired=True),),
            bias=True,
            slices={
                **_sliced(_ATTENTION, "q_proj k_proj v_proj", "o_proj"),
                f"{_ATTENTION}.sinks": "colwise",
                _ATTENTION: "local_params",
            },
            dense=False,
        ),
    )
}


def dense_families() -> list[str]:
    """The types that can be upcycled."""
    return [name for name, family in FAMILIES.items() if family.dense]


def growing_families() -> list[str]:
    """The types that can be grown."""
    return [name for name, family in FAMILIES.items() if family.growth is not None]


def family_of(config: PreTrainedConfig) -> Family:
    """The row of a config; `ModelError` for a family that is not in the table."""
    return family_named(config.model_type)


def family_named(model_type: object) -> Family:
    """The row of that name; `ModelError` for a family that is not in the table."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ModelError(
            f"model_type={model_type!r} is not supported; the dense families are {', '.join(dense_families())}"
        )
    return FAMILIES[model_type]
