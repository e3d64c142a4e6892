"""Growth against the definition, neuron by neuron in float64, against the source model, and against bad input."""

import dataclasses
import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.mt5.modeling_mt5 import MT5LayerNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from moewright.backbone.inspect import inspect_folder
from moewright.backbone.load import load_model
from moewright.backbone.skeleton import has_tied_head
from moewright.checkpoint.read import ModelFolder
from moewright.convert.make import lazy_tensors, make_model
from moewright.errors import DataError, ModelError, UsageError
from moewright.family.table import FAMILIES, dense_families, growing_families
from moewright.grow.apply import grow_folder, growth_of
from moewright.grow.config import GrowConfig, Sizes, grown_sizes, hidden_step
from moewright.grow.maps import grow_tensor, layer_map, neuron_map
from moewright.upcycle.apply import upcycle_folder
from moewright.upcycle.config import UpcycleConfig
from tests.grow_reference import decoder, slow_growth, unfused
from tests.models import DECODERS, SIZES, logits_of, plain_transformers, relative, tiny_model, write_dense

INPUT = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))
TEXT = "def add(a, b):\n    return a + b\n\n" * 20
GROWING_DECODERS = [name for name in growing_families() if name in DECODERS]
SETTINGS = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "olmo2": {"attention_bias": True},
    "gemma2": {"query_pre_attn_scalar": 11, "sliding_window": 4},
    "gemma3_text": {"query_pre_attn_scalar": 11, "sliding_window": 4, "sliding_window_pattern": 2},
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}},
    "granite": {
        "attention_bias": True, "mlp_bias": True, "attention_multiplier": 0.3, "embedding_multiplier": 3.0,
        "logits_scaling": 5.0, "residual_multiplier": 0.5,
    },
    "nemotron": {"attention_bias": True, "mlp_bias": True},
}  # fmt: skip
"""What is special of a family and not on by default."""


def grouped(model_type: str) -> bool:
    """Whether the family can have fewer key and value heads than heads."""
    return "num_key_value_heads" in SIZES.get(model_type, {"num_key_value_heads": 2})


def dense(folder: Path, model_type: str, **changes) -> Path:
    """A tiny model with what is special of its family, in `folder`/dense."""
    if not grouped(model_type):
        changes.pop("num_key_value_heads", None)
    return write_dense(folder / "dense", model_type, **(SETTINGS.get(model_type, {}) | changes))


@torch.no_grad()
def logits(model, ids=INPUT):
    return model(input_ids=ids, use_cache=False).logits


def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def source_state(folder: Path) -> dict[str, torch.Tensor]:
    model_folder = ModelFolder(folder)
    return {name: model_folder.read(name).double() for name in model_folder.tensors}


def grown_state(folder: Path, config: GrowConfig) -> dict[str, torch.Tensor]:
    tensors = lazy_tensors(growth_of(folder, config, dtype=torch.float64))
    return {name: next(iter(tensor.make())) for name, tensor in tensors.items()}


def exact_logits(folder: Path, ids=INPUT) -> torch.Tensor:
    """Logits of a folder in float64: a decoder's by the definition, an encoder-decoder's by transformers."""
    config = AutoConfig.from_pretrained(folder)
    if not config.is_encoder_decoder:
        return torch.stack([decoder(source_state(folder), config, text) for text in ids])
    return logits_of(load_model(folder, dtype=torch.float64), ids)


@pytest.fixture(autouse=True)
def norms_of_t5_in_float64(monkeypatch):
    """T5 takes the mean of the squares in float32, whatever it computes in."""

    def forward(self, x):
        wide = x if x.dtype == torch.float64 else x.float()
        return self.weight * (x * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)).to(x.dtype)

    for norm in (T5LayerNorm, MT5LayerNorm):
        monkeypatch.setattr(norm, "forward", forward)


@pytest.mark.parametrize("model_type", GROWING_DECODERS)
@pytest.mark.parametrize("tied", [False, True])
def test_the_definition_is_the_model_of_transformers(tmp_path, model_type, tied):
    source = dense(tmp_path, model_type, tie_word_embeddings=tied)
    config, plain = AutoConfig.from_pretrained(source), plain_transformers(source)
    plain.set_attn_implementation("eager")  # of transformers 5.16 no other caps gemma2's scores
    assert relative(decoder(source_state(source), config, INPUT[0]), logits_of(plain, INPUT)[0].double()) <= 1e-5


