"""A sliced model has the loss, the gradients and the norm of one process; what cannot be sliced is refused by name."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional
from transformers import PreTrainedModel

from moewright.backbone.graft import graft
from moewright.family.table import FAMILIES
from moewright.moe.config import MoEConfig
from moewright.parallel.apply import Parallel, apply
from moewright.parallel.config import Degrees
from moewright.parallel.experts import local_part
from moewright.parallel.gradients import clip_gradients
from moewright.parallel.mesh import Meshes, make_meshes
from moewright.parallel.ranks import Ranks
from tests.models import tiny_model
from tests.ranks import expected_part, on_ranks

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
CLIP = 1e-2
MOE: dict[str, Any] = {
    **{"hidden_size": 32, "expert_size": 16, "num_experts": 4, "top_k": 2},
    **{"shared_size": 8, "kernel": "loop"},
}
Case = tuple[str, dict[str, Any], dict[int, dict[str, Any]]]
SPARSE: dict[str, Case] = {
    "olmoe": ("olmoe", {"num_experts": 4}, {0: {}, 1: {}}),
    "glm4_moe": ("glm4_moe", {"use_qk_norm": True, "first_k_dense_replace": 1, "n_routed_experts": 4}, {1: {}}),
    "deepseek_v3": ("deepseek_v3", {}, {1: {}}),
    "gpt_oss": ("gpt_oss", {}, {0: {}, 1: {}}),
}
"""The families without a dense model, whose sparse blocks are always replaced."""
CASES: dict[str, Case] = {
    **{name: (name, {}, {}) for name in FAMILIES},
    **SPARSE,
    "llama, tied, biases": ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}, {}),
    "llama, tied, odd vocabulary, padding": (
        "llama",
        {"tie_word_embeddings": True, "vocab_size": 261, "pad_token_id": 7},
        {},
    ),
    "gemma2, tied": ("gemma2", {"tie_word_embeddings": True}, {}),
    "qwen3, one sparse": ("qwen3", {}, {1: {}}),
    "llama, shared experts": (
        "llama",
        {},
        {0: {"shared_mode": "gated", "expert_bias": True}, 1: {"shared_mode": "residual", "gated": False}},
    ),
    "t5, gated, sparse": ("t5", {"feed_forward_proj": "gated-gelu"}, {1: {}, 2: {}}),
    "bart, odd vocabulary, sparse": ("bart", {"vocab_size": 261}, {0: {}, 3: {}}),
}
QUICK = ("qwen3", "gemma3_text", "phi3", "gpt_neox", "olmo2", "gpt_oss", *list(CASES)[-7:])


@contextmanager
def float64_throughout(dtype: torch.dtype) -> Iterator[None]:
    """Keep transformers from computing norms and rotations in float32 where all else is float64."""
    to = Tensor.to

    def keep(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return to(self, *(torch.float64 if arg is torch.float32 else arg for arg in args), **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        if dtype == torch.float64:
            patch.setattr(Tensor, "to", keep)
            patch.setattr(Tensor, "float", Tensor.double)
        yield


def model_of(case: str, dtype: torch.dtype) -> PreTrainedModel:
    """The same in every process."""
    kind, changes, layers = CASES[case]
    model = tiny_model(kind, **changes)
    if layers:
        torch.manual_seed(1)
        graft(model, {layer: MoEConfig(**MOE | settings) for layer, settings in layers.items()})
    return model.to(dtype)


def loss_of(model: PreTrainedModel, *, part: int, parts: int) -> Tensor:
    """The loss of one micro-batch of so many, divided by the targets of all; there is padding in it."""
    ids = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(part))
    ids[1, :2] = 7
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    again = {"decoder_input_ids": ids.flip(1)} if model.config.is_encoder_decoder else {}
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **again).logits
    loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    return loss / (parts * ids[:, 1:].numel())


@cache
def meshes(degrees: Degrees) -> Meshes:
    return make_meshes(degrees, device_type="cpu")


def class_of(name: str) -> str:
    """The largest gradient of a class is what an error is measured by."""
    kinds = ("router", "experts", "shared_expert", "norm", "bias", "attn", "Attention", "attention", "embed", "head")
    return next((kind for kind in kinds if kind in name), "other")


def errors(case: str, degrees: Degrees, dtype: torch.dtype) -> dict[str, float]:
    """Largest errors of gradients before and after clipping by class, of the loss and of the norm."""
    parts = degrees.ranks // degrees.tp
    right, model = model_of(case, dtype), model_of(case, dtype)
    apply(model, meshes(degrees))
    ranks = Ranks(rank=dist.get_rank(), size=degrees.ranks, tp=degrees.tp)
    with float64_throughout(dtype):
        expected = sum(loss_of(right, part=part, parts=parts) for part in range(parts))
        loss = loss_of(model, part=ranks.data_rank, parts=parts)
        assert isinstance(expected, Tensor)
        expected.backward()
        Parallel(ranks=ranks, degrees=degrees).begin_backward(model, last=True)
        loss.backward()

    found: dict[str, float] = {}
    for clipped in (False, True):
        if clipped:
            right_norm = float(torch.nn.utils.clip_grad_norm_(right.parameters(), CLIP))
            total, norm = clip_gradients(model.parameters(), max_norm=CLIP, loss=loss.detach(), ranks=ranks)
            found |= {"the norm": abs(norm / right_norm - 1), "loss": abs(total / float(expected.detach()) - 1)}
            assert right_norm > CLIP, "the gradient is clipped"
        gradients = {name: parameter.grad for name, parameter in right.named_parameters()}
        scales: dict[str, float] = {}
        for name, gradient in gradients.items():
            if gradient is not None:
                scales[class_of(name)] = max(scales.get(class_of(name), 0.0), float(gradient.abs().max()))
        for name, parameter in model.named_parameters():
            kind, gradient = class_of(name), gradients[name]
            assert (gradient is None) == (parameter.grad is None), name
            if gradient is not None:
                difference = local_part(parameter.grad) - expected_part(parameter, gradient)
                error = float(difference.abs().max()) / scales[kind] if difference.numel() else 0.0
                found[kind] = max(found.get(kind, 0.0), error)
    return found


def replicas_are_equal(case: str, degrees: Degrees) -> None:
    """What every rank has whole has the same gradient on all of them, to the last bit."""
    model = model_of(case, torch.float32)
    apply(model, meshes(degrees))
    loss_of(model, part=0, parts=1).backward()
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if gradient is not None and "tp" not in (gradient.device_mesh.mesh_dim_names or ()):
            everyones = [torch.empty_like(gradient.to_local()) for _ in range(degrees.ranks)]
            dist.all_gather(everyones, gradient.to_local())
            assert all(torch.equal(one, everyones[0]) for one in everyones), f"{case}: {name}"


def as_one_process(rank: int, *, cases: list[str], layouts: list[Degrees], dtypes: list[torch.dtype]) -> None:
    for case in cases:
        for degrees in layouts:
            for dtype in dtypes:
                found = errors(case, degrees, dtype)
                assert max(found.values()) <= TOLERANCE[dtype], f"{case}, {degrees}: {found}"
        replicas_are_equal(case, layouts[0])


TWO = Degrees(ranks=2, tp=2)
FOUR = [Degrees(ranks=4, tp=2, dp_replicate=2), Degrees(ranks=4, tp=2, zero=3)]


def test_families_on_two_ranks(tmp_path: Path) -> None:
    on_ranks(partial(as_one_process, cases=list(QUICK), layouts=[TWO], dtypes=[torch.float64]), tmp_path)
