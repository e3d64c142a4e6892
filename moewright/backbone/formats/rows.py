"""The contents of a format's config.json: one row for each setting, read in both directions.

A row ties a field of config.json to a setting of the layers (`MoEConfig`): it writes the field, reads the setting from
it, and refuses a layer that has no place there. All layers of a format have the same settings.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from transformers import PreTrainedConfig

from moewright.errors import ModelError
from moewright.family.table import family_of
from moewright.moe.config import MoEConfig

Layers = Mapping[int, MoEConfig]


@dataclass(frozen=True)
class Fields:
    """The fields of a config.json, or of moewright.json, each checked when it is asked for; `ModelError` says which."""

    values: Mapping[str, Any]
    model_type: str
    file: str = "config.json"

    def whole(self, *names: str, default: int | None = None, least: int = 1) -> int:
        """The first of these fields that is there, a whole number from `least` on."""
        name = next((name for name in names if name in self.values), names[0])
        value = self.values.get(name, default)
        if type(value) is not int or value < least:
            raise self.error(name, value, "a whole number")
        return value

    def number(self, name: str, *, default: float) -> float:
        """A finite number, 0 or more."""
        value = self.values.get(name, default)
        if type(value) not in (int, float) or not 0 <= value < float("inf"):
            raise self.error(name, value, "a number")
        return float(value)

    def flag(self, name: str, *, default: bool) -> bool:
        """True or false. A null is neither, for transformers, too."""
        value = self.values.get(name, default)
        if type(value) is not bool:
            raise self.error(name, value, "true or false")
        return value

    def error(self, name: str, value: object, expected: str) -> ModelError:
        return ModelError(f"{self.file} of type {self.model_type}: {name}={value!r}, where {expected} is expected")


class Row:
    """One setting in a format's config.json. A missing field has the default of the format's class in transformers."""

    setting: str
    """The field of a layer's config that most kinds of rows speak of."""

    @property
    def settings(self) -> frozenset[str]:
        """The fields of a layer's config that it has a place for."""
        return frozenset({self.setting} if hasattr(self, "setting") else ())

    def write(self, config: PreTrainedConfig, moe: MoEConfig) -> dict[str, Any]:
        """Fields of config.json, by the backbone's config and that of its sparse layers."""
        return {}

    def read(self, fields: Fields, record: Fields) -> dict[str, Any]:
        """Settings of the layers, by the fields of config.json and of moewright.json. Raises `ModelError`."""
        return {}

    def refuses(self, moe: MoEConfig) -> str | None:
        """Why the format cannot represent this layer."""
        return None


@dataclass(frozen=True)
class Count(Row):
    """A whole number under names of its own. All are written, the first that is there is read."""

    setting: str
    fields: tuple[str, ...]
    default: int | None = None
    """None where a folder must say it."""
    refusal: str = ""
    """Why there must be one: of layers where it is 0."""

    def write(self, config: PreTrainedConfig, moe: MoEConfig) -> dict[str, Any]:
        return dict.fromkeys(self.fields, getattr(moe, self.setting))

    def read(self, fields: Fields, record: Fields) -> dict[str, Any]:
        return {self.setting: fields.whole(*self.fields, default=self.default)}

    def refuses(self, moe: MoEConfig) -> str | None:
        return None if getattr(moe, self.setting) else self.refusal or None


@dataclass(frozen=True)
class Number(Row):
    """A number under another name."""

    setting: str
    field: str
    default: float

    def write(self, config: PreTrainedConfig, moe: MoEConfig) -> dict[str, Any]:
        return {self.field: getattr(moe, self.setting)}

    def read(self, fields: Fields, record: Fields) -> dict[str, Any]:
        return {self.setting: fields.number(self.field, default=self.default)}


@dataclass(frozen=True)
class Flag(Row):
    """A field that says by true or false which of two values a setting has."""

    setting: str
    field: str
    default: bool
    on: Any = True
    off: Any = False

    def write(self, config: PreTrainedConfig, moe: MoEConfig) -> dict[str, Any]:
        return {self.field: getattr(moe, self.setting) == self.on}

    def read(self, fields: Fields, record: Fields) -> dict[str, Any]:
        return {self.setting: self.on if fields.flag(self.field, default=self.default) else self.off}


@dataclass(frozen=True)
class Only(Row):
    """A setting of which the architecture knows one value, and config.json says nothing."""

    setting: str
    value: Any
    refusal: str
    """Why a layer with another value cannot be represented."""

    def read(self, fields: Fields, record: Fields) -> dict[str, Any]:
        return {self.setting: self.value}

    def refuses(self, moe: MoEConfig) -> str | None:
        return self.refusal if getattr(moe, self.setting) != self.value else None


@dataclass(frozen=True)
class Constant(Row):
    """A field that is always written with one value."""

    field: str
    value: Any
    refusal: str = ""
    """The objection to another value when it is read; without one any value is ignored."""
    written: bool = True
    """False for a field that is only refused: not every format with this row has it."""

    def write(self, config: PreTrainedConfig, moe: MoEConfig) -> dict[str, Any]:
        return {self.field: self.value} if self.written else {}

    def read(self, fields: Fields, record: Fields) -> dict[str, Any]:
        value = fields.values.get(self.field, self.value)
        if self.refusal and type(self.value) is bool:
            value = fields.flag(self.field, default=self.value)
        if self.refusal and value != self.value and not (value is None and self.value == 0):
            raise ModelError(f"{self.field}={value!r}: {self.refusal.format(type=fields.model_type)}")
        return {}


