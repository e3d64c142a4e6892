"""What a twin is: a sparse architecture of transformers that computes what our backbone with MoELayers computes.

Folders are written in the twin's layout, so they load without moewright. What each runtime does with a twin's fields
was read in its source or measured; see docs/formats.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moewright.backbone.layout import Layout, Slot, slots
from moewright.errors import ModelError, UsageError
from moewright.family.table import family_of
from moewright.moe.config import TRAINING_FIELDS, MoEConfig

NOT_WRITTEN: Final = {
    "_name_or_path",
    "chunk_size_feed_forward",
    "id2label",
    "is_encoder_decoder",  # the class says it
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "problem_type",
    "return_dict",
    "transformers_version",
}
"""Config fields that say nothing about the model."""

Layers = Mapping[int, MoEConfig]

_ALWAYS_HELD: Final = frozenset({"hidden_size", "expert_size", "num_experts", "top_k", "activation"})


@dataclass(frozen=True, kw_only=True)
class Twin:
    """One sparse architecture: names on disk, fields in config.json, and what it can represent.

    Subclasses say what is theirs; the methods below are for all.
    """

    model_type: str
    architecture: str
    backbones: tuple[str, ...]
    """Families it can stand for; the first is assumed for a folder that does not say."""
    layout: Layout
    experts_fields: tuple[str, ...] = ("num_experts",)
    """Config fields of the number of experts; all are written, the first that is there is read."""
    size_fields: tuple[str, ...] = ("intermediate_size",)
    """Config fields of the expert width."""
    top_k_field: str | None = "num_experts_per_tok"
    """None where the architecture knows but one number."""
    fixed_top_k: int = 0
    holds: frozenset[str] = frozenset({"router_order"})
    """Fields of a layer's config that it has a place for, beside the sizes."""
    gated: bool = True
    biased: bool = False
    """What form its experts have."""
    automatic: bool = True
    """Whether it is chosen where nobody asks for a format."""

    # -- what a subclass says --

    def refuses_layers(self, config: PreTrainedConfig, layers: Layers) -> str | None:
        """Why this twin cannot hold such a model, beyond what holds for all."""
        raise NotImplementedError

    def own_fields(self, config: PreTrainedConfig, layers: Layers) -> dict[str, Any]:
        """Config fields that are its alone."""
        raise NotImplementedError

    def own_settings(self, fields: Mapping[str, Any], *, record: Mapping[str, Any]) -> dict[str, Any]:
        """What the fields, and the folder's moewright.json, say of a layer beyond its sizes. Raises `ModelError` for
        what we cannot compute."""
        raise NotImplementedError

    def sparse_layers(self, fields: Mapping[str, Any], config: PreTrainedConfig) -> list[int]:
        """Which layers are sparse."""
        raise NotImplementedError

    def variant(self, fields: Mapping[str, Any]) -> "Twin":
        """The twin as which a folder with this config.json is read, where not all have the same tensors."""
        return self

    def backbone(self, fields: Mapping[str, Any]) -> str:
        """The family that a folder is read as if moewright.json does not say which; `ModelError` if none is it."""
        return self.backbones[0]

    def backbone_fields(self, fields: Mapping[str, Any], *, backbone: str) -> dict[str, Any]:
        """Fields that mean another thing in the backbone's config."""
        return {}

    def unread(self, name: str, fields: Mapping[str, Any], config: PreTrainedConfig) -> bool:
        """Whether a folder may have a tensor of this name that is no part of the model as we read it."""
        return False

    def record(self, moe: MoEConfig) -> dict[str, Any]:
        """What moewright.json must say of the layers for `own_settings` to give them back."""
        return {}

    def slots(self, model: PreTrainedModel) -> list[Slot]:
        """Every tensor of the folder."""
        return slots(model, self.layout)

    # -- for all --

    def refuses(self, config: PreTrainedConfig, layers: Layers) -> str | None:
        """Why this twin cannot hold such a model; None when it can."""
        compared = [field.name for field in fields(MoEConfig) if field.name not in TRAINING_FIELDS]
        if len({tuple(getattr(moe, name) for name in compared) for moe in layers.values()}) > 1:
            return "its sparse layers differ from one another"
        first = next(iter(layers.values()))
        if first.gated != self.gated:
            return f"its experts have {'no gate' if self.gated else 'a gate'}"
        if first.expert_bias != self.biased:
            return f"its experts have {'no biases' if self.biased else 'biases'}"
        held = {*TRAINING_FIELDS, *_ALWAYS_HELD, *self.holds, "gated", "expert_bias"}
        for field in fields(MoEConfig):
            value = getattr(first, field.name)
            if field.name not in held and value != field.default:
                return f"it has no {field.name}={value}"
        family = family_of(config)
        form = (family.form_of(config).gated, family.biased(config))
        if len(layers) < len(family.places(config)) and form != (self.gated, self.biased):
            return "its dense layers have another form (a gate, biases)"
        if first.activation != (wanted := family.activation_of(config)):
            return f"its experts' activation {first.activation} is not the model's {wanted}"
        return self.refuses_layers(config, layers)

    def fields(self, config: PreTrainedConfig, layers: Layers, *, dtype: torch.dtype) -> dict[str, Any]:
        """The fields of config.json that make the twin compute this backbone with these layers.

        Every field is written: what runtimes assume for a missing one differs.
        """
        twin_class = CONFIG_MAPPING[self.model_type]
        known = set(written(twin_class())) - {"model_type"}
        found = written(twin_class(**{k: v for k, v in config.to_dict().items() if k in known}))
        if (start := getattr(config, "decoder_start_token_id", None)) is not None:
            found["decoder_start_token_id"] = start  # whether the twin's class names it or not
        moe = next(iter(layers.values()))
        found |= dict.fromkeys(self.experts_fields, moe.num_experts) | dict.fromkeys(self.size_fields, moe.expert_size)
        if self.top_k_field:
            found[self.top_k_field] = moe.top_k
        if self.layout.unties:
            found["tie_word_embeddings"] = False
        found |= {"architectures": [self.architecture], "output_router_logits": False} | self.own_fields(config, layers)
        return readable_by_all(found, dtype)

    def layers(
        self, fields: Mapping[str, Any], config: PreTrainedConfig, *, record: Mapping[str, Any]
    ) -> dict[int, MoEConfig]:
        """The sparse layers that a config.json describes; `config` is the backbone's. Raises `ModelError`."""
        numbers = {
            "experts": self._number(fields, self.experts_fields),
            "size": self._number(fields, self.size_fields),
            "top_k": self._number(fields, (self.top_k_field,)) if self.top_k_field else self.fixed_top_k,
        }
        sparse = self.sparse_layers(fields, config)
        if not sparse:
            raise ModelError(f"config.json of type {self.model_type}: none of its layers is sparse")
        family = family_of(config)
        settings = self.own_settings(fields, record=record)
        try:
            moe = MoEConfig(
                hidden_size=config.hidden_size,
                expert_size=numbers["size"],
                num_experts=numbers["experts"],
                top_k=numbers["top_k"],
                activation=family.activation_of(config),
                gated=self.gated,
                expert_bias=self.biased,
                **settings,
            )
        except UsageError as error:
            raise ModelError(f"config.json of type {self.model_type}: its sparse layers cannot be: {error}") from error
        found = dict.fromkeys(sparse, moe)
        if reason := self.refuses(config, found):
            raise ModelError(
                f"this {self.model_type} folder cannot be read as {config.model_type} with sparse layers: {reason}"
            )
        return found

    def _number(self, fields: Mapping[str, Any], names: tuple[str, ...]) -> int:
        return whole_number(fields, *names, what=self.model_type)


