"""The families of transformers models, one row each.

A row says where a family keeps its feed-forward blocks and what their parts are called. The rest of the project
knows a family only through its row. Layers have one number each: those of an encoder come first, then the decoder's.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moewright.errors import ModelError, UsageError
from moewright.family.axes import BART, GEMMA, GPT_NEOX, LLAMA, M2M_100, MBART, OLMO2, PHI3, T5, Growth
from moewright.moe.activations import ACTIVATIONS


@dataclass(frozen=True, kw_only=True)
class Stack:
    """The layers of a decoder or an encoder, each with one feed-forward block."""

    layer: str = "model.layers.{layer}"
    """Path of a layer."""
    block: str = "mlp"
    """Path of the feed-forward module in it; empty where its two projections stand in the layer itself."""
    norm: str | None = "post_attention_layernorm"
    """Path in the layer of the norm whose output the block reads; None where it reads the residual stream."""
    name: str = "decoder"
    causal: bool = True
    count: str = "num_hidden_layers"
    """Config field of the number of layers."""
    size: str = "intermediate_size"
    """Config field of the block's width."""
    heads: str = "num_attention_heads"
    """Config field of the number of attention heads."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """What the projections of a feed-forward block are called: `down(act(gate(x)) * up(x))` or `down(act(up(x)))`."""

    up: str = "up_proj"
    down: str = "down_proj"
    gate: str | None = None
    """None where there is no gate, or where the gate is the first half of `up`'s rows (`fused`)."""
    fused: bool = False

    @property
    def gated(self) -> bool:
        return self.fused or self.gate is not None


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where one layer is."""

    stack: Stack
    index: int

    @property
    def layer(self) -> str:
        """Path of the layer."""
        return self.stack.layer.format(layer=self.index)

    @property
    def label(self) -> str:
        return f"{self.stack.name}.{self.index}"

    def path(self, name: str) -> str:
        """Path of something inside the block."""
        return ".".join(part for part in (self.layer, self.stack.block, name) if part)


GATED: Final = Form(gate="gate_proj")


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture of transformers."""

    model_type: str
    """Its name in config.json."""
    stacks: tuple[Stack, ...] = (Stack(),)
    form: Form | Callable[[PreTrainedConfig], Form] = GATED
    bias: str | bool = False
    """Config field that says whether the block's projections have biases, or whether they have."""
    activation: str = "hidden_act"
    """Config field of the block's activation."""
    activation_dropout: str | None = None
    """Config field of the dropout between the projections in training, which experts do not have."""
    seq2seq: bool = False
    embedding: str = "model.embed_tokens.weight"
    head: str = "lm_head.weight"
    config_tells_ties: bool = True
    """Whether `tie_word_embeddings` can be believed; T5's class says true whatever a file says."""
    renames: Mapping[str, str] = field(default_factory=dict)
    """Tensor names on disk by names in memory, where they differ."""
    norm_offset: float = 0.0
    """What is added to a norm's weight before it is used."""
    growth: Growth | None = None
    """What the dims of its tensors count, for `moewright grow`; None where it cannot grow."""
    dense: bool = True
    """False for a sparse architecture whose other layers no dense one has: its blocks are replaced, never cut up."""

    def form_of(self, config: PreTrainedConfig) -> Form:
        """The form of this model's blocks."""
        return self.form if isinstance(self.form, Form) else self.form(config)

    def biased(self, config: PreTrainedConfig) -> bool:
        """Whether the projections have biases."""
        return self.bias if isinstance(self.bias, bool) else bool(getattr(config, self.bias))

    def activation_of(self, config: PreTrainedConfig) -> str:
        """The activation's name."""
        name: str = getattr(config, self.activation)
        return name

    def size_of(self, config: PreTrainedConfig, layer: int) -> int:
        """Width of a layer's feed-forward block."""
        size: int = getattr(config, self.places(config)[layer].stack.size)
        return size

    def places(self, config: PreTrainedConfig) -> list[Place]:
        """All layers, by their numbers."""
        return [
            Place(stack=stack, index=index) for stack in self.stacks for index in range(getattr(config, stack.count))
        ]

    def projection(self, config: PreTrainedConfig, part: str, layer: int) -> tuple[str, slice]:
        """Name of the tensor that holds `gate`, `up`, `down` or the bias of one, and which of its rows are it."""
        form, place = self.form_of(config), self.places(config)[layer]
        projection, _, bias = part.partition("_")
        kind, rows = bias or "weight", slice(None)
        if form.fused and projection in ("gate", "up"):
            size = getattr(config, place.stack.size)
            rows = slice(0, size) if projection == "gate" else slice(size, 2 * size)
            projection = "up"
        return f"{place.path(getattr(form, projection))}.{kind}", rows

    def on_disk(self, name: str) -> str:
        """The name on disk of a tensor."""
        return self.renames.get(name, name)


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
    )


