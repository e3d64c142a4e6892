"""Our own model type, which holds everything that no architecture of transformers does.

config.json has the backbone's config and each layer's settings, the tensors have the names of the model in memory.
`import moewright.auto` teaches transformers to load it; plain transformers refuses the type.
"""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, Final

import torch
from transformers import PreTrainedConfig

from moewright.backbone.formats.base import Format
from moewright.backbone.formats.rows import Layers
from moewright.backbone.formats.runtimes import LLAMA_CPP, SGLANG, VLLM, never
from moewright.errors import ModelError, UsageError
from moewright.family.config import backbone_config, dense_fields
from moewright.family.table import FAMILIES, family_of
from moewright.moe.config import MoEConfig

NOT_STORED: Final = ("kernel", "causal")
"""Fields of a layer's config that belong to the machine, or to the place of the layer."""


class OwnType(Format):
    def refuses(self, config: PreTrainedConfig, layers: Layers) -> str | None:
        return None

    def config_fields(self, config: PreTrainedConfig, layers: Layers, *, dtype: torch.dtype) -> dict[str, Any]:
        seq2seq = family_of(config).seq2seq
        backbone = dense_fields(config, dtype=dtype)
        return {
            "architectures": [f"MoewrightFor{'ConditionalGeneration' if seq2seq else 'CausalLM'}"],
            "backbone": backbone,
            "dtype": backbone["dtype"],
            "is_encoder_decoder": seq2seq,
            "model_type": self.name,
            "sparse_layers": _grouped(layers),
        }

    def read(
        self, fields: Mapping[str, Any], *, record: Mapping[str, Any], tied: bool
    ) -> tuple[PreTrainedConfig, dict[int, MoEConfig]]:
        backbone, groups = fields.get("backbone"), fields.get("sparse_layers")
        if not isinstance(backbone, dict) or not isinstance(groups, list) or not groups:
            raise ModelError(
                "config.json of type moewright: backbone or sparse_layers is missing; write the folder again"
            )
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
                    f"config.json of type moewright: hidden_size={moe.hidden_size} of a sparse layer, where the "
                    f"backbone has {config.hidden_size}"
                )
            layers |= dict.fromkeys(numbers, moe)
        return config, dict(sorted(layers.items()))


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


def settings_from(values: Mapping[str, Any]) -> MoEConfig:
    """A layer's config from a file; `ModelError` for unknown names and values of another type."""
    known = {field.name: field for field in fields(MoEConfig)}
    for name, value in values.items():
        if name not in known or name in NOT_STORED:
            raise ModelError(f"config.json: a sparse layer has no setting {name!r}; it was written by a newer version?")
        default = known[name].default
        kind = int if default is MISSING else str if default is None else type(default)
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise ModelError(f"config.json: {name}={value!r} of a sparse layer, where type {kind.__name__} is expected")
    if missing := [name for name, field in known.items() if field.default is MISSING and name not in values]:
        raise ModelError(f"config.json: a sparse layer lacks {', '.join(missing)}")
    try:
        # Where the layer is, and so whether experts may choose there, is for `graft` to say.
        return MoEConfig(causal=values.get("choice") != "expert", **values)
    except UsageError as error:
        raise ModelError(f"config.json: invalid settings of a sparse layer: {error}") from error


OWN_TYPE: Final = OwnType(
    name="moewright",
    runtimes=dict.fromkeys((VLLM, SGLANG, LLAMA_CPP), never("it does not know our own model type")),
)
