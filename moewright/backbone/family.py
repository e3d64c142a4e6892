"""The dense families, one row each.

A row says where a family keeps its feed-forward block and what its parts are called. The rest of
the project knows a family only through its row.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moewright.errors import ModelError
from moewright.moe.activations import ACTIVATIONS


@dataclass(frozen=True, kw_only=True)
class Family:
    """A dense architecture whose feed-forward block is `down(act(gate(x)) * up(x))`."""

    model_type: str
    """Its name in config.json."""

    feed_forward: str = "model.layers.{layer}.mlp"
    """Path of the feed-forward module."""

    norm: str = "model.layers.{layer}.post_attention_layernorm"
    """Path of the norm whose output the feed-forward module reads."""

    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    """Names of the three projections inside the module."""

    biases: tuple[str, ...] = ()
    """Config keys that add biases which no sparse layout can hold; true means refused."""

    def projection(self, part: str, layer: int) -> str:
        """Name of the weight of `gate`, `up` or `down` in a layer."""
        return f"{self.feed_forward.format(layer=layer)}.{getattr(self, part)}.weight"


FAMILIES: Final = {
    family.model_type: family
    for family in (
        Family(model_type="llama", biases=("attention_bias", "mlp_bias")),
        Family(model_type="mistral"),
        Family(model_type="qwen2"),
        Family(model_type="qwen3"),
    )
}

LEGACY_ROPE: Final = ("rope_theta", "rope_scaling")
"""Where configs before transformers 5 keep what is now `rope_parameters`; transformers decides which wins."""


def family_of(config: PreTrainedConfig) -> Family:
    """The row of a config that `backbone_config` made."""
    return FAMILIES[config.model_type]


def backbone_config(fields: Mapping[str, Any]) -> PreTrainedConfig:
    """A dense family's config from the fields of a config.json.

    Only fields that the family's config class has are let through, so that nothing in a file can
    switch on code that we did not ask for. Raises `ModelError` for a family that is not in the table.
    """
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ModelError(f"model_type={model_type!r} is not supported; the dense families are {', '.join(FAMILIES)}")
    config_class = CONFIG_MAPPING[model_type]
    known = {*config_class().to_dict(), *LEGACY_ROPE} - {"transformers_version"}
    with _config_errors(model_type):
        config: PreTrainedConfig = config_class.from_dict({k: v for k, v in fields.items() if k in known})
    if config.hidden_act not in ACTIVATIONS:
        raise ModelError(
            f"hidden_act={config.hidden_act!r} is not supported; it can be {', '.join(sorted(ACTIVATIONS))}"
        )
    family = FAMILIES[model_type]
    for key in family.biases:
        if getattr(config, key, False):
            raise ModelError(f"{key}=true: a {model_type} model with these biases is not supported yet")
    return config


@contextmanager
def _config_errors(model_type: str) -> Iterator[None]:
    """Turn what transformers raises for a config that makes no sense into `ModelError`."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, StrictDataclassError) as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ModelError(
            f"config.json of type {model_type} makes no model ({why}); compare it with the original"
        ) from error


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Put parameters, but not buffers, of modules built inside this block on the meta device.

    Rotary frequencies are buffers that no file holds, so building everything on meta would lose them.
    """
    register = nn.Module.register_parameter

    def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None:
            param = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    setattr(nn.Module, "register_parameter", register_on_meta)  # noqa: B010  # an assignment is a type error
    try:
        yield
    finally:
        setattr(nn.Module, "register_parameter", register)  # noqa: B010


def empty_model(config: PreTrainedConfig, *, dtype: torch.dtype) -> PreTrainedModel:
    """The dense transformers model of a config: parameters on meta, buffers on CPU, embeddings tied."""
    with _config_errors(config.model_type), _parameters_on_meta():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    model.eval()
    return model


def materialise(model: nn.Module) -> None:
    """Replace every meta parameter by uninitialised memory on CPU, and every meta buffer by zeros.

    Tied parameters stay tied. The only buffers on meta are the statistics of grafted layers, which start at zero.
    """
    moved: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                if id(parameter) not in moved:
                    empty: Tensor = torch.empty_like(parameter, device="cpu")
                    moved[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                module._parameters[name] = moved[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.zeros_like(buffer, device="cpu")
