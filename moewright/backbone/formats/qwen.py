"""Qwen2-MoE (arXiv 2407.10671) and Qwen3-MoE (arXiv 2505.09388): decoders that may mix dense and sparse layers."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moewright.backbone.blocks import moe_layers
from moewright.backbone.formats.base import Twin
from moewright.backbone.formats.mixtral import refuses_attention_biases
from moewright.backbone.formats.rows import NO_JITTER, Count, Fields, Layers, OfBackbone, SparseLayers, renormalises
from moewright.backbone.formats.runtimes import (
    LLAMA_CPP,
    SGLANG,
    VLLM,
    YES,
    Verdict,
    always,
    no,
    no_renormalising,
    whole_heads,
    window_not_read,
)
from moewright.backbone.slots import Slot
from moewright.errors import ModelError
from moewright.family.config import config_errors, head_size, slides
from moewright.family.table import family_of
from moewright.moe.config import MoEConfig

SILENT_SIZE: Final = 64
"""Width of the all-zero shared expert where a layout demands one: small, and divisible by serving degrees."""


class NamedDenseLayers(SparseLayers):
    """Every n-th layer is sparse, but for a list of dense ones; we write the list alone."""

    def write_layers(self, config: PreTrainedConfig, layers: Layers) -> dict[str, Any]:
        dense = [layer for layer in range(config.num_hidden_layers) if layer not in layers]
        return {"decoder_sparse_step": 1, "mlp_only_layers": dense}

    def read_layers(self, fields: Fields, config: PreTrainedConfig) -> list[int]:
        step = fields.whole("decoder_sparse_step", default=1)
        dense = fields.values.get("mlp_only_layers")
        if not (dense is None or (isinstance(dense, list) and all(type(layer) is int for layer in dense))):
            raise ModelError(f"config.json of type {fields.model_type}: mlp_only_layers={dense!r} is no list of layers")
        count = config.num_hidden_layers
        return [layer for layer in range(count) if layer not in (dense or ()) and (layer + 1) % step == 0]


class Qwen3(Twin):
    """Qwen3-MoE, which slides in every layer or in none."""

    def refuses_more(self, config: PreTrainedConfig, layers: Layers) -> str | None:
        return "it slides in every layer or in none" if len(set(slides(config))) > 1 else None

    def more_fields(self, config: PreTrainedConfig, layers: Layers) -> dict[str, Any]:
        sliding = all(slides(config))
        return {"use_sliding_window": sliding, "sliding_window": config.sliding_window if sliding else None}

    def backbone_fields(self, fields: Mapping[str, Any], *, backbone: str) -> dict[str, Any]:
        said = Fields(fields, self.name)
        sliding = said.flag("use_sliding_window", default=False) and fields.get("sliding_window", 4096) is not None
        window = said.whole("sliding_window", default=4096) if sliding else None
        # In Qwen3's own terms: from which layer on they slide.
        since = {"max_window_layers": 0} if sliding else {}
        return since | {"use_sliding_window": sliding, "sliding_window": window, "layer_types": None}


@dataclass(frozen=True, kw_only=True)
class Qwen2(Twin):
    """Qwen2-MoE, which demands a gated shared expert, and in some runtimes biases of query, key and value.

    Where a model has none, they are written as zeros. An expert that is added as it is (`shared_mode="added"`) is
    written with a gate of zeros, whose sigmoid is 1/2, and a doubled down projection: exact, since 2 is a power of two.
    Any of its layers may slide.
    """

    biases: bool = True
    """Whether a folder has biases of query, key and value; those that we write always do."""

    def variant(self, fields: Mapping[str, Any]) -> "Qwen2":
        return replace(self, biases=Fields(fields, self.name).flag("qkv_bias", default=True))

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

    def refuses_more(self, config: PreTrainedConfig, layers: Layers) -> str | None:
        if not whole_heads(config):
            return "its runtimes take hidden_size / heads for the head width, and this model's is another"
        return refuses_attention_biases(config)

    def more_fields(self, config: PreTrainedConfig, layers: Layers) -> dict[str, Any]:
        sliding = slides(config)
        return {
            "qkv_bias": True,
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
        with config_errors(self.name):
            config = CONFIG_MAPPING[self.name](**{name: fields[name] for name in names if name in fields})
        sliding = slides(config)
        if not any(sliding):
            return sliding, None
        return sliding, Fields({"sliding_window": config.sliding_window}, self.name).whole("sliding_window")

    def remembered(self, moe: MoEConfig) -> dict[str, Any]:
        if not moe.shared_size:
            return {"shared_expert": "silent"}
        return {"shared_expert": "doubled"} if moe.shared_mode == "added" else {}

    def slots(self, model: PreTrainedModel) -> list[Slot]:
        slots = super().slots(model)
        places = family_of(model.config).places(model.config)
        if self.biases and not any(slot.name.endswith("self_attn.q_proj.bias") for slot in slots):
            slots += [
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
            kind, path = self.remembered(moe.config).get("shared_expert"), f"{places[layer].layer}.mlp.shared_expert"
            D = moe.config.hidden_size
            if kind == "silent":
                slots += silent_expert(path, hidden_size=D, size=SILENT_SIZE)
                # Its gate is not zero, since llama.cpp computes silu(gate)/gate there.
                slots.append(Slot(name=f"{path}_gate.weight", shape=(1, D), fill=1.0 / D))
            elif kind == "doubled":
                down = f"{path}.down_proj.weight"
                slots = [replace(slot, factor=2.0) if slot.name == down else slot for slot in slots]
                slots.append(Slot(name=f"{path}_gate.weight", shape=(1, D), fill=0.0, must_match=True))
        return slots


def silent_expert(path: str, *, hidden_size: int, size: int) -> list[Slot]:
    """A shared expert that adds nothing, where a layout demands one: all zeros, but only the last product must be."""
    shapes = {"gate_proj": (size, hidden_size), "up_proj": (size, hidden_size), "down_proj": (hidden_size, size)}
    return [
        Slot(name=f"{path}.{name}.weight", shape=shape, fill=0.0, must_match=name == "down_proj")
        for name, shape in shapes.items()
    ]


@dataclass(frozen=True)
class SharedExpert(Count):
    """Qwen2-MoE's shared expert, of which moewright.json says whether it is silent or doubled."""

    settings = frozenset({"shared_size", "shared_mode"})

    def write(self, config: PreTrainedConfig, moe: MoEConfig) -> dict[str, Any]:
        return dict.fromkeys(self.fields, moe.shared_size or SILENT_SIZE)

    def read(self, fields: Fields, record: Fields) -> dict[str, Any]:
        shared = record.values.get("shared_expert")
        if shared == "silent":
            return {}
        return super().read(fields, record) | {"shared_mode": "added" if shared == "doubled" else "gated"}

    def refuses(self, moe: MoEConfig) -> str | None:
        residual = moe.shared_size and moe.shared_mode == "residual"
        return "its shared expert has a sigmoid gate, not a softmax of two" if residual else None


