"""Which transformers MoE architecture represents a sparse model exactly, and why the others do not.

A twin is an architecture of transformers that computes what our backbone with grafted MoELayers
computes. Folders are written in the twin's layout, so they load without moewright. What each runtime
does with a twin's fields was read in its source or measured; see docs/formats.md.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

import torch
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moewright.backbone.family import FAMILIES, backbone_config
from moewright.errors import ModelError
from moewright.moe.config import TRAINING_FIELDS, MoEConfig

SHARED_EXPERT_SIZE: Final = 64
"""Width of the all-zero shared expert where a layout demands one: small, and divisible by serving degrees."""

NOT_WRITTEN: Final = {
    "_name_or_path",
    "chunk_size_feed_forward",
    "id2label",
    "is_encoder_decoder",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "problem_type",
    "return_dict",
    "transformers_version",
}
"""Config fields that say nothing about the model."""


@dataclass(frozen=True, kw_only=True)
class Twin:
    """One sparse architecture: names on disk, fields in config.json, and what it can represent."""

    model_type: str
    architecture: str
    backbones: tuple[str, ...]
    """Dense families it can stand for; the first is assumed for a folder that does not say."""
    router: str
    gate: str
    up: str
    down: str
    """Tensor names, with {layer} and {expert}."""
    shared_expert: str | None
    """Path of the shared expert that the layout demands, or None."""
    attention_biases: bool
    """Whether the layout demands biases of query, key and value, zero for a backbone that has none."""
    experts_field: tuple[str, ...]
    """Config fields of the number of experts; all are written, the first that is there is read."""
    size_field: str
    """Config field of the expert width."""
    renormalises: Callable[[Mapping[str, Any]], bool]
    """From config fields: are the chosen weights renormalised? (Then the order is topk-softmax.)"""
    order_fields: Callable[[bool], dict[str, Any]]
    """Config fields that ask for renormalisation or not; raises KeyError for what cannot be asked."""
    refuses: Callable[[PreTrainedConfig, Mapping[int, MoEConfig]], str | None]
    """Why this twin cannot hold such a model; None when it can."""


_HELD: Final = ("hidden_size", "expert_size", "num_experts", "top_k", "router_order", "gated", "activation")
"""Fields of a layer's config that a twin holds, or that are looked at one by one."""


def _refuses_always(config: PreTrainedConfig, layers: Mapping[int, MoEConfig]) -> str | None:
    """What no twin can hold."""
    compared = [field.name for field in fields(MoEConfig) if field.name not in TRAINING_FIELDS]
    if len({tuple(getattr(config, name) for name in compared) for config in layers.values()}) > 1:
        return "its sparse layers differ from one another"
    first = next(iter(layers.values()))
    if not first.gated:
        return "its experts have no gate"
    for field in fields(MoEConfig):
        if field.name not in {*TRAINING_FIELDS, *_HELD} and (value := getattr(first, field.name)) != field.default:
            return f"it has no {field.name}={value}"
    if first.activation != config.hidden_act:
        return f"its experts' activation {first.activation} is not the model's {config.hidden_act}"
    return None


def _mixtral_refuses(config: PreTrainedConfig, layers: Mapping[int, MoEConfig]) -> str | None:
    first = next(iter(layers.values()))
    if first.router_order != "topk-softmax":
        return "it always renormalises the chosen weights (topk-softmax)"
    if len(layers) < config.num_hidden_layers:
        return "it cannot mix dense and sparse layers"
    return None


def _qwen2_refuses(config: PreTrainedConfig, layers: Mapping[int, MoEConfig]) -> str | None:
    if _head_size(config) * config.num_attention_heads != config.hidden_size:
        return "its runtimes take hidden_size / heads for the head width, and this model's is another"
    if config.model_type == "mistral" and config.sliding_window is not None:
        return "its sliding window is not Mistral's"
    return None


def _qwen3_refuses(config: PreTrainedConfig, layers: Mapping[int, MoEConfig]) -> str | None:
    if "sliding_attention" in config.layer_types:
        return "it cannot mix full and sliding attention"
    return None


def _head_size(config: PreTrainedConfig) -> int:
    size: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return size


def _norm_topk_prob(fields: Mapping[str, Any]) -> bool:
    return bool(fields.get("norm_topk_prob", False))


_QWEN_EXPERT: Final = "model.layers.{layer}.mlp.experts.{expert}."