# What is exact.


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("model_type", "kv_heads"),
    [(name, n) for name in growing_families() for n in ([1, 2, 4] if grouped(name) else [4])],
)
def test_width_fpi_preserves_the_function(tmp_path, model_type, tied, kv_heads):
    source = dense(tmp_path, model_type, tie_word_embeddings=tied, num_key_value_heads=kv_heads)
    hidden = None if model_type == "m2m_100" else 96 if kv_heads == 2 else 64
    growth = GrowConfig(hidden_size=hidden, intermediate_size=100, seed=kv_heads)
    report = grow_folder(source, tmp_path / "grown", growth, verify_text=text_file(tmp_path))
    before, plain = plain_transformers(source), plain_transformers(tmp_path / "grown")
    assert relative(logits_of(plain, INPUT), logits_of(before, INPUT)) <= 1e-5
    assert torch.equal(logits_of(load_model(tmp_path / "grown"), INPUT), logits_of(plain, INPUT))
    assert has_tied_head(plain) == has_tied_head(before)
    if grouped(model_type):
        assert plain.config.num_key_value_heads == (kv_heads if kv_heads < 4 else plain.config.num_attention_heads)
    assert plain.config.num_attention_heads * 8 == plain.config.hidden_size
    assert report.summary["function_preserving"]
    (comparison,) = report.comparisons
    assert comparison.relative_logit_difference <= 1e-5
    (facts,) = report.as_dict()["comparisons"]
    assert facts["grown_perplexity"] == pytest.approx(facts["source_perplexity"], rel=1e-5)
    # Without the rounding of float32 nothing is left of the difference.
    grow_folder(source, tmp_path / "exact", growth, dtype=torch.float64)
    assert relative(exact_logits(tmp_path / "exact"), exact_logits(source)) <= 1e-12


@pytest.mark.parametrize("model_type", [name for name in growing_families() if name != "m2m_100"])
def test_each_size_grows_alone(tmp_path, model_type):
    source = dense(tmp_path, model_type)
    for growth in (GrowConfig(hidden_size=96), GrowConfig(intermediate_size=67, seed=1)):
        grow_folder(source, tmp_path / "exact", growth, dtype=torch.float64, overwrite=True)
        assert relative(exact_logits(tmp_path / "exact"), exact_logits(source)) <= 1e-12


@pytest.mark.parametrize("model_type", [name for name in GROWING_DECODERS if name not in ("qwen2", "gpt_neox")])
def test_head_widths_of_their_own_are_kept(tmp_path, model_type):
    # As in Qwen3-0.6B, where heads * head_dim is twice the model width; qwen2 and gpt_neox have no such field.
    source = dense(tmp_path, model_type, head_dim=16)
    grow_folder(source, tmp_path / "grown", GrowConfig(hidden_size=64))
    plain = plain_transformers(tmp_path / "grown")
    assert relative(logits_of(plain, INPUT), logits_of(plain_transformers(source), INPUT)) <= 1e-5
    assert plain.model.layers[0].self_attn.o_proj.weight.shape == (64, 8 * 16)


def test_embeddings_scaled_by_the_width_keep_their_scale(tmp_path):
    # gemma always, the others where their config says so; T5 1.1 has an output embedding of its own, and may scale.
    cases = [("mbart", {"scale_embedding": True}), ("bart", {"scale_embedding": True})]
    cases += [("mbart", {"scale_embedding": True, "tie_word_embeddings": False})]
    for number, (model_type, changes) in enumerate(cases):
        source = dense(tmp_path / str(number), model_type, **changes)
        grow_folder(source, tmp_path / f"{number}g", GrowConfig(hidden_size=96), dtype=torch.float64)
        assert relative(exact_logits(tmp_path / f"{number}g"), exact_logits(source)) <= 1e-12
    for scales in (None, False):
        model = tiny_model("t5", **({} if scales is None else {"tie_word_embeddings": scales}))
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
        model.all_tied_weights_keys.pop("lm_head.weight")
        source = tmp_path / f"t5-{scales}"
        model.save_pretrained(source)
        assert not has_tied_head(load_model(source))
        grow_folder(source, tmp_path / f"{scales}g", GrowConfig(hidden_size=96), dtype=torch.float64)
        assert not has_tied_head(load_model(tmp_path / f"{scales}g"))
        assert load_model(tmp_path / f"{scales}g").config.scale_decoder_outputs == (scales is None)
        assert relative(exact_logits(tmp_path / f"{scales}g"), exact_logits(source)) <= 1e-12


def test_a_feed_forward_block_of_any_larger_width_is_exact(tmp_path):
    source = write_dense(tmp_path / "dense")
    for seed in (None, 3):
        growth = GrowConfig(intermediate_size=67, seed=seed)
        found = decoder(grown_state(source, growth), AutoConfig.from_pretrained(source), INPUT[0])
        assert relative(found, decoder(source_state(source), AutoConfig.from_pretrained(source), INPUT[0])) <= 1e-12


