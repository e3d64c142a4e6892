"""A dense model, written as its family of transformers has it."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from moewright.backbone.formats.base import Format
from moewright.backbone.formats.rows import Layers
from moewright.family.config import backbone_config, dense_fields
from moewright.moe.config import MoEConfig


class Dense(Format):
    """One dense family; the tensors have the names of the model in memory, but for a few renamed by transformers."""

    def refuses(self, config: PreTrainedConfig, layers: Layers) -> str | None:
        return "it has no sparse layers" if layers else None

    def config_fields(self, config: PreTrainedConfig, layers: Layers, *, dtype: torch.dtype) -> dict[str, Any]:
        return dense_fields(config, dtype=dtype)

    def fields(self, model: PreTrainedModel) -> dict[str, Any]:
        return super().fields(model) | {"architectures": [type(model).__name__]}

    def read(
        self, fields: Mapping[str, Any], *, record: Mapping[str, Any], tied: bool
    ) -> tuple[PreTrainedConfig, dict[int, MoEConfig]]:
        return backbone_config(fields), {}
