"""A sliced model has the loss, the gradients and the norm of one process; what cannot be sliced is refused by name."""

from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES

from moewright.backbone.blocks import moe_configs
from moewright.backbone.graft import graft
from moewright.backbone.load import FolderSource, fill, load_model, open_skeleton
from moewright.backbone.slots import Bring
from moewright.checkpoint.read import ModelFolder
from moewright.errors import UsageError
from moewright.family.table import FAMILIES
from moewright.moe.config import MoEConfig
from moewright.parallel.apply import ALONE, Parallel, apply
from moewright.parallel.config import Degrees, ParallelConfig, resolve
from moewright.parallel.experts import local_part
from moewright.parallel.gradients import clip_gradients
from moewright.parallel.mesh import Meshes, make_meshes
from moewright.parallel.parts import boxes_of, on_first_rank, with_part
from moewright.parallel.ranks import Ranks
from moewright.parallel.recompute import recompute
from moewright.parallel.tensor import STYLES, plan_of, sliced_sizes
from tests.models import tiny_config, tiny_model
from tests.ranks import expected_part, on_ranks

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
CLIP = 1e-2
MOE: dict[str, Any] = {
    **{"hidden_size": 32, "expert_size": 16, "num_experts": 4, "top_k": 2},
    **{"shared_size": 8, "kernel": "loop"},
}
DROPOUT = {"attention_dropout": 0.1}
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
    "llama, tied, biases": (
        "llama",
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "attention_dropout": 0.1},
        {},
    ),
    "llama, tied, odd vocabulary, padding": (
        "llama",
        {"tie_word_embeddings": True, "vocab_size": 261, "pad_token_id": 7},
        {},
    ),
    "qwen3, recomputed": ("qwen3", {}, {1: {}}),
    "t5, recomputed": ("t5", {}, {}),
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
QUICK = ("gemma3_text", "phi3", "olmo2", "glm4_moe", "gpt_oss", *list(CASES)[-8:])


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
    if "recomputed" in case:
        recompute(model, "block")
        model.train()
    return model.to(dtype)


def backward(model: PreTrainedModel, parts: list[int], *, of: int, parallel: Parallel) -> Tensor:
    """Leave the gradient of some micro-batches of a step that has so many, and return their part of its loss."""
    losses = []
    for part in parts:
        loss = loss_of(model, part=part, parts=of)
        parallel.begin_backward(model, last=part == parts[-1])
        loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses).sum()


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
    data, right, model = degrees.ranks // degrees.tp, model_of(case, dtype), model_of(case, dtype)
    apply(model, meshes(degrees))
    ranks = Ranks(rank=dist.get_rank(), size=degrees.ranks, tp=degrees.tp)
    with float64_throughout(dtype):
        expected = float(backward(right, list(range(2 * data)), of=2 * data, parallel=ALONE))
        mine = [2 * ranks.data_rank, 2 * ranks.data_rank + 1]
        loss = backward(model, mine, of=2 * data, parallel=Parallel(ranks=ranks, degrees=degrees))

    found: dict[str, float] = {}
    for clipped in (False, True):
        if clipped:
            right_norm = float(torch.nn.utils.clip_grad_norm_(right.parameters(), CLIP))
            total, norm = clip_gradients(model.parameters(), max_norm=CLIP, loss=loss, ranks=ranks)
            found |= {"the norm": abs(norm / right_norm - 1), "loss": abs(total / expected - 1)}
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
    """What every rank has whole has the same gradient on all of them, to the last bit: with dropout, in bfloat16."""
    model = model_of(case, torch.float32).train()
    apply(model, meshes(degrees))
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(model, part=0, parts=1)
    loss.backward()
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


SMOLLM2 = {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536}
SMOL: Case = (
    "llama",
    {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 36, "intermediate_size": 48, "vocab_size": 257},
    {1: {"hidden_size": 36, "shared_size": 9}},
)
TWO = Degrees(ranks=2, tp=2)
THREE = Degrees(ranks=3, tp=3)
FOUR = [Degrees(ranks=4, tp=2, dp_replicate=2), Degrees(ranks=4, tp=2, zero=3)]
MIXED = [Degrees(ranks=4, tp=2, ep=2, zero=1), Degrees(ranks=4, tp=2, etp=2, zero=2), Degrees(ranks=4, tp=4)]


def on_two_ranks(rank: int, *, folder: Path) -> None:
    as_one_process(rank, cases=list(QUICK), layouts=[TWO], dtypes=[torch.float64])
    for name in ("phi3", "t5", "llama, shared experts", "gpt_oss"):
        comes_back_whole(rank, folder=folder / name, degrees=TWO)


def comes_back_whole(rank: int, *, folder: Path, degrees: Degrees) -> None:
    """A skeleton filled from a folder, and a live model: what each rank holds, and what the first one is sent."""
    live, whole = load_model(folder), dict(load_model(folder).named_parameters())
    opened, written_as = open_skeleton(ModelFolder(folder))
    for model in (live, opened):
        apply(model, meshes(degrees))
    fill(opened, written_as, FolderSource(ModelFolder(folder)), boxes_of=boxes_of, with_part=with_part)
    for model in (live, opened):
        parameters = dict(model.named_parameters())
        assert parameters.keys() == whole.keys()
        for name, parameter in parameters.items():
            assert torch.equal(local_part(parameter), expected_part(parameter, whole[name])), name

        def work(bring: Bring, parameters: dict[str, nn.Parameter] = parameters) -> int:
            return sum(torch.equal(bring(parameter, ()), whole[name]) for name, parameter in parameters.items())

        ranks = Ranks(rank=rank, size=degrees.ranks, tp=degrees.tp)
        assert on_first_rank(parameters.values(), work, ranks=ranks) == (len(whole) if rank == 0 else None)
        dense = {name: p for name, p in whole.items() if ".experts." not in name}
        held = sum(local_part(parameters[name]).numel() for name in dense)
        assert held * degrees.tp < 1.1 * sum(p.numel() for p in dense.values()), "norms, routers and some biases"


