"""In which layout a sparse model is written: as a twin of transformers, or as our own model type.

Our own type, `moewright`, holds everything: config.json has the backbone's config and each layer's settings, the
tensors have the names of the model in memory. `import moewright.auto` teaches transformers to load it; plain
transformers refuses the type.
"""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, Final

import torch
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moewright.backbone.decoder_twins import DECODERS
from moewright.backbone.seq2seq_twins import SEQ2SEQ
from moewright.backbone.twin import Layers, Twin, dense_fields, truth
from moewright.errors import ModelError, UsageError
from moewright.family.table import FAMILIES, backbone_config, dense_families
from moewright.moe.config import MoEConfig

OWN: Final = "moewright"
"""Our own model type."""
TWINS: Final = {twin.model_type: twin for twin in (*DECODERS, *SEQ2SEQ)}
FORMATS: Final = (*TWINS, OWN)

NOT_STORED: Final = ("kernel", "causal")
"""Fields of a layer's config that belong to the machine, or to the place of the layer."""


def choose_format(config: PreTrainedConfig, layers: Layers, *, wanted: str | None = None) -> Twin | None:
    """The twin that computes what this model computes; None stands for our own model type.

    Without `wanted` the first twin that does. Raises `ModelError` if the format that is wanted does not,
    `UsageError` if there is no such format.
    """
    if wanted == OWN:
        return None
    if wanted is not None:
        if wanted not in TWINS:
            raise UsageError(f"format={wanted!r}: choose one of {', '.join(FORMATS)}")
        if reason := _refusal(TWINS[wanted], config, layers):
            raise ModelError(f"format={wanted}: it does not compute this {config.model_type} model: {reason}")
        return TWINS[wanted]
    twins = (twin for twin in TWINS.values() if twin.automatic)
    return next((twin for twin in twins if _refusal(twin, config, layers) is None), None)


def refusals(config: PreTrainedConfig, layers: Layers) -> dict[str, str]:
    """Why no twin of this backbone computes the model, by twin; those that do are not in it."""
    reasons = {
        twin.model_type: _refusal(twin, config, layers)
        for twin in TWINS.values()
        if config.model_type in twin.backbones
    }
    return {name: reason for name, reason in reasons.items() if reason is not None}


def _refusal(twin: Twin, config: PreTrainedConfig, layers: Layers) -> str | None:
    if config.model_type not in twin.backbones:
        return f"it stands for {' or '.join(twin.backbones)}"
    return twin.refuses(config, layers)


def sparse_fields(twin: Twin | None, config: PreTrainedConfig, layers: Layers, *, dtype: torch.dtype) -> dict[str, Any]:
    """The fields of config.json for a sparse model."""
    if twin is not None:
        return twin.fields(config, layers, dtype=dtype)
    seq2seq = FAMILIES[config.model_type].seq2seq
    backbone = dense_fields(config, dtype=dtype)
    return {
        "architectures": [f"MoewrightFor{'ConditionalGeneration' if seq2seq else 'CausalLM'}"],
        "backbone": backbone,
        "dtype": backbone["dtype"],
        "is_encoder_decoder": seq2seq,
        "model_type": OWN,
        "sparse_layers": _grouped(layers),
    }


def read_sparse(
    fields: Mapping[str, Any], *, record: Mapping[str, Any], tied: bool
) -> tuple[Twin | None, PreTrainedConfig, dict[int, MoEConfig]]:
    """The inverse of `sparse_fields`: twin, backbone config and layers from a sparse config.json.

    `record` is the folder's moewright.json: the family that it names is the backbone, without one the twin says which.
    `tied` says whether input and output embeddings are one parameter. Raises `ModelError`.
    """
    if fields["model_type"] == OWN:
        return _read_own(fields)
    twin = TWINS[fields["model_type"]].variant(fields)
    backbone = record.get("backbone") or twin.backbone(fields)
    if backbone not in twin.backbones:
        raise ModelError(
            f"moewright.json names the backbone {backbone!r}, but {twin.model_type} stands for "
            f"{' or '.join(twin.backbones)}; without moewright.json config.json alone decides"
        )
    changes = {"model_type": backbone, "tie_word_embeddings": tied} | twin.backbone_fields(fields, backbone=backbone)
    config = backbone_config(dict(fields) | changes)
    return twin, config, twin.layers(fields, config, record=record)


