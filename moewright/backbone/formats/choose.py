"""All formats, and which of them a model is written in."""

from collections.abc import Mapping
from typing import Any, Final

from transformers import PreTrainedConfig

from moewright.backbone.formats.base import Format, Twin
from moewright.backbone.formats.deepseek import DEEPSEEK_V3
from moewright.backbone.formats.dense import Dense
from moewright.backbone.formats.glm import GLM4_MOE
from moewright.backbone.formats.gpt_oss import GPT_OSS
from moewright.backbone.formats.granite import GRANITEMOE, GRANITEMOESHARED
from moewright.backbone.formats.mixtral import MIXTRAL
from moewright.backbone.formats.nllb import NLLB_MOE
from moewright.backbone.formats.olmo import FLEX_OLMO, OLMOE
from moewright.backbone.formats.own import OWN_TYPE
from moewright.backbone.formats.qwen import QWEN2_MOE, QWEN3_MOE
from moewright.backbone.formats.rows import Layers
from moewright.backbone.formats.switch import SWITCH_TRANSFORMERS
from moewright.errors import ModelError, UsageError
from moewright.family.table import dense_families

TWINS: Final[tuple[Twin, ...]] = (
    *(MIXTRAL, QWEN2_MOE, QWEN3_MOE, GLM4_MOE, DEEPSEEK_V3, GPT_OSS, OLMOE, FLEX_OLMO, GRANITEMOE),
    *(GRANITEMOESHARED, NLLB_MOE, SWITCH_TRANSFORMERS),
)
"""The first that computes a model is the one it is written in."""
FORMATS: Final[dict[str, Format]] = {each.name: each for each in (*TWINS, OWN_TYPE)}
"""Formats of sparse models."""


def choose_format(config: PreTrainedConfig, layers: Layers, *, wanted: str | None = None) -> Format:
    """The format of a model with these sparse layers, or with none: the one that is wanted, or the first that holds it.

    Raises `ModelError` if the format that is wanted does not, `UsageError` if there is no such format.
    """
    if not layers:
        if wanted not in (None, config.model_type):
            raise ModelError(f"format={wanted} of a dense {config.model_type} model: only sparse models have one")
        return Dense(name=config.model_type)
    if wanted is None:
        return next(each for each in formats_of(config, layers) if not each.faulty)
    if wanted not in FORMATS:
        raise UsageError(f"format={wanted!r}: choose one of {', '.join(FORMATS)}")
    if reason := FORMATS[wanted].refuses(config, layers):
        raise ModelError(f"format={wanted}: it does not compute this {config.model_type} model: {reason}")
    return FORMATS[wanted]


def formats_of(config: PreTrainedConfig, layers: Layers) -> list[Format]:
    """Every format that holds a sparse model."""
    return [each for each in FORMATS.values() if each.refuses(config, layers) is None]


def is_sparse(fields: Mapping[str, Any]) -> bool:
    """Whether a config.json is of a mixture of experts that we know; `ModelError` if we know it neither way."""
    return _model_type(fields) in FORMATS


def format_for(fields: Mapping[str, Any]) -> Format:
    """The format that a folder with this config.json is in; `ModelError` for one that we do not know."""
    model_type = _model_type(fields)
    return FORMATS[model_type].variant(fields) if model_type in FORMATS else Dense(name=model_type)


def _model_type(fields: Mapping[str, Any]) -> str:
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type not in {*dense_families(), *FORMATS}:
        raise ModelError(
            f"model_type={model_type!r} is not supported; dense: {', '.join(dense_families())}; "
            f"sparse: {', '.join(FORMATS)}"
        )
    return model_type
