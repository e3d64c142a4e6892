"""A row of the table of families: the places of its feed-forward blocks, and the names of their parts."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from transformers import PreTrainedConfig

from moewright.family.axes import Growth


@dataclass(frozen=True, kw_only=True)
class Stack:
    """The layers of a decoder or an encoder, each with one feed-forward block."""

    layer: str = "model.layers.{layer}"
    """Path of a layer."""
    block: str = "mlp"
    """Path of the feed-forward module in it; empty where its two projections stand in the layer itself."""
    paired: bool = False
    """Whether the layer takes the first of two outputs of its block."""
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
    """Names of the projections of a feed-forward block: `down(act(gate(x)) * up(x))` or `down(act(up(x)))`."""

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
    logits_divisor: str | None = None
    """Config field of the number by which a decoder's logits are divided."""
    logits_softcap: str | None = None
    """Config field of the largest magnitude c of a decoder's logits x, which become c tanh(x / c); None there: any."""
    config_tells_ties: bool = True
    """Whether `tie_word_embeddings` is reliable; T5's class makes it true whatever the file has."""
    renames: Mapping[str, str] = field(default_factory=dict)
    """Tensor names on disk by names in memory, where they differ."""
    norm_offset: float = 0.0
    """Number added to a norm's weight before use."""
    growth: Growth | None = None
    """The units of its tensors' dims, for `moewright grow`; None where it cannot grow."""
    slices: Mapping[str, str] = field(default_factory=dict)
    """Styles of tensor slicing by path, * for the number of a layer, beside those of transformers' own plan."""
    counts_heads: str | None = None
    """Attribute of an attention module that says how many heads it has, where its forward pass goes by that."""
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
