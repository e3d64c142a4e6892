"""Small sparse models, and what is compared of them."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from moewright.backbone.blocks import moe_layers
from moewright.backbone.graft import graft
from moewright.family.table import FAMILIES
from moewright.moe.config import MoEConfig
from tests.models import tiny_config, tiny_model

INPUT = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(0))


def moe_of(model_type: str, **changes: Any) -> MoEConfig:
    """Experts of the family's own form."""
    config, family = tiny_config(model_type), FAMILIES[model_type]
    return MoEConfig(
        **(
            {
                "hidden_size": 32,
                "expert_size": 16,
                "num_experts": 4,
                "top_k": 2,
                "activation": family.activation_of(config),
                "gated": family.form_of(config).gated,
                "expert_bias": family.biased(config),
            }
            | changes
        )
    )


def grafted(model_type: str, layers: Mapping[int, MoEConfig], **changes: Any) -> PreTrainedModel:
    """A tiny model with random routers and biases in the given layers."""
    model = tiny_model(model_type, **changes)
    graft(model, layers)
    with torch.no_grad():
        for moe in moe_layers(model).values():
            moe.router.weight.normal_()
            if moe.router.linear_bias is not None:
                moe.router.linear_bias.normal_()
            if moe.router.bias is not None:
                moe.router.bias.uniform_(-0.1, 0.1)
    return model


def same_state(a: PreTrainedModel, b: PreTrainedModel) -> None:
    """Fail unless both have the same tensors, to the bit."""
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def nllb(**changes: Any) -> PreTrainedModel:
    """A tiny NLLB-MoE of transformers' own class."""
    sizes = {"num_experts": 4, "encoder_sparse_step": 2, "decoder_sparse_step": 2, "moe_token_dropout": 0.0}
    return tiny_model("nllb-moe", **(sizes | changes))


SIGMOID = {"score": "sigmoid", "selection_bias": True, "renormalize": True}
SOFTMAX_FIRST: dict[str, Any] = {"router_order": "softmax-topk"}
OAI = {"router_bias": True, "activation": "swiglu_oai"}
KINDS: dict[str, tuple[str, dict[int, dict[str, Any]], dict[str, Any]]] = {
    "mixtral": ("llama", {0: {}, 1: {}}, {}),
    "mixtral, tied": ("llama", {0: {}, 1: {}}, {"tie_word_embeddings": True}),
    "qwen2_moe, silent": ("llama", {0: SOFTMAX_FIRST, 1: SOFTMAX_FIRST}, {}),
    "qwen2_moe, doubled": ("llama", {1: SOFTMAX_FIRST | {"shared_size": 8}}, {}),
    "qwen3_moe": ("qwen3", {0: {}, 1: {}}, {}),
    "flex_olmo": ("olmo2", {0: {}, 1: {}}, {}),
    "granitemoe": ("granite", {0: {}, 1: {}}, {}),
    "switch_transformers": ("t5", {n: {"top_k": 1} for n in range(4)}, {}),
    "glm4_moe": ("llama", {1: SIGMOID}, {}),
    "glm4_moe, silent": ("qwen2", {0: {"score": "sigmoid"}, 1: {"score": "sigmoid"}}, {}),
    "deepseek_v3": ("deepseek_v3", {1: SIGMOID | {"shared_size": 16}}, {}),
    "gpt_oss": ("gpt_oss", {0: OAI, 1: OAI}, {}),
    "moewright": ("llama", {0: SIGMOID}, {}),
    "moewright, inline": ("bart", {0: {}, 3: SIGMOID}, {}),
}
"""Of each format one: backbone, changes to each sparse layer's settings, changes to the config."""


def model_of(kind: str) -> PreTrainedModel:
    """A tiny model of one of these kinds."""
    model_type, layers, changes = KINDS[kind]
    return grafted(model_type, {n: moe_of(model_type, **settings) for n, settings in layers.items()}, **changes)