TWINS: Final = {
    twin.model_type: twin
    for twin in (
        Twin(
            model_type="mixtral",
            architecture="MixtralForCausalLM",
            backbones=("mistral", "llama"),
            router="model.layers.{layer}.block_sparse_moe.gate.weight",
            gate="model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight",
            up="model.layers.{layer}.block_sparse_moe.experts.{expert}.w3.weight",
            down="model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight",
            shared_expert=None,
            attention_biases=False,
            experts_field=("num_local_experts",),
            size_field="intermediate_size",
            renormalises=lambda fields: True,
            order_fields=lambda renormalise: {},
            refuses=_mixtral_refuses,
        ),
        Twin(
            model_type="qwen2_moe",
            architecture="Qwen2MoeForCausalLM",
            backbones=("qwen2", "llama", "mistral"),
            router="model.layers.{layer}.mlp.gate.weight",
            gate=_QWEN_EXPERT + "gate_proj.weight",
            up=_QWEN_EXPERT + "up_proj.weight",
            down=_QWEN_EXPERT + "down_proj.weight",
            shared_expert="model.layers.{layer}.mlp.shared_expert",
            attention_biases=True,
            experts_field=("num_experts",),
            size_field="moe_intermediate_size",
            renormalises=_norm_topk_prob,
            order_fields=lambda renormalise: {"norm_topk_prob": renormalise, "qkv_bias": True},
            refuses=_qwen2_refuses,
        ),
        Twin(
            model_type="qwen3_moe",
            architecture="Qwen3MoeForCausalLM",
            backbones=("qwen3",),
            router="model.layers.{layer}.mlp.gate.weight",
            gate=_QWEN_EXPERT + "gate_proj.weight",
            up=_QWEN_EXPERT + "up_proj.weight",
            down=_QWEN_EXPERT + "down_proj.weight",
            shared_expert=None,
            attention_biases=False,
            # transformers 5 writes num_local_experts alone; readers of version 4 know only num_experts.
            experts_field=("num_experts", "num_local_experts"),
            size_field="moe_intermediate_size",
            renormalises=_norm_topk_prob,
            order_fields=lambda renormalise: {"norm_topk_prob": renormalise},
            refuses=_qwen3_refuses,
        ),
    )
}


def choose_twin(config: PreTrainedConfig, layers: Mapping[int, MoEConfig]) -> Twin:
    """The twin that computes what this model computes; `ModelError` says why there is none."""
    reasons = []
    for twin in TWINS.values():
        if config.model_type not in twin.backbones:
            continue
        reason = _refuses_always(config, layers) or twin.refuses(config, layers)
        if reason is None:
            return twin
        reasons.append(f"{twin.model_type}: {reason}")
    raise ModelError(f"no architecture of transformers computes this {config.model_type} model ({'; '.join(reasons)})")


def dense_fields(config: PreTrainedConfig, *, dtype: torch.dtype) -> dict[str, Any]:
    """The fields of config.json for a dense model whose tensors have this dtype."""
    return _readable_by_all(_written(config), dtype)


def twin_fields(
    twin: Twin, config: PreTrainedConfig, layers: Mapping[int, MoEConfig], *, dtype: torch.dtype
) -> dict[str, Any]:
    """The fields of config.json that make the twin compute this backbone with these layers.

    Every field is written: what runtimes assume for a missing one differs.
    """
    twin_class = CONFIG_MAPPING[twin.model_type]
    known = set(_written(twin_class())) - {"model_type"}
    fields = _written(twin_class(**{k: v for k, v in config.to_dict().items() if k in known}))
    moe = next(iter(layers.values()))
    fields |= dict.fromkeys(twin.experts_field, moe.num_experts)
    fields |= {
        "architectures": [twin.architecture],
        "head_dim": _head_size(config),
        "num_experts_per_tok": moe.top_k,
        "output_router_logits": False,
        "tie_word_embeddings": False,
        twin.size_field: moe.expert_size,
    } | twin.order_fields(moe.router_order == "topk-softmax")
    if "mlp_only_layers" in fields:
        fields["decoder_sparse_step"] = 1
        fields["mlp_only_layers"] = [i for i in range(config.num_hidden_layers) if i not in layers]
    if twin.shared_expert:
        fields["shared_expert_intermediate_size"] = SHARED_EXPERT_SIZE
    return _readable_by_all(fields, dtype)


def _written(config: PreTrainedConfig) -> dict[str, Any]:
    return {key: value for key, value in config.to_dict().items() if key not in NOT_WRITTEN}