def test_attention_biases_grow_too(tmp_path):
    # qwen3 can have biases in all four projections of its attention.
    source = write_dense(tmp_path / "dense", "qwen3", attention_bias=True)
    grow_folder(source, tmp_path / "grown", GrowConfig(hidden_size=64))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "grown")
    assert plain.model.layers[0].self_attn.o_proj.bias.abs().min() > 0
    assert relative(logits(plain), logits(AutoModelForCausalLM.from_pretrained(source))) <= 1e-5


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "nemotron", "gpt_neox"])
@pytest.mark.parametrize("tied", [False, True])
def test_unequal_copies_are_inexact_only_through_the_norms(tmp_path, model_type, tied):
    source = dense(tmp_path, model_type, tie_word_embeddings=tied)
    growth = GrowConfig(hidden_size=48)
    config = AutoConfig.from_pretrained(source)
    wanted = decoder(source_state(source), config, INPUT[0])
    with pytest.warns(UserWarning, match="hidden_size=48 is no multiple of 32: width=fpi is not exact"):
        state = grown_state(source, growth)
    with pytest.warns(UserWarning, match="not exact"):
        report = grow_folder(source, tmp_path / "grown", growth, verify_text=text_file(tmp_path))
    grown = AutoConfig.from_pretrained(tmp_path / "grown")
    assert relative(decoder(state, grown, INPUT[0]), wanted) > 1e-3
    # The first 16 of the 32 units have two copies. Weighed by 1/n they leave the mean square as it was.
    weights = torch.tensor([1 / 2] * 16 + [1.0] * 16 + [1 / 2] * 16, dtype=torch.float64) / 32
    assert relative(decoder(state, grown, INPUT[0], weights_of_units=weights), wanted) <= 1e-12
    # It is written, and said.
    assert report.summary["function_preserving"] is False
    assert "norms see another mean square" in report.summary["changed_by"][0]
    assert report.comparisons[0].relative_logit_difference > 1e-3


def test_powers_of_two_are_exact_in_bfloat16(tmp_path):
    source = write_dense(tmp_path / "dense", tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    model.save_pretrained(source)
    report = grow_folder(
        source, tmp_path / "g", GrowConfig(hidden_size=64, intermediate_size=128), verify_text=text_file(tmp_path)
    )
    assert [comparison.dtype for comparison in report.comparisons] == ["bfloat16", "float32"]
    assert report.comparisons[1].relative_logit_difference <= 1e-5
    assert ModelFolder(tmp_path / "g").dtype() == torch.bfloat16


def test_four_times_the_width_is_the_same_embedding_in_bfloat16(tmp_path):
    # Gemma rounds the root of the width to the dtype that it computes in.
    source = dense(tmp_path, "gemma3_text")
    grow_folder(source, tmp_path / "grown", GrowConfig(hidden_size=128), dtype=torch.bfloat16)
    before, after = (load_model(folder, dtype=torch.bfloat16) for folder in (source, tmp_path / "grown"))
    assert torch.equal(after.model.embed_tokens(INPUT), before.model.embed_tokens(INPUT).repeat(1, 1, 4))


def test_embeddings_that_are_tied_by_word_only_are_grown_untied(tmp_path):
    source = write_dense(tmp_path / "dense")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.warns(UserWarning, match="loaded untied"):
        grow_folder(source, tmp_path / "grown", GrowConfig(hidden_size=64))
    with pytest.warns(UserWarning, match="loaded untied"):
        wanted = logits(load_model(source))
    assert relative(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "grown")), wanted) <= 1e-5


# Every rule, tensor by tensor.


def growths(model_type: str) -> list[tuple[str, int, int, str, int, bool]]:
    """Depth, layers before and after, width, key and value heads, ties: every two of the settings together.

    Gemma's layers slide in its own pattern, which only these depths keep.
    """
    how = [("interpolate", 3, 5), ("stack", 3, 5 if model_type == "gemma3_text" else 7)]
    first, second = [("stack", 2, 5), ("stack", 4, 6)] if model_type == "gemma2" else how
    return [
        (*first, "fpi", 2, True),
        (*first, "aki", 4, False),
        (*second, "fpi", 4, False),
        (*second, "aki", 2, True),
    ]