def _grouped(layers: Layers) -> list[dict[str, Any]]:
    """The layers' settings, those that are alike once: all fields that are not the default."""
    groups: dict[tuple[tuple[str, Any], ...], list[int]] = {}
    for layer, moe in layers.items():
        settings = {
            field.name: value
            for field in fields(MoEConfig)
            if field.name not in NOT_STORED and (value := getattr(moe, field.name)) != field.default
        }
        groups.setdefault(tuple(settings.items()), []).append(layer)
    return [{"layers": numbers} | dict(settings) for settings, numbers in groups.items()]


def _read_own(fields: Mapping[str, Any]) -> tuple[None, PreTrainedConfig, dict[int, MoEConfig]]:
    backbone, groups = fields.get("backbone"), fields.get("sparse_layers")
    if not isinstance(backbone, dict) or not isinstance(groups, list) or not groups:
        raise ModelError("config.json of type moewright: backbone or sparse_layers is missing; write the folder again")
    config = backbone_config(backbone)
    count = len(FAMILIES[config.model_type].places(config))
    layers: dict[int, MoEConfig] = {}
    for group in groups:
        numbers = group.get("layers") if isinstance(group, dict) else None
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < count for n in numbers):
            raise ModelError(f"config.json of type moewright: sparse_layers names {numbers!r} of {count} layers")
        moe = settings_from({key: value for key, value in group.items() if key != "layers"})
        if moe.hidden_size != config.hidden_size:
            raise ModelError(
                f"config.json of type moewright: hidden_size={moe.hidden_size} of a sparse layer, where the backbone "
                f"has {config.hidden_size}"
            )
        layers |= dict.fromkeys(numbers, moe)
    return None, config, dict(sorted(layers.items()))


def settings_from(values: Mapping[str, Any]) -> MoEConfig:
    """A layer's config from a file; `ModelError` for unknown names and values of another type."""
    known = {field.name: field for field in fields(MoEConfig)}
    for name, value in values.items():
        if name not in known or name in NOT_STORED:
            raise ModelError(f"config.json: a sparse layer has no setting {name!r}; it was written by a newer version?")
        default = known[name].default
        kind = int if default is MISSING else str if default is None else type(default)
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise ModelError(f"config.json: {name}={value!r} of a sparse layer, where a {kind.__name__} is expected")
    if missing := [name for name, field in known.items() if field.default is MISSING and name not in values]:
        raise ModelError(f"config.json: a sparse layer lacks {', '.join(missing)}")
    try:
        # Where the layer is, and so whether experts may choose there, is for `graft` to say.
        return MoEConfig(causal=values.get("choice") != "expert", **values)
    except UsageError as error:
        raise ModelError(f"config.json: a sparse layer that makes no sense: {error}") from error


def says_tied(fields: Mapping[str, Any]) -> bool:
    """Whether a sparse config.json ties its embeddings; where it does not say so, what its class takes for granted."""
    if fields["model_type"] == OWN:
        return True  # unless the backbone's own config says otherwise
    default = CONFIG_MAPPING[fields["model_type"]]().tie_word_embeddings
    return truth(fields, "tie_word_embeddings", default=default, what=fields["model_type"])


def is_sparse(fields: Mapping[str, Any]) -> bool:
    """Whether a config.json is of a mixture of experts that we know; `ModelError` if we know it neither way."""
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type not in {*dense_families(), *FORMATS}:
        raise ModelError(
            f"model_type={model_type!r} is not supported; dense: {', '.join(dense_families())}; "
            f"sparse: {', '.join(FORMATS)}"
        )
    return model_type in FORMATS
