"""Which transformers MoE architecture represents a sparse model exactly, and why the others do not: decoders."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moewright.backbone.glm_twin import GLM4_MOE
from moewright.backbone.graft import moe_layers
from moewright.backbone.layout import Layout, Slot
from moewright.backbone.twin import Layers, Twin, head_size, slides, truth, whole_number
from moewright.errors import ModelError
from moewright.family.table import config_errors, family_of
from moewright.moe.config import MoEConfig

SILENT_SIZE: Final = 64
"""Width of the all-zero shared expert where a layout demands one: small, and divisible by serving degrees."""

NO_JITTER: Final = ("router_jitter_noise", "input_jitter_noise")


@dataclass(frozen=True, kw_only=True)
class EveryLayer(Twin):
    """A decoder whose layers are all sparse."""

    order: str | None = None
    """The one router order it knows; None where a flag says it."""

    def refuses_layers(self, config: PreTrainedConfig, layers: Layers) -> str | None:
        order = next(iter(layers.values())).router_order
        if self.order is not None and order != self.order:
            return "it always renormalises the chosen weights (topk-softmax)"
        if len(layers) < config.num_hidden_layers:
            return "it cannot mix dense and sparse layers"
        return None

    def own_fields(self, config: PreTrainedConfig, layers: Layers) -> dict[str, Any]:
        renormalises = next(iter(layers.values())).router_order == "topk-softmax"
        return {} if self.order else {"norm_topk_prob": renormalises}

    def own_settings(self, fields: Mapping[str, Any], *, record: Mapping[str, Any]) -> dict[str, Any]:
        refuse_jitter(fields)
        return {"router_order": self.order or order_of(fields, what=self.model_type)}

    def sparse_layers(self, fields: Mapping[str, Any], config: PreTrainedConfig) -> list[int]:
        return list(range(config.num_hidden_layers))


@dataclass(frozen=True, kw_only=True)
class Mixtral(EveryLayer):
    def refuses_layers(self, config: PreTrainedConfig, layers: Layers) -> str | None:
        return super().refuses_layers(config, layers) or refuses_attention_biases(config)

    def own_fields(self, config: PreTrainedConfig, layers: Layers) -> dict[str, Any]:
        return {"head_dim": head_size(config)}


@dataclass(frozen=True, kw_only=True)
class GraniteShared(EveryLayer):
    """GraniteMoe with a shared expert whose output is added."""

    def refuses_layers(self, config: PreTrainedConfig, layers: Layers) -> str | None:
        moe = next(iter(layers.values()))
        if not moe.shared_size or moe.shared_mode != "added":
            return "it has one shared expert, whose output is added"
        return super().refuses_layers(config, layers)

    def own_fields(self, config: PreTrainedConfig, layers: Layers) -> dict[str, Any]:
        return {"shared_intermediate_size": next(iter(layers.values())).shared_size}

    def own_settings(self, fields: Mapping[str, Any], *, record: Mapping[str, Any]) -> dict[str, Any]:
        size = whole_number(fields, "shared_intermediate_size", what=self.model_type)
        return super().own_settings(fields, record=record) | {"shared_size": size, "shared_mode": "added"}


@dataclass(frozen=True, kw_only=True)
class Qwen(Twin):
    """Decoders that may mix dense and sparse layers, and honour `norm_topk_prob`."""

    def own_fields(self, config: PreTrainedConfig, layers: Layers) -> dict[str, Any]:
        return {
            "head_dim": head_size(config),
            "norm_topk_prob": next(iter(layers.values())).router_order == "topk-softmax",
            "decoder_sparse_step": 1,
            "mlp_only_layers": [layer for layer in range(config.num_hidden_layers) if layer not in layers],
        }

    def own_settings(self, fields: Mapping[str, Any], *, record: Mapping[str, Any]) -> dict[str, Any]:
        refuse_jitter(fields)
        return {"router_order": order_of(fields, what=self.model_type)}

    def sparse_layers(self, fields: Mapping[str, Any], config: PreTrainedConfig) -> list[int]:
        step = whole_number(fields, "decoder_sparse_step", what=self.model_type, default=1)
        dense = fields.get("mlp_only_layers")
        if not (dense is None or (isinstance(dense, list) and all(type(layer) is int for layer in dense))):
            raise ModelError(f"config.json of type {self.model_type}: mlp_only_layers={dense!r} is no list of layers")
        count = config.num_hidden_layers
        return [layer for layer in range(count) if layer not in (dense or ()) and (layer + 1) % step == 0]


@dataclass(frozen=True, kw_only=True)
class Qwen3(Qwen):
    """Qwen3-MoE, which slides in every layer or in none."""

    def refuses_layers(self, config: PreTrainedConfig, layers: Layers) -> str | None:
        return "it slides in every layer or in none" if len(set(slides(config))) > 1 else None

    def own_fields(self, config: PreTrainedConfig, layers: Layers) -> dict[str, Any]:
        sliding = all(slides(config))
        window = {"use_sliding_window": sliding, "sliding_window": config.sliding_window if sliding else None}
        return super().own_fields(config, layers) | window

    def backbone_fields(self, fields: Mapping[str, Any], *, backbone: str) -> dict[str, Any]:
        slides_at_all = truth(fields, "use_sliding_window", default=False, what=self.model_type)
        sliding = slides_at_all and fields.get("sliding_window", 4096) is not None
        window = whole_number(fields, "sliding_window", what=self.model_type, default=4096) if sliding else None
        # In Qwen3's own terms: from which layer on they slide.
        since = {"max_window_layers": 0} if sliding else {}
        return since | {"use_sliding_window": sliding, "sliding_window": window, "layer_types": None}


@dataclass(frozen=True, kw_only=True)
class Qwen2(Qwen):
    """Qwen2-MoE, which demands a gated shared expert, and in some runtimes biases of query, key and value.

    Where a model has none, they are written as zeros. An expert that is added as it is (`shared_mode="added"`) is
    written with a gate of zeros, whose sigmoid is 1/2, and a doubled down projection: exact, since 2 is a power of two.
    Any of its layers may slide.
    """

    biases: bool = True
    """Whether a folder has biases of query, key and value; those that we write always do."""

    def variant(self, fields: Mapping[str, Any]) -> "Qwen2":
        return replace(self, biases=truth(fields, "qkv_bias", default=True, what=self.model_type))

    def backbone(self, fields: Mapping[str, Any]) -> str:
        if self.biases:
            return "qwen2"
        sliding, _ = self._windows(fields)
        if len(set(sliding)) > 1:
            raise ModelError(
                "qkv_bias=false where some layers slide and some do not: no dense family is like that; "
                "folders where all do or none does are supported"
            )
        return "mistral" if all(sliding) else "llama"

    def refuses_layers(self, config: PreTrainedConfig, layers: Layers) -> str | None:
        if head_size(config) * config.num_attention_heads != config.hidden_size:
            return "its runtimes take hidden_size / heads for the head width, and this model's is another"
        moe = next(iter(layers.values()))
        if moe.shared_size and moe.shared_mode == "residual":
            return "its shared expert has a gate of its own, not one of two"
        return refuses_attention_biases(config)

    def own_fields(self, config: PreTrainedConfig, layers: Layers) -> dict[str, Any]:
        sliding = slides(config)
        return super().own_fields(config, layers) | {
            "qkv_bias": True,
            "shared_expert_intermediate_size": next(iter(layers.values())).shared_size or SILENT_SIZE,
            "use_sliding_window": any(sliding),
            "sliding_window": config.sliding_window if any(sliding) else 0,
            "layer_types": ["sliding_attention" if each else "full_attention" for each in sliding],
        }

    def backbone_fields(self, fields: Mapping[str, Any], *, backbone: str) -> dict[str, Any]:
        sliding, window = self._windows(fields)
        if (backbone == "llama" and any(sliding)) or (backbone == "mistral" and len(set(sliding)) > 1):
            raise ModelError(f"moewright.json names the backbone {backbone!r}, but config.json has other layer_types")
        types = ["sliding_attention" if each else "full_attention" for each in sliding]
        return {"use_sliding_window": any(sliding), "sliding_window": window, "layer_types": types}

    def _windows(self, fields: Mapping[str, Any]) -> tuple[list[bool], int | None]:
        """Of each layer, whether it slides, and how far. Where layer_types are missing, its own class says which do."""
        names = ("num_hidden_layers", "use_sliding_window", "sliding_window", "max_window_layers", "layer_types")
        with config_errors(self.model_type):
            config = CONFIG_MAPPING[self.model_type](**{name: fields[name] for name in names if name in fields})
        sliding = slides(config)
        if not any(sliding):
            return sliding, None
        return sliding, whole_number({"sliding_window": config.sliding_window}, "sliding_window", what=self.model_type)

    def own_settings(self, fields: Mapping[str, Any], *, record: Mapping[str, Any]) -> dict[str, Any]:
        settings, shared = super().own_settings(fields, record=record), record.get("shared_expert")
        if shared == "silent":
            return settings
        size = whole_number(fields, "shared_expert_intermediate_size", what=self.model_type)
        return settings | {"shared_size": size, "shared_mode": "added" if shared == "doubled" else "gated"}

    def record(self, moe: MoEConfig) -> dict[str, Any]:
        if not moe.shared_size:
            return {"shared_expert": "silent"}
        return {"shared_expert": "doubled"} if moe.shared_mode == "added" else {}

    def slots(self, model: PreTrainedModel) -> list[Slot]:
        found = super().slots(model)
        places = family_of(model.config).places(model.config)
        if self.biases and not any(slot.name.endswith("self_attn.q_proj.bias") for slot in found):
            found += [
                Slot(
                    name=f"{place.layer}.self_attn.{projection}.bias",
                    shape=(model.get_parameter(f"{place.layer}.self_attn.{projection}.weight").shape[0],),
                    fill=0.0,
                    must_match=True,
                )
                for place in places
                for projection in ("q_proj", "k_proj", "v_proj")
            ]
        for layer, moe in moe_layers(model).items():
            kind, path = self.record(moe.config).get("shared_expert"), f"{places[layer].layer}.mlp.shared_expert"
            D, S = moe.config.hidden_size, SILENT_SIZE
            if kind == "silent":
                # Its gates are not zero, since llama.cpp computes silu(gate)/gate there.
                found += [
                    Slot(name=f"{path}.gate_proj.weight", shape=(S, D), fill=0.0),
                    Slot(name=f"{path}.up_proj.weight", shape=(S, D), fill=0.0),
                    Slot(name=f"{path}.down_proj.weight", shape=(D, S), fill=0.0, must_match=True),
                    Slot(name=f"{path}_gate.weight", shape=(1, D), fill=1.0 / D),
                ]
            elif kind == "doubled":
                down = f"{path}.down_proj.weight"
                found = [replace(slot, factor=2.0) if slot.name == down else slot for slot in found]
                found.append(Slot(name=f"{path}_gate.weight", shape=(1, D), fill=0.0, must_match=True))
        return found


def refuses_attention_biases(config: PreTrainedConfig) -> str | None:
    """Llama's, which are on the output projection, too."""
    if config.model_type == "llama" and config.attention_bias:
        return "it has no biases on all four projections of attention"
    return None