def test_on_two_ranks(tmp_path: Path) -> None:
    for name in ("phi3", "t5", "llama, shared experts", "gpt_oss"):
        model_of(name, torch.float32).save_pretrained(tmp_path / name)
    on_ranks(partial(on_two_ranks, folder=tmp_path), tmp_path)


def on_four_ranks(rank: int, *, folder: Path) -> None:
    as_one_process(rank, cases=["phi3", "llama, shared experts"], layouts=FOUR, dtypes=[torch.float64])
    comes_back_whole(rank, folder=folder, degrees=FOUR[1])


def test_on_four_ranks(tmp_path: Path) -> None:
    model_of("llama, shared experts", torch.float32).save_pretrained(tmp_path / "model")
    on_ranks(partial(on_four_ranks, folder=tmp_path / "model"), tmp_path, ranks=4)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_families_on_two_ranks(tmp_path: Path) -> None:
    on_ranks(partial(as_one_process, cases=list(CASES), layouts=[TWO], dtypes=list(TOLERANCE)), tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_families_on_four_ranks(tmp_path: Path) -> None:
    work = partial(as_one_process, cases=list(CASES), layouts=[*FOUR, *MIXED[:2]], dtypes=list(TOLERANCE))
    on_ranks(work, tmp_path, ranks=4)


def on_three_ranks(rank: int) -> None:
    CASES["smol"] = SMOL
    as_one_process(rank, cases=["smol"], layouts=[THREE], dtypes=list(TOLERANCE))


@pytest.mark.slow
def test_three_ranks_share_three_key_value_heads(tmp_path: Path) -> None:
    on_ranks(on_three_ranks, tmp_path, ranks=3)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_style_of_a_plan_is_there(family: str) -> None:
    model = model_of(family, torch.float32)
    plan = plan_of(model)
    assert set(plan.values()) <= STYLES.keys()
    said = (model.tp_plan or {}) | dict(FAMILIES[family].slices)
    # What a plan says of transformers' own mixtures is not asked for, since MoELayers stand there.
    unused = {path for path in said if not any(fnmatch(found, path) for found in plan)}
    optional = ("q_norm", "k_norm", "relative_attention_bias", "wi", "wi_0", "wi_1")
    assert all(path.endswith(optional) or ".experts" in path or ".shared_experts." in path for path in unused), unused
    heads = [name for name in sliced_sizes(model.config, moe_configs(model)) if "heads" in name]
    gathered = ("olmo2", "phi3", "olmoe")  # attention is whole there, as with deepseek_v3
    assert bool(heads) == (family not in (*gathered, "deepseek_v3"))


def test_styles_that_cannot_be_had_are_refused_by_name() -> None:
    model, path = model_of("llama", torch.float32), "model.layers.*.self_attn.q_proj"
    for style in ALL_PARALLEL_STYLES:
        model.tp_plan = {path: style}
        if style in STYLES and issubclass(nn.Linear, STYLES[style].kind):
            continue
        with pytest.raises(UsageError, match=rf"self_attn.q_proj of llama: .* the style {style}.*: choose tp=1"):
            plan_of(model)
    model.tp_plan = {"model.layers.*.self_attn.q_proj.weight": "rowwise"}
    with pytest.raises(UsageError, match=r"q_proj.weight of llama: .* the style rowwise of parameters"):
        plan_of(model)
    with pytest.raises(UsageError, match=r"mlp.experts of olmoe: .* the style moe_tp_experts"):
        plan_of(tiny_model("olmoe", num_experts=4))
    model.tp_plan = None
    with pytest.raises(UsageError, match="transformers has no plan for slices of llama: choose tp=1"):
        plan_of(model)
    model = model_of("qwen3", torch.float32)
    model.tp_plan = {path: style for path, style in model.tp_plan.items() if "q_norm" not in path}
    with pytest.raises(UsageError, match=r"q_norm.weight of qwen3 is used by sliced heads.*choose tp=1"):
        plan_of(model)


@pytest.mark.parametrize(
    ("family", "changes", "layers", "sizes"),
    [
        ("llama", SMOLLM2, {}, (1536, 9, 3)),
        ("llama", {}, {0: {}, 1: {"shared_size": 12}}, (4, 2, 4)),
        ("phi3", {}, {}, ()),
        ("olmo2", {}, {}, (64,)),
        ("gpt_neox", {}, {}, (64, 4)),
        ("m2m_100", {"decoder_attention_heads": 2}, {}, (64, 4, 64, 2)),
        ("t5", {}, {}, (64, 4, 64, 4)),
    ],
)
def test_sizes_that_tp_must_divide(
    family: str, changes: dict[str, Any], layers: dict[int, dict[str, Any]], sizes: tuple[int, ...]
) -> None:
    configs = {layer: MoEConfig(**MOE | settings) for layer, settings in layers.items()}
    assert tuple(sliced_sizes(tiny_config(family, **changes), configs).values()) == sizes


def test_tp_that_does_not_divide_heads_is_refused() -> None:
    sliced = sliced_sizes(tiny_config("llama", **SMOLLM2))
    assert resolve(ParallelConfig(tp=3), ranks=6, experts=[], sliced=sliced).tp == 3
    message = "tp=2 with 6 ranks, 1536 units of a dense block, 9 attention heads, 3 key-value heads: choose 1 or 3"
    with pytest.raises(UsageError, match=message):
        resolve(ParallelConfig(tp=2), ranks=6, experts=[], sliced=sliced)
