"""Small sparse models, and what is compared of them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
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


def slow_sigmoid_block(self: Any, hidden_states: Tensor) -> Tensor:
    """A sparse block of GLM-4.5 or DeepSeek-V3, token by token in float64 (arXiv 2412.19437, section 2.1.2)."""
    x_TD = hidden_states.reshape(-1, hidden_states.shape[-1]).double()
    gate, config = self.gate, self.config
    members = config.n_routed_experts // config.n_group

    def feed_forward(x_D: Tensor, gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor) -> Tensor:
        z_F = gate_FD.double() @ x_D
        return down_DF.double() @ (z_F / (1 + (-z_F).exp()) * (up_FD.double() @ x_D))

    rows = []
    for x_D in x_TD:
        scores = [1 / (1 + torch.exp(-w_D.double() @ x_D)) for w_D in gate.weight]
        values = [float(s + b) for s, b in zip(scores, gate.e_score_correction_bias, strict=True)]
        groups = [sum(sorted(values[g * members : (g + 1) * members])[-2:]) for g in range(config.n_group)]
        allowed = sorted(range(config.n_group), key=lambda g: -groups[g])[: config.topk_group]
        experts = sorted((e for e in range(len(values)) if e // members in allowed), key=lambda e: -values[e])
        chosen = experts[: config.num_experts_per_tok]
        total = sum(scores[e] for e in chosen) if config.norm_topk_prob else 1.0
        shared = self.shared_experts
        y_D = feed_forward(x_D, shared.gate_proj.weight, shared.up_proj.weight, shared.down_proj.weight)
        for e in chosen:
            gate_FD, up_FD = self.experts.gate_up_proj[e].chunk(2)
            weight = config.routed_scaling_factor * scores[e] / total
            y_D = y_D + weight * feed_forward(x_D, gate_FD, up_FD, self.experts.down_proj[e])
        rows.append(y_D)
    return torch.stack(rows).view(hidden_states.shape).to(hidden_states.dtype)