@pytest.mark.filterwarnings("ignore:hidden_size=48")
@pytest.mark.parametrize(
    ("model_type", "depth", "layers", "new_layers", "width", "kv_heads", "tied"),
    [(name, *growth) for name in growing_families() for growth in growths(name)],
)
def test_every_tensor_is_what_the_definition_says(
    tmp_path, model_type, depth, layers, new_layers, width, kv_heads, tied
):
    changes = {"sliding_window_pattern": 6} if model_type == "gemma3_text" else {}
    counts = {stack.count: layers for stack in FAMILIES[model_type].stacks}
    source = dense(tmp_path, model_type, num_key_value_heads=kv_heads, tie_word_embeddings=tied, **counts, **changes)
    hidden = None if model_type == "m2m_100" else 48
    growth = GrowConfig(hidden_size=hidden, intermediate_size=150, layers=new_layers, width=width, depth=depth)
    grow_folder(source, tmp_path / "grown", growth, dtype=torch.float64)
    before, after = (AutoConfig.from_pretrained(folder) for folder in (source, tmp_path / "grown"))
    wanted = slow_growth(source_state(source), before, after, width=width, depth=depth)
    found = unfused(source_state(tmp_path / "grown"), after)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-15, atol=1e-15, msg=name)
    plain = plain_transformers(tmp_path / "grown")
    assert torch.equal(logits_of(load_model(tmp_path / "grown", dtype=plain.dtype), INPUT), logits_of(plain, INPUT))
    plain.set_attn_implementation("eager")
    assert relative(exact_logits(tmp_path / "grown"), logits_of(plain, INPUT).double()) <= 1e-5


def test_aki_takes_extra_neurons_from_the_layer_above(tmp_path):
    source = write_dense(tmp_path / "dense", "qwen2", num_hidden_layers=3)
    old = source_state(source)
    new = grown_state(source, GrowConfig(hidden_size=64, intermediate_size=128, width="aki"))
    for layer, above in ((0, 1), (1, 2), (2, 2)):  # nothing is above the last
        own, up = f"model.layers.{layer}.", f"model.layers.{above}."
        gate = new[own + "mlp.gate_proj.weight"]
        assert torch.equal(gate[:64, :32], old[own + "mlp.gate_proj.weight"] / 2)
        assert torch.equal(gate[64:, 32:], old[up + "mlp.gate_proj.weight"] / 2)
        assert torch.equal(
            new[own + "self_attn.o_proj.weight"][32:, :8], old[up + "self_attn.o_proj.weight"][:, :8] / 2
        )
        # Two groups of two heads become two groups of four: heads 2, 3 and 6, 7 are the extra ones.
        bias = new[own + "self_attn.q_proj.bias"].view(2, 4, 8)
        assert torch.equal(bias[:, :2].flatten(), old[own + "self_attn.q_proj.bias"])
        assert torch.equal(bias[:, 2:].flatten(), old[up + "self_attn.q_proj.bias"])
        assert torch.equal(new[own + "self_attn.k_proj.bias"], old[own + "self_attn.k_proj.bias"])
        assert torch.equal(new[own + "input_layernorm.weight"], old[own + "input_layernorm.weight"].repeat(2))


def test_aki_breaks_the_symmetry_that_fpi_keeps(tmp_path):
    # Copies that get the same gradient stay copies; AKI's do not, also in the residual stream.
    source = write_dense(tmp_path / "dense")
    same = {}
    for width in ("fpi", "aki"):
        model, _ = make_model(growth_of(source, GrowConfig(hidden_size=64, width=width)))
        model(input_ids=INPUT, labels=INPUT).loss.backward()
        gradient = model.model.layers[0].mlp.down_proj.weight.grad
        same[width] = relative(gradient[:32], gradient[32:])
    assert same["fpi"] <= 1e-4
    assert same["aki"] > 0.1


@pytest.mark.parametrize(("depth", "order"), [("interpolate", [0, 0, 1, 1, 2]), ("stack", [0, 1, 2, 0, 1])])
@pytest.mark.parametrize("model_type", [name for name in GROWING_DECODERS if not name.startswith("gemma")])
def test_depth_runs_layers_again(tmp_path, model_type, depth, order):
    source = dense(tmp_path, model_type, num_hidden_layers=3)
    growth = GrowConfig(hidden_size=64, layers=5, depth=depth)
    grow_folder(source, tmp_path / "grown", growth)
    config = AutoConfig.from_pretrained(source)
    wanted = decoder(source_state(source), config, INPUT[0], layers=order)
    found = decoder(grown_state(source, growth), AutoConfig.from_pretrained(tmp_path / "grown"), INPUT[0])
    assert relative(found, wanted) <= 1e-12
    assert json.loads((tmp_path / "grown" / "moewright.json").read_text())["grow"]["source_layers"] == order