def _readable_by_all(fields: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Say the rotary settings and the dtype in the form before transformers 5, too."""
    rope = fields.get("rope_parameters") or {}
    if "rope_theta" in rope:
        scaling = {k: v for k, v in rope.items() if k != "rope_theta"}
        fields["rope_theta"] = rope["rope_theta"]
        fields["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else scaling
    fields["dtype"] = fields["torch_dtype"] = str(dtype).removeprefix("torch.")
    return fields


def split_config(
    fields: Mapping[str, Any], *, backbone: str | None, tied: bool
) -> tuple[Twin, PreTrainedConfig, dict[int, MoEConfig]]:
    """The inverse of `twin_fields`: twin, backbone config and layers from a sparse config.json.

    `backbone` is the dense family that the folder's record names; without one the twin's first. `tied`
    says whether input and output embeddings are one parameter. Raises `ModelError`.
    """
    twin = TWINS[fields["model_type"]]
    backbone = backbone or twin.backbones[0]
    if backbone not in twin.backbones:
        raise ModelError(
            f"moewright.json names the backbone {backbone!r}, but {twin.model_type} stands for "
            f"{' or '.join(twin.backbones)}; without moewright.json the first is assumed"
        )
    changes: dict[str, Any] = {"model_type": backbone, "tie_word_embeddings": tied}
    if not fields.get("use_sliding_window", True):
        changes["sliding_window"] = None  # Qwen keeps a width here also where no layer uses it
    config = backbone_config(dict(fields) | changes)
    numbers, sparse = _sparse_layout(twin, fields, count=config.num_hidden_layers)
    if twin.shared_expert and fields.get("shared_expert_intermediate_size") != SHARED_EXPERT_SIZE:
        raise ModelError(
            f"shared_expert_intermediate_size={fields.get('shared_expert_intermediate_size')}: "
            f"shared experts are not supported yet (ours, of width {SHARED_EXPERT_SIZE}, are all zero)"
        )
    if twin.attention_biases and not fields.get("qkv_bias", True):
        raise ModelError(f"qkv_bias=false: a {twin.model_type} folder without attention biases is not supported yet")
    if fields.get("router_jitter_noise"):
        raise ModelError(
            f"router_jitter_noise={fields['router_jitter_noise']}: router noise is not supported yet; set 0"
        )
    moe = MoEConfig(
        hidden_size=config.hidden_size,
        expert_size=numbers[twin.size_field],
        num_experts=numbers[twin.experts_field[0]],
        top_k=numbers["num_experts_per_tok"],
        router_order="topk-softmax" if twin.renormalises(fields) else "softmax-topk",
        activation=config.hidden_act,
    )
    layers = dict.fromkeys(sparse, moe)
    reason = twin.refuses(config, layers)
    if reason:
        raise ModelError(f"this {twin.model_type} folder cannot be read as {backbone} with sparse layers: {reason}")
    return twin, config, layers


def _sparse_layout(twin: Twin, fields: Mapping[str, Any], *, count: int) -> tuple[dict[str, int], list[int]]:
    """The numbers that a sparse config.json must give, by their fields, and which of its `count` layers are sparse."""
    step, dense = fields.get("decoder_sparse_step", 1), fields.get("mlp_only_layers")
    numbers = {
        "decoder_sparse_step": step,
        twin.experts_field[0]: next((fields[key] for key in twin.experts_field if key in fields), None),
        "num_experts_per_tok": fields.get("num_experts_per_tok"),
        twin.size_field: fields.get(twin.size_field),
    }
    for key, value in numbers.items():
        if type(value) is not int or value < 1:
            raise ModelError(
                f"config.json of type {twin.model_type}: {key}={value!r}, where a whole number is expected"
            )
    if not (dense is None or (isinstance(dense, list) and all(type(layer) is int for layer in dense))):
        raise ModelError(f"config.json of type {twin.model_type}: mlp_only_layers={dense!r} is no list of layers")
    sparse = [layer for layer in range(count) if layer not in (dense or ()) and (layer + 1) % step == 0]
    if not sparse:
        raise ModelError(f"config.json of type {twin.model_type}: none of its {count} layers is sparse")
    return numbers, sparse


def is_sparse(fields: Mapping[str, Any]) -> bool:
    """Whether a config.json is of a mixture of experts that we know; `ModelError` if we know it neither way."""
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type not in {*FAMILIES, *TWINS}:
        raise ModelError(
            f"model_type={model_type!r} is not supported; dense: {', '.join(FAMILIES)}; sparse: {', '.join(TWINS)}"
        )
    return model_type in TWINS