def whole_number(fields: Mapping[str, Any], *names: str, what: str, default: int | None = None, least: int = 1) -> int:
    """The first of these fields that is there, a whole number from `least` on; `ModelError` for something else."""
    name = next((name for name in names if name in fields), names[0])
    value = fields.get(name, default)
    if type(value) is not int or value < least:
        raise ModelError(f"config.json of type {what}: {name}={value!r}, where a whole number is expected")
    return value


def number(fields: Mapping[str, Any], name: str, *, default: float, what: str) -> float:
    """The number in a field, or what its config class takes for a missing one; `ModelError` if it is none."""
    value = fields.get(name, default)
    if type(value) not in (int, float) or not 0 <= value < float("inf"):
        raise ModelError(f"config.json of type {what}: {name}={value!r}, where a number is expected")
    return float(value)


def truth(fields: Mapping[str, Any], name: str, *, default: bool, what: str, file: str = "config.json") -> bool:
    """True or false in a field, or what its config class takes for a missing one; `ModelError` for something else.

    A null is something else for transformers, too.
    """
    value = fields.get(name, default)
    if type(value) is not bool:
        raise ModelError(f"{file} of type {what}: {name}={value!r}, where true or false is expected")
    return value


def head_size(config: PreTrainedConfig) -> int:
    """Width of an attention head."""
    size: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return size


def slides(config: PreTrainedConfig) -> list[bool]:
    """Of each layer of a decoder, whether it sees no further back than `sliding_window` tokens."""
    if config.model_type == "mistral":  # which has no layer_types
        return [config.sliding_window is not None] * config.num_hidden_layers
    types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return [kind == "sliding_attention" for kind in types]


def written(config: PreTrainedConfig) -> dict[str, Any]:
    """A config's fields but those that say nothing about the model."""
    return {key: value for key, value in config.to_dict().items() if key not in NOT_WRITTEN}


def readable_by_all(fields: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Say the rotary settings and the dtype in the form before transformers 5, too."""
    rope = fields.get("rope_parameters") or {}
    if "rope_theta" in rope:
        scaling = {k: v for k, v in rope.items() if k != "rope_theta"}
        fields["rope_theta"] = rope["rope_theta"]
        fields["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else scaling
    fields["dtype"] = fields["torch_dtype"] = str(dtype).removeprefix("torch.")
    return fields


def dense_fields(config: PreTrainedConfig, *, dtype: torch.dtype) -> dict[str, Any]:
    """The fields of config.json for a dense model whose tensors have this dtype."""
    return readable_by_all(written(config), dtype)