def test_layer_maps():
    # Figure 2 of arXiv 2408.06567, and its two growths.
    assert layer_map(3, 6, depth="interpolate") == [0, 0, 1, 1, 2, 2]
    assert layer_map(3, 6, depth="stack") == [0, 1, 2, 0, 1, 2]
    for old, new in ((24, 32), (32, 40), (5, 5), (1, 4), (7, 20)):
        assert layer_map(old, new, depth="interpolate") == [math.floor(layer * old / new) for layer in range(new)]
        assert layer_map(old, new, depth="stack") == [layer % old for layer in range(new)]
        assert set(layer_map(old, new, depth="interpolate")) == set(range(old))


def test_neuron_maps():
    in_turn = neuron_map(3, 8)
    assert in_turn.source.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert in_turn.copies.tolist() == [3, 3, 2]
    assert in_turn.extra.tolist() == [False] * 3 + [True] * 5
    grouped = neuron_map(2, 3).in_groups(2)
    assert grouped.source.tolist() == [0, 1, 0, 2, 3, 2]
    assert grouped.copies.tolist() == [2, 1, 2, 1]
    assert grouped.extra.tolist() == [False, False, True] * 2
    rows = neuron_map(2, 3).in_rows(2)
    assert rows.source.tolist() == [0, 1, 2, 3, 0, 1]
    assert rows.copies.tolist() == [2, 2, 1, 1]
    fused = neuron_map(2, 3).then(neuron_map(2, 2), neuron_map(1, 2))
    assert fused.source.tolist() == [0, 1, 0, 2, 3, 4, 4]
    assert fused.copies.tolist() == [2, 1, 1, 1, 2]
    assert fused.extra.tolist() == [False, False, True, False, False, False, True]
    drawn = neuron_map(50, 170, rng=np.random.default_rng(1))
    assert drawn.source[:50].tolist() == list(range(50))
    for start in (50, 100):  # each round has every neuron once, in an order of its own
        assert sorted(drawn.source[start : start + 50].tolist()) == list(range(50))
        assert drawn.source[start : start + 50].tolist() != list(range(50))
    assert drawn.copies.tolist() == [Counter(drawn.source.tolist())[i] for i in range(50)]
    assert neuron_map(50, 150, rng=np.random.default_rng(1)).copies.unique().tolist() == [3]


def test_sliding_layers_stay_with_their_weights(tmp_path):
    changes = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1, "num_hidden_layers": 2}
    source = write_dense(tmp_path / "dense", "qwen2", **changes)
    grow_folder(source, tmp_path / "grown", GrowConfig(hidden_size=64, layers=4))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "grown")
    assert plain.config.layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 2
    assert plain.config.max_window_layers == 2
    grow_folder(source, tmp_path / "wide", GrowConfig(hidden_size=64))
    wide = AutoModelForCausalLM.from_pretrained(tmp_path / "wide")
    assert relative(logits(wide), logits(AutoModelForCausalLM.from_pretrained(source))) <= 1e-5
    with pytest.raises(UsageError, match="use depth=interpolate"):
        grow_folder(source, tmp_path / "stacked", GrowConfig(layers=4, depth="stack"))


def test_the_pattern_of_gemma_is_kept_or_refused(tmp_path):
    # What runtimes take for granted: gemma2's layers slide in turn, and five of six of gemma3's.
    source = dense(tmp_path, "gemma2", num_hidden_layers=2)
    growth = GrowConfig(hidden_size=64, layers=5, depth="stack")
    grow_folder(source, tmp_path / "grown", growth, dtype=torch.float64)
    config = AutoConfig.from_pretrained(tmp_path / "grown")
    assert config.layer_types == [f"{kind}_attention" for kind in ("sliding", "full", "sliding", "full", "sliding")]
    state = source_state(source), AutoConfig.from_pretrained(source)
    wanted = decoder(*state, INPUT[0], layers=[0, 1, 0, 1, 0])
    assert relative(exact_logits(tmp_path / "grown")[0], wanted) <= 1e-12
    with pytest.raises(UsageError, match=r"which of the layers slide; use depth=stack$"):
        grow_folder(source, tmp_path / "out", GrowConfig(layers=5))
    six = dense(tmp_path / "6", "gemma3_text", num_hidden_layers=6, sliding_window_pattern=6)
    assert [
        n
        for n, kind in enumerate(growth_of(six, GrowConfig(layers=19, depth="stack")).model.config.layer_types)
        if kind == "full_attention"
    ] == [5, 11, 17]
    eight = dense(tmp_path / "8", "gemma3_text", num_hidden_layers=8, sliding_window_pattern=6)
    growth_of(eight, GrowConfig(layers=11, depth="stack"))
    for depth in ("stack", "interpolate"):
        with pytest.raises(UsageError, match="grow hidden_size or intermediate_size instead"):
            growth_of(eight, GrowConfig(layers=12, depth=depth))