def _llama_cpp_qwen2(config: PreTrainedConfig, moe: MoEConfig) -> Verdict:
    if moe.shared_size and moe.shared_mode == "added":
        return no("it divides by the shared gate's activation, and the gate is zero")
    return no_renormalising(config, moe)


def _llama_cpp_qwen3(config: PreTrainedConfig, moe: MoEConfig) -> Verdict:
    return no("it always renormalises the chosen weights") if moe.router_order == "softmax-topk" else YES


_PARTS: Final = {
    "router.weight": "{layer}.mlp.gate.weight",
    "gate": "{layer}.mlp.experts.{expert}.gate_proj.weight",
    "up": "{layer}.mlp.experts.{expert}.up_proj.weight",
    "down": "{layer}.mlp.experts.{expert}.down_proj.weight",
}
_ROWS: Final = (
    Count("expert_size", ("moe_intermediate_size",)),
    Count("top_k", ("num_experts_per_tok",)),
    renormalises(),
    OfBackbone("head_dim", head_size),
    *NO_JITTER,
)

QWEN2_MOE: Final = Qwen2(
    name="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    backbones=("qwen2", "llama", "mistral"),
    parts=_PARTS
    | {
        "shared_gate": "{layer}.mlp.shared_expert.gate_proj.weight",
        "shared_up": "{layer}.mlp.shared_expert.up_proj.weight",
        "shared.down_proj.weight": "{layer}.mlp.shared_expert.down_proj.weight",
        "shared.gate.weight": "{layer}.mlp.shared_expert_gate.weight",
    },
    rows=(
        Count("num_experts", ("num_experts",)),
        SharedExpert("shared_size", ("shared_expert_intermediate_size",)),
        *_ROWS,
    ),
    sparse=NamedDenseLayers(),
    runtimes={
        VLLM: window_not_read(always),
        SGLANG: window_not_read(always),
        LLAMA_CPP: window_not_read(_llama_cpp_qwen2),
    },
)
QWEN3_MOE: Final = Qwen3(
    name="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    backbones=("qwen3",),
    parts=_PARTS,
    # transformers 5 writes num_local_experts alone; readers of version 4 know only num_experts.
    rows=(Count("num_experts", ("num_experts", "num_local_experts")), *_ROWS),
    sparse=NamedDenseLayers(),
    runtimes={
        VLLM: window_not_read(always),
        SGLANG: window_not_read(always),
        LLAMA_CPP: window_not_read(_llama_cpp_qwen3),
    },
)
