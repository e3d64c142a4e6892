"""The interface of a format: tensor names and config.json fields of a model in memory, read and written by one rule.

A `Format` may be a dense family of transformers (`dense.py`), our own type (`own.py`), or a twin: a sparse architecture
of transformers that computes what our backbone with MoELayers computes, so its folders load without moewright.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moewright import __version__
from moewright.backbone.blocks import moe_configs, moe_layers, moe_path
from moewright.backbone.formats.rows import Fields, Layers, Row, SparseLayers
from moewright.backbone.formats.runtimes import Judge
from moewright.backbone.skeleton import embedding_of, has_tied_head
from moewright.backbone.slots import (
    FLOAT32,
    PARTS,
    Order,
    Piece,
    Slot,
    state_tensors,
    stored_dtype,
    tensors_of,
    whole_slot,
)
from moewright.errors import ModelError, UsageError
from moewright.family.config import backbone_config, readable_by_all, written
from moewright.family.row import Family, Place
from moewright.family.table import family_of
from moewright.moe.config import TRAINING_FIELDS, MoEConfig
from moewright.moe.layer import MoELayer


@dataclass(frozen=True, kw_only=True)
class Format(ABC):
    """How models are written and read."""

    name: str
    """The model_type in config.json."""
    runtimes: Mapping[str, Judge] = field(default_factory=dict)
    """Which runtimes compute its folders; none is asked of a dense one."""
    faulty: bool = False
    """Whether transformers' own code mixes its experts up; then it is chosen only where someone asks for it."""

    # -- each format says --

    @abstractmethod
    def refuses(self, config: PreTrainedConfig, layers: Layers) -> str | None:
        """Why it cannot represent this model; None if it can."""

    @abstractmethod
    def config_fields(self, config: PreTrainedConfig, layers: Layers, *, dtype: torch.dtype) -> dict[str, Any]:
        """The fields of config.json for a backbone with these sparse layers."""

    @abstractmethod
    def read(
        self, fields: Mapping[str, Any], *, record: Mapping[str, Any], tied: bool
    ) -> tuple[PreTrainedConfig, dict[int, MoEConfig]]:
        """The inverse: the backbone's config and the sparse layers.

        `record` is the folder's moewright.json: the family that it names is the backbone, without one the format says
        which. `tied` says whether input and output embeddings are one parameter. Raises `ModelError`.
        """

    # -- a format may say --

    def slots(self, model: PreTrainedModel) -> list[Slot]:
        """Every tensor of the folder that this model is written to, in the order of writing: that of the model."""
        family, sparse = family_of(model.config), moe_layers(model)
        places = family.places(model.config)
        paths = {f"{moe_path(places[layer])}.": layer for layer in sparse}
        slots = []
        for name, tensor in state_tensors(model):
            path = next((path for path in paths if name.startswith(path)), None)
            if path is None:
                slots.append(Slot(name=self.on_disk(name, family), shape=tuple(tensor.shape), target=name))
            else:
                layer, inside = paths[path], name.removeprefix(path)
                on_disk = _name_in_memory(places[layer], inside)
                slots.append(whole_slot(on_disk, inside, sparse[layer], place=places[layer], layer=layer))
        return slots

    def router_name(self, place: Place, family: Family) -> str:
        """The name on disk of a layer's router."""
        return _name_in_memory(place, "router.weight")

    def on_disk(self, name: str, family: Family) -> str:
        """The name on disk of a tensor that is not of a MoELayer, or of a layer's path."""
        return family.on_disk(name)

    def says_tied(self, fields: Mapping[str, Any]) -> bool:
        """Whether a config.json ties input and output embeddings; the backbone's own config may still say otherwise."""
        return True

    def variant(self, fields: Mapping[str, Any]) -> "Format":
        """The format as which a folder with this config.json is read, where not all have the same tensors."""
        return self

    def keeps_float32(self, name: str) -> bool:
        """Whether a tensor on disk is float32 whatever the dtype of the folder."""
        return False

    def unread(self, name: str, fields: Mapping[str, Any], config: PreTrainedConfig) -> bool:
        """Whether a folder may have a tensor of this name that the reader ignores."""
        return False

    def remembered(self, moe: MoEConfig) -> dict[str, Any]:
        """Facts about the layers that `read` needs from moewright.json to restore them."""
        return {}

    # -- for all --

    def fields(self, model: PreTrainedModel) -> dict[str, Any]:
        """The fields of config.json for a live model."""
        return self.config_fields(model.config, moe_configs(model), dtype=stored_dtype(model))

    def record(self, model: PreTrainedModel) -> dict[str, Any]:
        """Facts that `load_model` needs from `moewright.json` to restore this model."""
        layers = moe_configs(model)
        return {
            "backbone": model.config.model_type,
            "moewright": __version__,
            "tie_word_embeddings": has_tied_head(model),
        } | (self.remembered(next(iter(layers.values()))) if layers else {})