def test_encoder_decoders_that_cannot_grow_are_refused(tmp_path):
    source = dense(tmp_path, "m2m_100")
    with pytest.raises(UsageError, match="the width of a m2m_100 model cannot grow, since its positions"):
        growth_of(source, GrowConfig(hidden_size=64, intermediate_size=128))
    for number, changes in enumerate(({"decoder_layers": 1}, {"decoder_ffn_dim": 48}, {"decoder_attention_heads": 2})):
        uneven = dense(tmp_path / str(number), "bart", **changes)
        with pytest.raises(ModelError, match="encoder and decoder of this bart model differ in layers, heads or"):
            growth_of(uneven, GrowConfig(hidden_size=64))


def test_every_dense_family_grows():
    assert growing_families() == dense_families()


# Refusals and warnings.


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "nothing grows: give at least one of `hidden_size`, `intermediate_size`, `layers`"),
        ({"hidden_size": 0}, "hidden_size=0: it must be at least 1"),
        ({"layers": -3}, "layers=-3"),
        ({"layers": 4, "width": "copy"}, "choose one of fpi, aki"),
        ({"layers": 4, "depth": "repeat"}, "choose one of interpolate, stack"),
        ({"layers": 4, "seed": -1}, "seed=-1"),
    ],
)
def test_senseless_settings_are_refused(settings, words):
    with pytest.raises(UsageError, match=words):
        GrowConfig(**settings)