@dataclass(frozen=True)
class OfBackbone(Row):
    """A field that is written by the backbone's config, which reads it by itself."""

    field: str
    value: Callable[[PreTrainedConfig], Any]

    def write(self, config: PreTrainedConfig, moe: MoEConfig) -> dict[str, Any]:
        return {self.field: self.value(config)}


def renormalises(field: str = "norm_topk_prob") -> Flag:
    """The flag of softmax routers: whether the chosen weights are made to sum to 1 (not where it is missing)."""
    return Flag("router_order", field, default=False, on="topk-softmax", off="softmax-topk")


ALWAYS_RENORMALISES: Final = Only(
    "router_order", "topk-softmax", "it always renormalises the chosen weights (topk-softmax)"
)
NO_JITTER: Final = tuple(
    Constant(field, 0.0, "router noise is not supported in a folder; set 0, and train with it", written=False)
    for field in ("router_jitter_noise", "input_jitter_noise")
)
NO_ROUTER_BIAS: Final = Constant("router_bias", False, "a {type} folder with biases of its routers is not supported")


# -- which layers are sparse --


class SparseLayers(Row):
    """Which layers are sparse, as a format says it."""

    def write_layers(self, config: PreTrainedConfig, layers: Layers) -> dict[str, Any]:
        """Fields of config.json."""
        return {}

    def read_layers(self, fields: Fields, config: PreTrainedConfig) -> list[int]:
        """The numbers of the sparse layers. Raises `ModelError`."""
        raise NotImplementedError

    def refuses_layers(self, config: PreTrainedConfig, layers: Layers) -> str | None:
        """Why these cannot be the sparse ones."""
        return None


class EveryLayer(SparseLayers):
    """A decoder whose layers are all sparse."""

    def read_layers(self, fields: Fields, config: PreTrainedConfig) -> list[int]:
        return list(range(config.num_hidden_layers))

    def refuses_layers(self, config: PreTrainedConfig, layers: Layers) -> str | None:
        return "it cannot mix dense and sparse layers" if len(layers) < config.num_hidden_layers else None


@dataclass(frozen=True)
class LastLayers(SparseLayers):
    """A decoder whose first layers are dense; a field says how many."""

    field: str
    default: int

    def write_layers(self, config: PreTrainedConfig, layers: Layers) -> dict[str, Any]:
        return {self.field: min(layers)}

    def read_layers(self, fields: Fields, config: PreTrainedConfig) -> list[int]:
        dense = fields.values.get(self.field, self.default)
        if type(dense) is not int or dense < 0:
            where = f"config.json of type {fields.model_type}"
            raise ModelError(f"{where}: {self.field}={dense!r} must be a whole number, 0 or more")
        return list(range(dense, config.num_hidden_layers))

    def refuses_layers(self, config: PreTrainedConfig, layers: Layers) -> str | None:
        first = sorted(layers) == list(range(min(layers), config.num_hidden_layers))
        return None if first else "its dense layers are the first ones"


class EveryNth(SparseLayers):
    """An encoder-decoder, every n-th layer of each stack sparse, whose dense blocks are as wide as its experts."""

    def is_sparse(self, index: int, step: int) -> bool:
        """Whether the layer of this index in its stack is sparse where its config says `step`."""
        raise NotImplementedError

    def step(self, config: PreTrainedConfig, layers: Layers, *, stack: str) -> int | None:
        """The n of every n-th layer of a stack; None where the sparse layers are other ones."""
        places = enumerate(family_of(config).places(config))
        sparse = {place.index: number in layers for number, place in places if place.stack.name == stack}
        steps = range(len(sparse) + 1)
        return next((n for n in steps if all(self.is_sparse(i, n) == wanted for i, wanted in sparse.items())), None)

    def write_layers(self, config: PreTrainedConfig, layers: Layers) -> dict[str, Any]:
        return {f"{name}_sparse_step": self.step(config, layers, stack=name) for name in ("encoder", "decoder")}

    def steps(self, fields: Fields, config: PreTrainedConfig) -> dict[str, int]:
        """The step that a config.json says of each stack."""
        steps = {name: fields.values.get(f"{name}_sparse_step", 4) for name in ("encoder", "decoder")}
        for name, step in steps.items():
            if type(step) is not int or step < 0:
                where = f"config.json of type {fields.model_type}"
                raise ModelError(f"{where}: {name}_sparse_step={step!r} must be a whole number, 0 or more")
        return steps

    def read_layers(self, fields: Fields, config: PreTrainedConfig) -> list[int]:
        steps = self.steps(fields, config)
        places = enumerate(family_of(config).places(config))
        return [number for number, place in places if self.is_sparse(place.index, steps[place.stack.name])]

    def refuses_layers(self, config: PreTrainedConfig, layers: Layers) -> str | None:
        family, width = family_of(config), next(iter(layers.values())).expert_size
        dense = set(range(len(family.places(config)))) - set(layers)
        if any(family.size_of(config, layer) != width for layer in dense):
            return f"it has one width for dense blocks and experts, and these experts have {width}"
        for name in ("encoder", "decoder"):
            if self.step(config, layers, stack=name) is None:
                return f"the sparse layers of its {name} cannot be every n-th one"
        return None
