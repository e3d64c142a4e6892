"""The config of a dense model: reading a config.json, writing one, and queries on it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moewright.errors import ModelError, UsageError
from moewright.family.table import family_named, family_of
from moewright.moe.activations import ACTIVATIONS

UNDECLARED: Final = (
    *("rope_theta", "rope_scaling", "rope_local_base_freq", "rotary_emb_base", "rotary_pct", "partial_rotary_factor"),
    *("sliding_window_pattern", "_sliding_window_pattern", "head_dim", "decoder_start_token_id"),
)
"""Fields that transformers reads from a config whether its class names them or not: where configs before version 5
keep what is now `rope_parameters` and `layer_types`, the width of a head, what a decoder starts with."""

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


def backbone_config(fields: Mapping[str, Any]) -> PreTrainedConfig:
    """A family's config from the fields of a config.json.

    Only fields that the family's config class has are let through, so that nothing in a file can
    switch on code that we did not ask for. Raises `ModelError` for a family that is not in the table.
    """
    family = family_named(fields.get("model_type"))
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
    """Turn transformers' errors for an invalid config into `ModelError`."""
    try:
        yield
    except _SENSELESS as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ModelError(
            f"config.json of type {model_type} makes no model ({why}); compare it with the original"
        ) from error


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