SMOLLM2 = Sizes(hidden_size=576, intermediate_size=1536, layers=30, heads=9, kv_heads=3, head_dim=64)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"hidden_size": 512}, "a multiple of 192 from 576 up; use 576, 768$"),
        (
            {"hidden_size": 640},
            "heads of width 64 in 3 groups of equal size need a multiple of 192.*use 576, 768, 960$",
        ),
        ({"hidden_size": 1000}, "use 960, 1152, 1344$"),
        ({"intermediate_size": 1535}, "intermediate_size=1535: the source has 1536.*use 1536 or more"),
        ({"layers": 29}, "layers=29: the source has 30"),
        ({"layers": 10**8}, "layers=100000000: more than 64 times the source's; use at most 1920"),
        ({"intermediate_size": 10**10}, "more than 64 times the source's"),
        ({"hidden_size": 576, "layers": 30}, "nothing grows: every size is the source's"),
    ],
)
def test_sizes_that_cannot_be_reached_are_refused(settings, words):
    with pytest.raises(UsageError, match=words):
        grown_sizes(GrowConfig(**settings), SMOLLM2)


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize("hidden", [24, 36, 96])
def test_the_step_names_every_width_that_can_be_reached(heads, hidden):
    for kv_heads in (k for k in range(1, heads + 1) if heads % k == 0):
        source = Sizes(hidden, 1, 1, heads, kv_heads, head_dim=8)
        reachable = [
            width
            for width in range(hidden, 4 * hidden + 1)
            if (heads * width) % hidden == 0 and (kv_heads == heads or (heads * width // hidden) % kv_heads == 0)
        ]
        step = hidden_step(source)
        assert reachable == [width for width in range(hidden, 4 * hidden + 1) if width % step == 0]


def test_bad_sources_and_targets_are_refused_and_leave_nothing(tmp_path, monkeypatch):
    growth = GrowConfig(hidden_size=64)
    source = write_dense(tmp_path / "dense", "mistral")
    grow_folder(source, tmp_path / "grown", growth)
    upcycle_folder(source, tmp_path / "moe", UpcycleConfig(experts=4, top_k=2))
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    cases = [
        (tmp_path / "moe", tmp_path / "out", "is a mixture of experts; grow the dense model", ModelError),
        (source, source, "source", ModelError),
        (source, tmp_path / "grown", "exists", ModelError),
        (tmp_path / "nowhere", tmp_path / "out", "no such folder", ModelError),
    ]
    for start, target, words, error in cases:
        with pytest.raises(error, match=words):
            grow_folder(start, target, growth)
    with pytest.raises(DataError, match="no such file"):
        grow_folder(source, tmp_path / "out", growth, verify_text=tmp_path / "missing.txt")
    mistral = FAMILIES["mistral"]
    axes = {name: value for name, value in mistral.growth.axes.items() if "up_proj" not in name}
    without = dataclasses.replace(mistral, growth=dataclasses.replace(mistral.growth, axes=axes))
    monkeypatch.setitem(FAMILIES, "mistral", without)
    with pytest.raises(ModelError, match=r"no rule says how model\.layers\.0\.mlp\.up_proj\.weight grows"):
        grow_folder(source, tmp_path / "out", growth)
    monkeypatch.setitem(FAMILIES, "mistral", dataclasses.replace(mistral, growth=None))
    with pytest.raises(ModelError, match="growing a mistral model is not supported yet; supported are llama, qwen2"):
        grow_folder(source, tmp_path / "out", growth)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_a_target_is_replaced_only_when_asked(tmp_path):
    source = write_dense(tmp_path / "dense")
    grow_folder(source, tmp_path / "grown", GrowConfig(layers=3))
    grow_folder(source, tmp_path / "grown", GrowConfig(layers=4), overwrite=True)
    assert inspect_folder(tmp_path / "grown")["layers"] == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "grown"]


def test_nan_weights_are_refused_and_leave_nothing(tmp_path):
    source = write_dense(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = math.nan
    model.save_pretrained(source)
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN or Inf"):
        grow_folder(source, tmp_path / "grown", GrowConfig(hidden_size=64))
    assert [p.name for p in tmp_path.iterdir()] == ["dense"]


def test_an_exact_growth_that_is_not_exact_is_not_committed(tmp_path, monkeypatch):
    source = write_dense(tmp_path / "dense")
    monkeypatch.setattr(
        "moewright.grow.tensors.grow_tensor", lambda *tensors, **rest: grow_tensor(*tensors, **rest) * 1.01
    )
    with pytest.raises(ModelError, match=r"where width=fpi allows 0\.0001; nothing was written"):
        grow_folder(source, tmp_path / "grown", GrowConfig(hidden_size=64), verify_text=text_file(tmp_path))
    assert not (tmp_path / "grown").exists()
    # What claims nothing is not measured against it.
    growth = GrowConfig(hidden_size=64, width="aki")
    grow_folder(source, tmp_path / "grown", growth, verify_text=text_file(tmp_path))
    assert (tmp_path / "grown").exists()


def test_settings_that_are_ignored_are_named(tmp_path):
    source = write_dense(tmp_path / "dense")
    for settings, words in (
        ({"layers": 3, "width": "aki"}, "width=aki is ignored: no width grows"),
        ({"layers": 3, "seed": 0}, "seed=0 is ignored: no width grows"),
        ({"hidden_size": 64, "depth": "stack"}, "depth=stack is ignored: the number of layers does not grow"),
    ):
        with pytest.warns(UserWarning, match=words):
            growth_of(source, GrowConfig(**settings))
    with pytest.warns(UserWarning, match="verify_text is ignored"):
        grow_folder(source, tmp_path / "a", GrowConfig(layers=3), verify_text=text_file(tmp_path), dry_run=True)
    shallow = write_dense(tmp_path / "shallow", num_hidden_layers=1)
    with pytest.warns(UserWarning, match="width=aki is ignored: no layer is above the only one"):
        growth = growth_of(shallow, GrowConfig(hidden_size=64, width="aki"))
    assert growth.plan.inexact == []


# The folder.


def test_running_twice_gives_the_same_bytes_and_leaves_the_source_alone(tmp_path):
    source = write_dense(tmp_path / "dense")
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in source.iterdir()}
    growth = GrowConfig(hidden_size=64, intermediate_size=100, layers=3, width="aki", seed=1)
    for name in ("a", "b"):
        grow_folder(source, tmp_path / name, growth, verify_text=text_file(tmp_path))
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("a", "b"))
    assert first == second
    assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in source.iterdir()} == before
    grow_folder(
        source, tmp_path / "c", GrowConfig(hidden_size=64, intermediate_size=100, layers=3, width="aki", seed=2)
    )
    assert (tmp_path / "c" / "model.safetensors").read_bytes() != first["model.safetensors"]


def test_live_model_and_folder_are_the_same_model(tmp_path):
    source = write_dense(tmp_path / "dense", "qwen3", tie_word_embeddings=True)
    growth = GrowConfig(hidden_size=64, layers=3, width="aki")
    live, _ = make_model(growth_of(source, growth))
    grow_folder(source, tmp_path / "grown", growth)
    stored = load_model(tmp_path / "grown")
    names = dict(live.named_parameters())
    assert list(names) == [name for name, _ in stored.named_parameters()]
    assert all(torch.equal(names[name], parameter) for name, parameter in stored.named_parameters())
    assert live.lm_head.weight is live.model.embed_tokens.weight


def test_a_grown_model_can_be_upcycled(tmp_path):
    source = write_dense(tmp_path / "dense")
    grow_folder(source, tmp_path / "grown", GrowConfig(hidden_size=64, intermediate_size=128))
    upcycle_folder(tmp_path / "grown", tmp_path / "moe", UpcycleConfig(experts=8, granularity=2, top_k=2))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    assert relative(logits(plain), logits(AutoModelForCausalLM.from_pretrained(source))) <= 1e-5