def refuse_jitter(fields: Mapping[str, Any]) -> None:
    """`ModelError` for router noise, which these runtimes apply and our folders do not ask for."""
    for name in NO_JITTER:
        if fields.get(name):
            raise ModelError(
                f"{name}={fields[name]}: router noise is not supported in a folder; set 0, and train with it"
            )


def order_of(fields: Mapping[str, Any], *, what: str) -> str:
    """The router order that `norm_topk_prob` means; false where it is missing."""
    return "topk-softmax" if truth(fields, "norm_topk_prob", default=False, what=what) else "softmax-topk"


_QWEN: Final = {
    "router.weight": "{layer}.mlp.gate.weight",
    "gate": "{layer}.mlp.experts.{expert}.gate_proj.weight",
    "up": "{layer}.mlp.experts.{expert}.up_proj.weight",
    "down": "{layer}.mlp.experts.{expert}.down_proj.weight",
}
_MIXTRAL: Final = {
    "router.weight": "{layer}.block_sparse_moe.gate.weight",
    "gate": "{layer}.block_sparse_moe.experts.{expert}.w1.weight",
    "up": "{layer}.block_sparse_moe.experts.{expert}.w3.weight",
    "down": "{layer}.block_sparse_moe.experts.{expert}.w2.weight",
}
_QWEN2: Final = _QWEN | {
    "shared_gate": "{layer}.mlp.shared_expert.gate_proj.weight",
    "shared_up": "{layer}.mlp.shared_expert.up_proj.weight",
    "shared.down_proj.weight": "{layer}.mlp.shared_expert.down_proj.weight",
    "shared.gate.weight": "{layer}.mlp.shared_expert_gate.weight",
}
_GRANITE: Final = {
    "router.weight": "{layer}.block_sparse_moe.router.layer.weight",
    "experts.gate_up_proj": "{layer}.block_sparse_moe.input_linear.weight",
    "experts.down_proj": "{layer}.block_sparse_moe.output_linear.weight",
}
_GRANITE_SHARED: Final = _GRANITE | {
    "shared.gate_up_proj.weight": "{layer}.shared_mlp.input_linear.weight",
    "shared.down_proj.weight": "{layer}.shared_mlp.output_linear.weight",
}
_SHARED: Final = frozenset({"router_order", "shared_size", "shared_mode"})