def _name_in_memory(place: Place, inside: str) -> str:
    """The name of a tensor of a MoELayer; where a layer has no module for it, below `moe`."""
    return f"{moe_path(place) if place.stack.block else f'{place.layer}.moe'}.{inside}"


_ALWAYS_HELD: Final = frozenset({"hidden_size", "activation", "gated", "expert_bias"})


@dataclass(frozen=True, kw_only=True)
class Twin(Format):
    """A sparse architecture of transformers: names on disk, fields in config.json, and what it can represent.

    The models that a format can hold follow from its rows; subclasses add conditions that no row expresses.
    """

    architecture: str
    backbones: tuple[str, ...]
    """Families it can stand for; the first is assumed for a folder that does not say."""
    parts: Mapping[str, str]
    """Names on disk by what they are, with {layer} for the path of the layer and {expert}: a part of each expert or of
    the layer, or a tensor of PARTS as a whole."""
    orders: Mapping[str, Order] = field(default_factory=dict)
    """How parts lie on disk, where that is not as in memory."""
    renames: tuple[tuple[str, str], ...] = ()
    """Regular expressions and their replacements, from our names of all other tensors to those on disk."""
    unties: bool = True
    """Whether a tied output embedding is written out, as some runtimes demand."""
    rows: tuple[Row, ...]
    """The settings of a layer in config.json."""
    sparse: SparseLayers
    """Which layers are sparse."""
    gated: bool = True
    biased: bool = False
    """The form of its experts."""
    activation: str | None = None
    """The experts' activation, where it is not the one that the backbone's config names."""

    # -- a subclass may add --

    def refuses_more(self, config: PreTrainedConfig, layers: Layers) -> str | None:
        """Why this twin cannot represent this model, beyond its rows."""
        return None

    def more_fields(self, config: PreTrainedConfig, layers: Layers) -> dict[str, Any]:
        """Config fields beyond its rows."""
        return {}

    def backbone(self, fields: Mapping[str, Any]) -> str:
        """The family that a folder is read as if moewright.json does not say which; `ModelError` if none is it."""
        return self.backbones[0]

    def backbone_fields(self, fields: Mapping[str, Any], *, backbone: str) -> dict[str, Any]:
        """Fields that mean another thing in the backbone's config."""
        return {}

    # -- for all twins --

    def refuses(self, config: PreTrainedConfig, layers: Layers) -> str | None:
        if config.model_type not in self.backbones:
            return f"it stands for {' or '.join(self.backbones)}"
        compared = [field.name for field in fields(MoEConfig) if field.name not in TRAINING_FIELDS]
        if len({tuple(getattr(moe, name) for name in compared) for moe in layers.values()}) > 1:
            return "its sparse layers differ from one another"
        first = next(iter(layers.values()))
        if first.gated != self.gated:
            return f"its experts have {'no gate' if self.gated else 'a gate'}"
        if first.expert_bias != self.biased:
            return f"its experts have {'no biases' if self.biased else 'biases'}"
        if reason := next((reason for row in self.rows if (reason := row.refuses(first))), None):
            return reason
        held = TRAINING_FIELDS.union(_ALWAYS_HELD, *(row.settings for row in self.rows))
        for setting in fields(MoEConfig):
            if setting.name not in held and (value := getattr(first, setting.name)) != setting.default:
                return f"it has no {setting.name}={value}"
        family = family_of(config)
        form = (family.form_of(config).gated, family.biased(config))
        if len(layers) < len(family.places(config)) and form != (self.gated, self.biased):
            return "its dense layers have another form (a gate, biases)"
        if first.activation != (wanted := self.activation or family.activation_of(config)):
            return f"its experts' activation {first.activation} is not the model's {wanted}"
        return self.sparse.refuses_layers(config, layers) or self.refuses_more(config, layers)

    def config_fields(self, config: PreTrainedConfig, layers: Layers, *, dtype: torch.dtype) -> dict[str, Any]:
        """Every field is written: what runtimes assume for a missing one differs."""
        twin_class = CONFIG_MAPPING[self.name]
        known = set(written(twin_class())) - {"model_type"}
        values = written(twin_class(**{k: v for k, v in config.to_dict().items() if k in known}))
        if (start := getattr(config, "decoder_start_token_id", None)) is not None:
            values["decoder_start_token_id"] = start  # whether the twin's class names it or not
        values |= {"architectures": [self.architecture], "output_router_logits": False}
        values |= {"tie_word_embeddings": False} if self.unties else {}
        for row in self.rows:
            values |= row.write(config, next(iter(layers.values())))
        values |= self.sparse.write_layers(config, layers) | self.more_fields(config, layers)
        return readable_by_all(values, dtype)

    def read(
        self, fields: Mapping[str, Any], *, record: Mapping[str, Any], tied: bool
    ) -> tuple[PreTrainedConfig, dict[int, MoEConfig]]:
        backbone = record.get("backbone") or self.backbone(fields)
        if backbone not in self.backbones:
            raise ModelError(
                f"moewright.json names the backbone {backbone!r}, but {self.name} stands for "
                f"{' or '.join(self.backbones)}; without moewright.json config.json alone decides"
            )
        # Router logits are asked for of transformers' own blocks, which a backbone of its sparse classes has no more.
        changes = {"model_type": backbone, "tie_word_embeddings": tied, "output_router_logits": False}
        config = backbone_config(dict(fields) | changes | self.backbone_fields(fields, backbone=backbone))
        said, remembered = Fields(fields, self.name), Fields(record, self.name, file="moewright.json")
        settings: dict[str, Any] = {}
        for row in self.rows:
            settings |= row.read(said, remembered)
        sparse = self.sparse.read_layers(said, config)
        if not sparse:
            raise ModelError(f"config.json of type {self.name}: none of its layers is sparse")
        try:
            moe = MoEConfig(
                hidden_size=config.hidden_size,
                gated=self.gated,
                expert_bias=self.biased,
                activation=self.activation or family_of(config).activation_of(config),
                **settings,
            )
        except UsageError as error:
            raise ModelError(f"config.json of type {self.name}: invalid sparse layers: {error}") from error
        layers = dict.fromkeys(sparse, moe)
        if reason := self.refuses(config, layers):
            raise ModelError(
                f"this {self.name} folder cannot be read as {config.model_type} with sparse layers: {reason}"
            )
        return config, layers

    def says_tied(self, fields: Mapping[str, Any]) -> bool:
        """Where the field is missing, what the twin's class takes for granted."""
        default = CONFIG_MAPPING[self.name]().tie_word_embeddings
        return Fields(fields, self.name).flag("tie_word_embeddings", default=default)

    def slots(self, model: PreTrainedModel) -> list[Slot]:
        """First what is not of a MoELayer, by its order in the model, then one sparse layer after the other."""
        family, sparse = family_of(model.config), moe_layers(model)
        places = family.places(model.config)
        paths = tuple(f"{moe_path(places[layer])}." for layer in sparse)
        slots = [slot for slot in super().slots(model) if not str(slot.target).startswith(paths)]
        if self.unties and has_tied_head(model):
            shape = tuple(embedding_of(model).shape)
            slots.append(Slot(name=self.on_disk(family.head, family), shape=shape, target=family.embedding, tied=True))
        for layer, moe in sparse.items():
            path = self.on_disk(places[layer].layer, family)
            slots += self._layer_slots(moe, place=places[layer], path=path, layer=layer)
        return slots

    def _layer_slots(self, moe: MoELayer, *, place: Place, path: str, layer: int) -> list[Slot]:
        """The tensors of a MoELayer: what is of all experts, then one expert after the other."""
        tensors = tensors_of(moe)
        slots = [
            whole_slot(template.format(layer=path), part, moe, place=place, layer=layer, order=self.orders.get(part))
            for part, template in self.parts.items()
            if part in tensors
        ]
        single = {part: template for part, template in self.parts.items() if part not in PARTS}
        held = {part for inside in tensors if inside in PARTS for part in PARTS[inside]}
        for expert in range(moe.config.num_experts):
            for part, template in single.items():
                of_expert = "{expert}" in template
                if part in held and (of_expert or expert == 0):
                    piece = Piece(part=part, layer=layer, expert=expert if of_expert else -1)
                    name = template.format(layer=path, expert=expert)
                    slots.append(Slot(name=name, shape=piece.shape(moe), pieces=(piece,)))
        return slots

    def on_disk(self, name: str, family: Family) -> str:
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name)
        return name

    def router_name(self, place: Place, family: Family) -> str:
        return self.parts["router.weight"].format(layer=self.on_disk(place.layer, family))

    def keeps_float32(self, name: str) -> bool:
        ends = tuple(self.parts[part].removeprefix("{layer}") for part in FLOAT32 if part in self.parts)
        return name.endswith(ends)
