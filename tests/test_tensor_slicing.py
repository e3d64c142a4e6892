"""A sliced model has the logits and the gradients of one process; what cannot be sliced is refused by name."""

import copy
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn import functional
from transformers import PreTrainedModel

from moewright.backbone.graft import graft
from moewright.family.table import FAMILIES
from moewright.moe.config import MoEConfig
from moewright.parallel.experts import local_part
from moewright.parallel.tensor import slice_dense
from tests.models import tiny_model
from tests.ranks import expected_part, on_ranks

TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-5}
MOE = MoEConfig(hidden_size=32, expert_size=16, num_experts=4, top_k=2, kernel="loop", shared_size=8)
SPARSE: dict[str, dict[str, Any]] = {
    "olmoe": {"num_experts": 4},
    "glm4_moe": {"use_qk_norm": True, "first_k_dense_replace": 1, "n_routed_experts": 4},
    "deepseek_v3": {},
    "gpt_oss": {"num_key_value_heads": 2},
}
"""Families that are sparse, with the sizes of their tiny models; one layer of glm4_moe and deepseek_v3 is dense."""
VARIANTS: dict[str, tuple[str, dict[str, Any], dict[int, MoEConfig]]] = {
    "llama, tied, biases": ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}, {}),
    "llama, odd vocabulary, padding": ("llama", {"vocab_size": 261, "pad_token_id": 7, "tie_word_embeddings": True}, {}),
    "gemma2, tied": ("gemma2", {"tie_word_embeddings": True}, {}),
    "qwen2, one sparse": ("qwen2", {}, {1: MOE}),
    "llama, shared experts": (
        "llama",
        {},
        {
            0: MoEConfig(**vars(MOE) | {"shared_mode": "gated", "expert_bias": True}),
            1: MoEConfig(**vars(MOE) | {"shared_mode": "residual", "gated": False}),
        },
    ),
    "t5, gated, untied, sparse": ("t5", {"feed_forward_proj": "gated-gelu"}, {1: MOE, 2: MOE}),
    "bart, odd vocabulary, sparse": ("bart", {"vocab_size": 261}, {0: MOE, 3: MOE}),
}


def cases() -> Iterator[str]:
    yield from FAMILIES
    yield from VARIANTS


def model_of(case: str) -> PreTrainedModel:
    """The same in every process."""
    kind, changes, layers = VARIANTS.get(case, (case, SPARSE.get(case, {}), {}))
    model = tiny_model(kind, **changes)
    if case in SPARSE:
        layers = dict.fromkeys((1,) if case in ("glm4_moe", "deepseek_v3") else (0, 1), MOE)
    if layers:
        torch.manual_seed(1)
        graft(model, layers)
    return model


def loss_of(model: PreTrainedModel) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 256, (2, 12), generator=generator)
    ids[1, :2] = 7
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    again = {"decoder_input_ids": ids.flip(1)} if model.config.is_encoder_decoder else {}
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **again).logits
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def sliced_as_one_process(rank: int, *, names: list[str], dtype: torch.dtype) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    for case in names:
        right = model_of(case).to(dtype)
        model = copy.deepcopy(right)
        slice_dense(model, mesh)
        expected, loss = loss_of(right), loss_of(model)
        expected.backward()
        loss.backward()
        torch.testing.assert_close(loss, expected, rtol=TOLERANCE[dtype], atol=0)
        gradients = {name: parameter.grad for name, parameter in right.named_parameters()}
        for name, parameter in model.named_parameters():
            if gradients[name] is None:
                assert parameter.grad is None, name
                continue
            one = expected_part(parameter, gradients[name])
            ours = local_part(parameter.grad)
            error = float((ours - one).abs().max() / gradients[name].abs().max().clamp(min=1e-3))
            assert error <= TOLERANCE[dtype], f"{case}, {name}: {error}"
            if not isinstance(parameter, DTensor):
                everyones = [torch.empty_like(ours) for _ in range(mesh.size())]
                dist.all_gather(everyones, ours)
                assert all(torch.equal(ours, other) for other in everyones), f"{case}, {name} differs among ranks"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_every_family(tmp_path: Path, dtype: torch.dtype) -> None:
    on_ranks(partial(sliced_as_one_process, names=list(cases()), dtype=dtype), tmp_path)