_GEMMA: Final = (Stack(norm="pre_feedforward_layernorm"),)

FAMILIES: Final = {
    family.model_type: family
    for family in (
        Family(model_type="llama", bias="mlp_bias", growth=LLAMA),
        Family(model_type="mistral", growth=LLAMA),
        Family(model_type="qwen2", growth=LLAMA),
        Family(model_type="qwen3", growth=LLAMA),
        Family(model_type="olmo2", stacks=(Stack(norm=None),), growth=OLMO2),
        *(
            Family(model_type=name, stacks=_GEMMA, activation="hidden_activation", norm_offset=1.0, growth=GEMMA)
            for name in ("gemma2", "gemma3_text")
        ),
        Family(model_type="phi3", form=Form(up="gate_up_proj", fused=True), growth=PHI3),
        Family(model_type="granite", bias="mlp_bias", growth=LLAMA),
        Family(model_type="nemotron", form=Form(), bias="mlp_bias", norm_offset=1.0, growth=LLAMA),
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
        Family(model_type="glm4_moe", dense=False),
    )
}

UNDECLARED: Final = (
    *("rope_theta", "rope_scaling", "rope_local_base_freq", "rotary_emb_base", "rotary_pct", "partial_rotary_factor"),
    *("sliding_window_pattern", "_sliding_window_pattern", "head_dim", "decoder_start_token_id"),
)
"""Fields that transformers reads from a config whether its class names them or not: where configs before version 5
keep what is now `rope_parameters` and `layer_types`, the width of a head, what a decoder starts with."""


def dense_families() -> list[str]:
    """The types that can be upcycled."""
    return [name for name, family in FAMILIES.items() if family.dense]


def growing_families() -> list[str]:
    """The types that can be grown."""
    return [name for name, family in FAMILIES.items() if family.growth is not None]


def family_of(config: PreTrainedConfig) -> Family:
    """The row of a config; `ModelError` for a family that is not in the table."""
    return _family_named(config.model_type)


def _family_named(model_type: object) -> Family:
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ModelError(
            f"model_type={model_type!r} is not supported; the dense families are {', '.join(dense_families())}"
        )
    return FAMILIES[model_type]


def backbone_config(fields: Mapping[str, Any]) -> PreTrainedConfig:
    """A family's config from the fields of a config.json.

    Only fields that the family's config class has are let through, so that nothing in a file can
    switch on code that we did not ask for. Raises `ModelError` for a family that is not in the table.
    """
    family = _family_named(fields.get("model_type"))
    model_type = family.model_type
    config_class = CONFIG_MAPPING[model_type]
    known = {*config_class().to_dict(), *UNDECLARED} - {"transformers_version"}
    with config_errors(model_type):
        config: PreTrainedConfig = config_class.from_dict({k: v for k, v in fields.items() if k in known})
        activation = family.activation_of(config)
    if activation not in ACTIVATIONS:
        raise ModelError(
            f"{family.activation}={activation!r} is not supported; it can be {', '.join(sorted(ACTIVATIONS))}"
        )
    return config


def chosen_layers(text: str, config: PreTrainedConfig) -> tuple[int, ...]:
    """The numbers of the layers that `all`, `every:n` or a list such as `0,2,5` or `encoder.3,decoder.3` means.

    `every:n` takes the n-th, 2n-th, ... of each stack. Raises `UsageError`.
    """
    places = family_of(config).places(config)
    numbers = {str(number): number for number in range(len(places))}
    numbers |= {place.label: number for number, place in enumerate(places)}
    text = text.strip()
    if text == "all":
        return tuple(range(len(places)))
    if (step := text.removeprefix("every:")) != text:
        n = int(step) if step.isdecimal() else 0
        chosen = [number for number, place in enumerate(places) if n and (place.index + 1) % n == 0]
    else:
        chosen = [numbers.get(part.strip(), -1) for part in text.split(",")]
    if not chosen or -1 in chosen or len(set(chosen)) < len(chosen):
        names = f" or {places[0].label} to {places[-1].label}" if len(family_of(config).stacks) > 1 else ""
        most = max(place.index for place in places) + 1
        raise UsageError(
            f"layers={text!r}: use all, every:n with n from 1 to {most}, or different layers from 0 to "
            f"{len(places) - 1}{names} such as 0,2,5"
        )
    return tuple(sorted(chosen))


_SENSELESS: Final = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError),
    StrictDataclassError,
)


@contextmanager
def config_errors(model_type: str) -> Iterator[None]:
    """Turn what transformers raises for a config that makes no sense into `ModelError`."""
    try:
        yield
    except _SENSELESS as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ModelError(
            f"config.json of type {model_type} makes no model ({why}); compare it with the original"
        ) from error