DECODERS: Final[tuple[Twin, ...]] = (
    Mixtral(
        model_type="mixtral",
        architecture="MixtralForCausalLM",
        backbones=("mistral", "llama"),
        layout=Layout(parts=_MIXTRAL),
        experts_fields=("num_local_experts",),
        order="topk-softmax",
    ),
    Qwen2(
        model_type="qwen2_moe",
        architecture="Qwen2MoeForCausalLM",
        backbones=("qwen2", "llama", "mistral"),
        layout=Layout(parts=_QWEN2),
        size_fields=("moe_intermediate_size",),
        holds=_SHARED,
    ),
    Qwen3(
        model_type="qwen3_moe",
        architecture="Qwen3MoeForCausalLM",
        backbones=("qwen3",),
        layout=Layout(parts=_QWEN),
        # transformers 5 writes num_local_experts alone; readers of version 4 know only num_experts.
        experts_fields=("num_experts", "num_local_experts"),
        size_fields=("moe_intermediate_size",),
    ),
    GLM4_MOE,
    EveryLayer(
        model_type="olmoe",
        architecture="OlmoeForCausalLM",
        backbones=("olmoe",),
        layout=Layout(parts=_QWEN),
        experts_fields=("num_experts", "num_local_experts"),
    ),
    EveryLayer(
        model_type="flex_olmo",
        architecture="FlexOlmoForCausalLM",
        backbones=("olmo2",),
        layout=Layout(parts=_QWEN),
        experts_fields=("num_experts", "num_local_experts"),
    ),
    EveryLayer(
        model_type="granitemoe",
        architecture="GraniteMoeForCausalLM",
        backbones=("granite",),
        layout=Layout(parts=_GRANITE),
        experts_fields=("num_local_experts",),
        order="topk-softmax",
    ),
    GraniteShared(
        model_type="granitemoeshared",
        architecture="GraniteMoeSharedForCausalLM",
        backbones=("granite",),
        layout=Layout(parts=_GRANITE_SHARED),
        experts_fields=("num_local_experts",),
        holds=_SHARED,
        order="topk-softmax",
    ),
)
