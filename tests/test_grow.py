"""Growth against the definition, neuron by neuron in float64, against the source model, and against bad input."""

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

from moewright.backbone.folder import load_model
from moewright.backbone.inspect import inspect_folder
from moewright.checkpoint.read import ModelFolder
from moewright.errors import DataError, ModelError, UsageError
from moewright.upcycle.apply import upcycle_folder
from moewright.upcycle.config import UpcycleConfig
from moewright.upcycle.grow import grow_folder, grow_model, plan_growth
from moewright.upcycle.grow_config import GrowConfig, Sizes, grown_sizes, hidden_step
from moewright.upcycle.grow_maps import FAMILY_AXES, layer_map, neuron_map
from tests.models import write_dense

INPUT = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))
TEXT = "def add(a, b):\n    return a + b\n\n" * 20


@torch.no_grad()
def logits(model, ids=INPUT):
    return model(input_ids=ids, use_cache=False).logits


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def source_state(folder: Path) -> dict[str, torch.Tensor]:
    model_folder = ModelFolder(folder)
    return {name: model_folder.read(name).double() for name in model_folder.tensors}


def grown_state(folder: Path, config: GrowConfig) -> dict[str, torch.Tensor]:
    return {n: t.make() for n, t in plan_growth(folder, config, dtype=torch.float64).tensors().items()}


# The definition: a decoder in float64, and the growth rules one neuron at a time.