def test_record_says_where_the_model_came_from(tmp_path):
    source = write_dense(tmp_path / "dense")
    grow_folder(source, tmp_path / "grown", GrowConfig(layers=3), verify_text=text_file(tmp_path))
    record = json.loads((tmp_path / "grown" / "moewright.json").read_text())
    assert record["grow"]["source"]["sha256"] == ModelFolder(source).fingerprint()
    assert record["grow"]["settings"] == {
        "hidden_size": 32, "intermediate_size": 64, "layers": 3, "width": "fpi", "depth": "interpolate", "seed": None
    }  # fmt: skip
    assert record["grow"]["changed_by"] == ["layers=3: copied layers act again"]
    assert record["grow"]["verification"][0]["relative_logit_difference"] > 1e-3
    ModelFolder(tmp_path / "grown").verify_checksums()


def test_dry_run_writes_nothing_and_foretells_the_folder(tmp_path):
    source = write_dense(tmp_path / "dense", "qwen2", tie_word_embeddings=True)
    growth = GrowConfig(hidden_size=64, intermediate_size=100, layers=3, width="aki")
    before = sorted(tmp_path.iterdir())
    foretold = grow_folder(source, tmp_path / "grown", growth, dry_run=True, dtype=torch.bfloat16).as_dict()
    assert sorted(tmp_path.iterdir()) == before
    grow_folder(source, tmp_path / "grown", growth, dtype=torch.bfloat16)
    facts = inspect_folder(tmp_path / "grown")
    assert foretold["parameters"]["grown"] == facts["parameters"]["total"]
    assert foretold["parameters"]["source"] == inspect_folder(source)["parameters"]["total"]
    assert foretold["bytes"] == facts["bytes"] == 2 * facts["parameters"]["total"]
    # A layer: queries and outputs of 8 heads of 8, keys and values of 2, a gated block, two norms, three biases.
    layer = 2 * 64 * 64 + 2 * 16 * 64 + 3 * 64 * 100 + 2 * 64 + 64 + 2 * 16
    assert foretold["flops_per_token"]["grown"] == 2 * (3 * layer + 64 + 264 * 64)
    assert foretold["free_bytes"] > 0


def test_a_tensor_is_made_only_when_it_is_asked_for(tmp_path, monkeypatch):
    source = write_dense(tmp_path / "dense", num_hidden_layers=3)
    growth = growth_of(source, GrowConfig(hidden_size=64, layers=6, width="aki"))
    read, asked = growth.folder.read, []
    monkeypatch.setattr(growth.folder, "read", lambda name: asked.append(name) or read(name))
    tensors = lazy_tensors(growth)
    assert growth.summary["parameters"]["grown"] > 0
    assert asked == []
    for name, wanted in (
        ("model.embed_tokens.weight", ["model.embed_tokens.weight"]),
        ("model.layers.1.input_layernorm.weight", ["model.layers.0.input_layernorm.weight"]),
        ("model.layers.1.mlp.down_proj.weight", [f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1)]),
        ("model.layers.1.mlp.up_proj.weight", ["model.layers.0.mlp.up_proj.weight"]),  # its width does not grow
        ("model.layers.5.self_attn.o_proj.weight", ["model.layers.2.self_attn.o_proj.weight"]),  # the last
    ):
        asked.clear()
        (tensor,) = tensors[name].make()
        assert tuple(tensor.shape) == tensors[name].shape
        assert asked == wanted


def test_writing_holds_one_tensor_at_a_time(tmp_path):
    # Each of the 24 largest tensors grows from 4 MB to 16 MB, the model to 400 MB.
    source = write_dense(tmp_path / "dense", hidden_size=256, intermediate_size=4096, num_hidden_layers=8, head_dim=64)
    script = (
        "import resource, sys\n"
        "from moewright.grow.apply import grow_folder\n"
        "from moewright.grow.config import GrowConfig\n"
        "config = GrowConfig(hidden_size=512, intermediate_size=8192, width='aki')\n"
        "foretold = grow_folder(sys.argv[1], sys.argv[2], config, dry_run=True).summary['memory_needed']\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "grow_folder(sys.argv[1], sys.argv[2], config)\n"
        "print(foretold, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    command = [sys.executable, "-c", script, str(source), str(tmp_path / "grown")]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    foretold, used = (int(word) for word in run.stdout.split())
    assert (tmp_path / "grown" / "model.safetensors").stat().st_size > 400e6
    assert used * 1024 < foretold + 20e6
    assert foretold < 70e6