def decoder(state, config, ids, *, layers=None, weights_of_units=None):
    """Logits (T, V) of a pre-norm decoder, in float64, from its tensors.

    `layers` runs these layers in this order. `weights_of_units` (D,) replaces the mean of the squares in every
    norm by a weighted sum.
    """
    width = config.head_dim if getattr(config, "head_dim", None) else config.hidden_size // config.num_attention_heads
    group = config.num_attention_heads // config.num_key_value_heads
    time = torch.arange(len(ids), dtype=torch.float64)
    rates = config.rope_parameters["rope_theta"] ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = (time[:, None] * rates).repeat(1, 2)
    ahead = torch.triu(torch.ones(len(ids), len(ids), dtype=torch.bool), diagonal=1)

    def norm(x, weight, units=None):
        squares = (x**2).mean(-1, keepdim=True) if units is None else (x**2 * units).sum(-1, keepdim=True)
        return weight * x / torch.sqrt(squares + config.rms_norm_eps)

    def rotate(x):
        half = torch.cat([-x[:, width // 2 :], x[:, : width // 2]], dim=-1)
        return x * angles.cos() + half * angles.sin()

    def heads(name, x, count):
        y = x @ state[f"{name}_proj.weight"].T + state.get(f"{name}_proj.bias", 0.0)
        return y.reshape(len(ids), count, width).unbind(1)

    x = state["model.embed_tokens.weight"][ids]
    for layer in layers or range(config.num_hidden_layers):
        path = f"model.layers.{layer}."
        y = norm(x, state[path + "input_layernorm.weight"], weights_of_units)
        queries = heads(path + "self_attn.q", y, config.num_attention_heads)
        keys = heads(path + "self_attn.k", y, config.num_key_value_heads)
        values = heads(path + "self_attn.v", y, config.num_key_value_heads)
        found = []
        for head, query in enumerate(queries):
            key = keys[head // group]
            if path + "self_attn.q_norm.weight" in state:
                query = norm(query, state[path + "self_attn.q_norm.weight"])
                key = norm(key, state[path + "self_attn.k_norm.weight"])
            scores = rotate(query) @ rotate(key).T / math.sqrt(width)
            found.append(scores.masked_fill(ahead, -math.inf).softmax(-1) @ values[head // group])
        x = x + torch.cat(found, -1) @ state[path + "self_attn.o_proj.weight"].T
        y = norm(x, state[path + "post_attention_layernorm.weight"], weights_of_units)
        gate = y @ state[path + "mlp.gate_proj.weight"].T
        hidden = gate / (1 + torch.exp(-gate)) * (y @ state[path + "mlp.up_proj.weight"].T)
        x = x + hidden @ state[path + "mlp.down_proj.weight"].T
    head = state["model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"]
    return norm(x, state["model.norm.weight"], weights_of_units) @ head.T


def slow_growth(state, config, *, hidden, feed_forward, layers, width, depth):
    """The grown tensors by section 2.2.1 of arXiv 2408.06567, one neuron at a time; neurons are copied in turn."""
    D, F, L = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    H, K = config.num_attention_heads, config.num_key_value_heads
    d = getattr(config, "head_dim", None) or D // H
    # A neuron is (source neuron, whether it is extra).
    model = [(i % D, i >= D) for i in range(hidden)]
    ffn = [(i % F, i >= F) for i in range(feed_forward)]
    new_heads = H * hidden // D
    if K == H:
        heads = [(h % H, h >= H) for h in range(new_heads)]
        kv = heads
    else:
        old, new = H // K, new_heads // K
        heads = [(g * old + j % old, j >= old) for g in range(K) for j in range(new)]
        kv = [(g, False) for g in range(K)]
    q_rows = [(h * d + k, extra) for h, extra in heads for k in range(d)]
    kv_rows = [(h * d + k, extra) for h, extra in kv for k in range(d)]
    copies = {name: Counter(c for c, _ in n) for name, n in (("D", model), ("F", ffn), ("H", q_rows))}

    def matrix(own, above, outputs, inputs, name):
        own, above = own.tolist(), above.tolist()
        rows = [[(above if extra else own)[c][ci] / copies[name][ci] for ci, _ in inputs] for c, extra in outputs]
        return torch.tensor(rows, dtype=torch.float64)

    def vector(own, above, outputs):
        return torch.stack([(above if extra else own)[c] for c, extra in outputs])

    columns = [c for c, _ in model]
    counts = torch.tensor([float(copies["D"][c]) for c in columns], dtype=torch.float64)
    grown = {"model.embed_tokens.weight": state["model.embed_tokens.weight"][:, columns]}
    final = state["model.norm.weight"][columns]
    if config.tie_word_embeddings:
        grown["model.norm.weight"] = final / counts
    else:
        grown["model.norm.weight"] = final
        grown["lm_head.weight"] = state["lm_head.weight"][:, columns] / counts
    for new_layer in range(layers):
        layer = new_layer % L if depth == "stack" else math.floor(new_layer * L / layers)
        up = layer + 1 if width == "aki" and layer + 1 < L else layer
        for part, outputs, inputs, name in (
            ("self_attn.q_proj", q_rows, model, "D"),
            ("self_attn.k_proj", kv_rows, model, "D"),
            ("self_attn.v_proj", kv_rows, model, "D"),
            ("self_attn.o_proj", model, q_rows, "H"),
            ("mlp.gate_proj", ffn, model, "D"),
            ("mlp.up_proj", ffn, model, "D"),
            ("mlp.down_proj", model, ffn, "F"),
        ):
            own, above, new = (f"model.layers.{n}.{part}." for n in (layer, up, new_layer))
            grown[new + "weight"] = matrix(state[own + "weight"], state[above + "weight"], outputs, inputs, name)
            if own + "bias" in state:
                grown[new + "bias"] = vector(state[own + "bias"], state[above + "bias"], outputs)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            grown[f"model.layers.{new_layer}.{norm}.weight"] = state[f"model.layers.{layer}.{norm}.weight"][columns]
        for norm in ("self_attn.q_norm", "self_attn.k_norm"):
            if f"model.layers.{layer}.{norm}.weight" in state:
                grown[f"model.layers.{new_layer}.{norm}.weight"] = state[f"model.layers.{layer}.{norm}.weight"]
    return grown


@pytest.mark.parametrize("model_type", tuple(FAMILY_AXES))
def test_the_definition_is_the_model_of_transformers(tmp_path, model_type):
    source = write_dense(tmp_path / "dense", model_type)
    config = AutoConfig.from_pretrained(source)
    plain = logits(AutoModelForCausalLM.from_pretrained(source))
    assert relative(decoder(source_state(source), config, INPUT[0]), plain[0].double()) <= 1e-5


# What is exact.


@pytest.mark.parametrize("model_type", tuple(FAMILY_AXES))
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_width_fpi_preserves_the_function(tmp_path, model_type, tied, kv_heads):
    source = write_dense(tmp_path / "dense", model_type, tie_word_embeddings=tied, num_key_value_heads=kv_heads)
    growth = GrowConfig(hidden_size=96 if kv_heads == 2 else 64, intermediate_size=100, seed=kv_heads)
    report = grow_folder(source, tmp_path / "grown", growth, verify_text=text_file(tmp_path))
    dense = AutoModelForCausalLM.from_pretrained(source)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "grown")
    assert relative(logits(plain), logits(dense)) <= 1e-5
    assert torch.equal(logits(load_model(tmp_path / "grown")), logits(plain))
    assert (plain.lm_head.weight is plain.model.embed_tokens.weight) == tied
    assert plain.config.num_key_value_heads == (kv_heads if kv_heads < 4 else plain.config.num_attention_heads)
    assert plain.config.num_attention_heads * 8 == plain.config.hidden_size
    assert report.summary["function_preserving"]
    (comparison,) = report.comparisons
    assert comparison["relative_logit_difference"] <= 1e-5
    assert comparison["grown_perplexity"] == pytest.approx(comparison["source_perplexity"], rel=1e-5)
    # Without the rounding of float32 nothing is left of the difference.
    wanted = decoder(source_state(source), dense.config, INPUT[0])
    found = decoder(grown_state(source, growth), plain.config, INPUT[0])
    assert relative(found, wanted) <= 1e-12


@pytest.mark.parametrize("model_type", tuple(FAMILY_AXES))
def test_head_widths_of_their_own_are_kept(tmp_path, model_type):
    # As in Qwen3-0.6B, where heads * head_dim is twice the model width; qwen2 has no such field.
    changes = {} if model_type == "qwen2" else {"head_dim": 16}
    source = write_dense(tmp_path / "dense", model_type, **changes)
    grow_folder(source, tmp_path / "grown", GrowConfig(hidden_size=64))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "grown")
    assert relative(logits(plain), logits(AutoModelForCausalLM.from_pretrained(source))) <= 1e-5
    assert plain.model.layers[0].self_attn.q_proj.weight.shape == (8 * changes.get("head_dim", 8), 64)


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


@pytest.mark.parametrize("tied", [False, True])
def test_unequal_copies_are_inexact_only_through_the_norms(tmp_path, tied):
    source = write_dense(tmp_path / "dense", tie_word_embeddings=tied)
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
    assert report.comparisons[0]["relative_logit_difference"] > 1e-3


def test_powers_of_two_are_exact_in_bfloat16(tmp_path):
    source = write_dense(tmp_path / "dense", tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    model.save_pretrained(source)
    report = grow_folder(
        source, tmp_path / "g", GrowConfig(hidden_size=64, intermediate_size=128), verify_text=text_file(tmp_path)
    )
    assert [comparison["dtype"] for comparison in report.comparisons] == ["bfloat16", "float32"]
    assert report.comparisons[1]["relative_logit_difference"] <= 1e-5
    assert ModelFolder(tmp_path / "g").dtype() == torch.bfloat16


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


@pytest.mark.filterwarnings("ignore:hidden_size=48")
@pytest.mark.parametrize("model_type", tuple(FAMILY_AXES))
@pytest.mark.parametrize("width", ["fpi", "aki"])
@pytest.mark.parametrize(("depth", "layers"), [("interpolate", 5), ("stack", 7)])
@pytest.mark.parametrize(("kv_heads", "tied"), [(2, True), (4, False)])
def test_every_tensor_is_what_the_definition_says(tmp_path, model_type, width, depth, layers, kv_heads, tied):
    source = write_dense(
        tmp_path / "dense", model_type, num_hidden_layers=3, num_key_value_heads=kv_heads, tie_word_embeddings=tied
    )
    growth = GrowConfig(hidden_size=48, intermediate_size=150, layers=layers, width=width, depth=depth)
    wanted = slow_growth(
        source_state(source),
        AutoConfig.from_pretrained(source),
        hidden=48,
        feed_forward=150,
        layers=layers,
        width=width,
        depth=depth,
    )
    found = grown_state(source, growth)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name
    grow_folder(source, tmp_path / "grown", growth)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "grown")
    assert torch.equal(logits(load_model(tmp_path / "grown")), logits(plain))
    assert relative(decoder(wanted, plain.config, INPUT[0]), logits(plain)[0].double()) <= 1e-5


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
        model, _ = grow_model(source, GrowConfig(hidden_size=64, width=width), dtype=torch.float32)
        model(input_ids=INPUT, labels=INPUT).loss.backward()
        gradient = model.model.layers[0].mlp.down_proj.weight.grad
        same[width] = relative(gradient[:32], gradient[32:])
    assert same["fpi"] <= 1e-4
    assert same["aki"] > 0.1


@pytest.mark.parametrize(("depth", "order"), [("interpolate", [0, 0, 1, 1, 2]), ("stack", [0, 1, 2, 0, 1])])
def test_depth_runs_layers_again(tmp_path, depth, order):
    source = write_dense(tmp_path / "dense", num_hidden_layers=3)
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


# Refusals and warnings.


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "nothing grows: give at least one of hidden_size, intermediate_size, layers"),
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
    axes = {name: value for name, value in FAMILY_AXES["mistral"].items() if "up_proj" not in name}
    monkeypatch.setitem(FAMILY_AXES, "mistral", axes)
    with pytest.raises(ModelError, match=r"no rule says how model\.layers\.0\.mlp\.up_proj\.weight grows"):
        grow_folder(source, tmp_path / "out", growth)
    monkeypatch.delitem(FAMILY_AXES, "mistral")
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
    from moewright.upcycle import grow

    exact, source = grow.grow_tensor, write_dense(tmp_path / "dense")
    monkeypatch.setattr(grow, "grow_tensor", lambda *tensors, **rest: exact(*tensors, **rest) * 1.01)
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
            plan_growth(source, GrowConfig(**settings))
    with pytest.warns(UserWarning, match="text to verify on is ignored"):
        grow_folder(source, tmp_path / "a", GrowConfig(layers=3), verify_text=text_file(tmp_path), dry_run=True)
    shallow = write_dense(tmp_path / "shallow", num_hidden_layers=1)
    with pytest.warns(UserWarning, match="width=aki is ignored: no layer is above the only one"):
        plan = plan_growth(shallow, GrowConfig(hidden_size=64, width="aki"))
    assert plan.inexact == []


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
    live, _ = grow_model(source, growth, dtype=torch.float32)
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
    plan = plan_growth(source, GrowConfig(hidden_size=64, layers=6, width="aki"))
    read, asked = plan.folder.read, []
    monkeypatch.setattr(plan.folder, "read", lambda name: asked.append(name) or read(name))
    tensors = plan.tensors()
    assert plan.summary()["parameters"]["grown"] > 0
    assert asked == []
    for name, wanted in (
        ("model.embed_tokens.weight", ["model.embed_tokens.weight"]),
        ("model.layers.1.input_layernorm.weight", ["model.layers.0.input_layernorm.weight"]),
        ("model.layers.1.mlp.down_proj.weight", [f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1)]),
        ("model.layers.1.mlp.up_proj.weight", ["model.layers.0.mlp.up_proj.weight"]),  # its width does not grow
        ("model.layers.5.self_attn.o_proj.weight", ["model.layers.2.self_attn.o_proj.weight"]),  # the last
    ):
        asked.clear()
        assert tuple(tensors[name].make().shape) == tensors[name].shape
        assert asked == wanted


def test_writing_holds_one_tensor_at_a_time(tmp_path):
    # Each of the 24 largest tensors grows from 4 MB to 16 MB, the model to 400 MB.
    source = write_dense(tmp_path / "dense", hidden_size=256, intermediate_size=4096, num_hidden_layers=8, head_dim=64)
    script = (
        "import resource, sys\n"
        "from moewright.upcycle.grow import grow_folder\n"
        "from moewright.upcycle.grow_config import GrowConfig\n"
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
