"""Upcycling against the dense model, against the formulas, and against bad input."""

import json
import math
from contextlib import nullcontext
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from moewright.backbone.blocks import moe_layers
from moewright.backbone.inspect import inspect_folder
from moewright.backbone.load import load_model
from moewright.checkpoint.read import ModelFolder
from moewright.convert.make import make_model
from moewright.errors import DataError, ModelError, UsageError
from moewright.evaluate.compare import broken_groups
from moewright.family.config import chosen_layers
from moewright.moe.config import MoEConfig
from moewright.moe.router import route
from moewright.upcycle.apply import upcycle_folder, upcycling_of
from moewright.upcycle.config import UpcycleConfig
from moewright.upcycle.routers import drawn_rows
from moewright.upcycle.scale import Factors, balanced, expected_weight_sum, factors, mean_weight_sum, published
from tests.models import FAMILIES, logits_of, plain_transformers, relative, tiny_config, write_dense

INPUT = torch.randint(0, 256, (3, 40), generator=torch.Generator().manual_seed(0))
TEXT = "def add(a, b):\n    return a + b\n\n" * 40


def logits(model, ids=INPUT):
    return logits_of(model, ids)


def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


STARTS = [("llama", granularity, groups) for granularity in (1, 2, 4) for groups in (1, 2)]
STARTS += [(model_type, 4, groups) for model_type, groups in zip(FAMILIES[1:], cycle((1, 2)), strict=False)]


@pytest.mark.parametrize(("model_type", "granularity", "groups"), STARTS)
def test_exact_start_equals_the_dense_model(tmp_path, model_type, granularity, groups):
    source = write_dense(tmp_path / "dense", model_type)
    config = UpcycleConfig(
        experts=4 * granularity,
        granularity=granularity,
        top_k=groups * granularity,
        router_order="topk-softmax",
        scale="exact",
    )
    only_expert = pytest.warns(UserWarning, match="router learns nothing") if config.top_k == 1 else nullcontext()
    with only_expert:
        report = upcycle_folder(source, tmp_path / "moe", config, verify_text=text_file(tmp_path))
    dense = plain_transformers(source)
    if report.summary["target_format"] != "moewright":
        assert relative(logits(plain_transformers(tmp_path / "moe")), logits(dense)) <= 1e-5
    ours = load_model(tmp_path / "moe")
    assert relative(logits(ours), logits(dense)) <= 1e-5
    (comparison,) = report.comparisons
    assert comparison.relative_logit_difference <= 1e-5
    assert comparison.broken_groups == 0.0
    assert comparison.sparse_perplexity == pytest.approx(comparison.dense_perplexity, rel=1e-5)


@pytest.mark.parametrize("layers", ["every:2", "0"])
def test_a_subset_of_layers(tmp_path, layers):
    source = write_dense(tmp_path / "dense", num_hidden_layers=4)
    config = UpcycleConfig(experts=8, granularity=2, top_k=4, layers=layers)
    upcycle_folder(source, tmp_path / "moe", config)
    assert sorted(moe_layers(load_model(tmp_path / "moe"))) == ([1, 3] if layers == "every:2" else [0])
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    assert relative(logits(plain), logits(AutoModelForCausalLM.from_pretrained(source))) <= 1e-5


def test_geglu_is_exact(tmp_path):
    source = write_dense(tmp_path / "dense", hidden_act="gelu_pytorch_tanh")
    upcycle_folder(source, tmp_path / "moe", UpcycleConfig(experts=8, granularity=4, top_k=4))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    assert relative(logits(plain), logits(AutoModelForCausalLM.from_pretrained(source))) <= 1e-5


def test_index_rule_and_factors(tmp_path):
    # Expert j holds shard j mod G and router row j // G; up and down carry S, the gate nothing.
    source = ModelFolder(write_dense(tmp_path / "dense"))
    made = upcycling_of(source.path, UpcycleConfig(experts=6, granularity=2, top_k=2, seed=3))
    model, _ = make_model(
        upcycling_of(source.path, UpcycleConfig(experts=6, granularity=2, top_k=2, seed=3), dtype=torch.float32)
    )
    assert [(f.gate, f.up * f.down) for f in made.tensors.factors.values()] == [(1.0, 2.0)] * 2
    for layer, moe in moe_layers(model).items():
        dense = {part: source.read(f"model.layers.{layer}.mlp.{part}_proj.weight") for part in ("gate", "up", "down")}
        factor = made.tensors.factors[layer]
        for j in range(6):
            rows = slice((j % 2) * 32, (j % 2) * 32 + 32)
            gate, up = moe.experts.gate_up_proj[j].split(32)
            assert torch.equal(gate, dense["gate"][rows])
            assert torch.equal(up, dense["up"][rows] * factor.up)
            assert torch.equal(moe.experts.down_proj[j], dense["down"][:, rows] * factor.down)
            assert torch.equal(moe.router.weight[j], moe.router.weight[2 * (j // 2)])
        assert len({tuple(row.tolist()) for row in moe.router.weight}) == 3


def test_live_model_and_folder_are_the_same_model(tmp_path):
    source = write_dense(tmp_path / "dense", tie_word_embeddings=True)
    config = UpcycleConfig(experts=8, granularity=4, top_k=4, seed=5)
    live, _ = make_model(upcycling_of(source, config, dtype=torch.float32))
    upcycle_folder(source, tmp_path / "moe", config)
    stored = load_model(tmp_path / "moe")
    names = dict(live.named_parameters())
    assert list(names) == [name for name, _ in stored.named_parameters()]
    assert all(torch.equal(names[name], parameter) for name, parameter in stored.named_parameters())
    assert live.lm_head.weight is live.model.embed_tokens.weight


def test_running_twice_gives_the_same_bytes(tmp_path):
    source = write_dense(tmp_path / "dense")
    config = UpcycleConfig(experts=4, granularity=2, top_k=2)
    for name in ("a", "b"):
        upcycle_folder(source, tmp_path / name, config, verify_text=text_file(tmp_path))
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("a", "b"))
    assert first == second
    changed = UpcycleConfig(experts=4, granularity=2, top_k=2, seed=1)
    upcycle_folder(source, tmp_path / "c", changed)
    assert (tmp_path / "c" / "model.safetensors").read_bytes() != first["model.safetensors"]


def test_router_rows_depend_on_seed_and_layer_alone():
    def rows(experts=4, hidden_size=8, seed=0, layer=0):
        config = UpcycleConfig(experts=experts, granularity=2, top_k=2, router_std=0.5, seed=seed)
        return drawn_rows(config.resolved(hidden_size=hidden_size), hidden_size=hidden_size, layer=layer)

    assert torch.equal(rows(), rows())
    assert len({tuple(rows(seed=s, layer=i)[0].tolist()) for s in range(4) for i in range(4)}) == 16
    assert rows(hidden_size=4096, experts=64).std().item() == pytest.approx(0.5, rel=0.02)


@pytest.mark.parametrize("total", [1.0, 2.0, 3.0, 4.0, 8.0, 12.7, 64.0])
def test_balanced_factors_multiply_to_the_total_and_round_once(total):
    found = balanced(total)
    assert found.gate == 1.0
    assert found.up * found.down == total
    assert math.log2(found.up) == int(math.log2(found.up))
    assert 0.5 <= found.up / found.down <= 2.0
    squared, plain = balanced(total, degree=2), balanced(total, degree=0)
    assert squared.up**2 * squared.down == pytest.approx(total)
    assert (plain.up, plain.down) == (1.0, total)


def test_published_factors_are_the_papers():
    # E8G8T8 under softmax-topk: S = E G^2 / T = 64, cube root 4 (arXiv 2410.07524, section 3); E8G1T2: 4^(1/3).
    gated = MoEConfig(hidden_size=8, expert_size=8, num_experts=8, top_k=2)
    relu, squared = replace(gated, gated=False, activation="relu"), replace(gated, gated=False, activation="relu2")
    config = UpcycleConfig(experts=64, granularity=8, top_k=8, router_order="softmax-topk", scale="uniform")
    assert factors(config.resolved(hidden_size=8), gated).gate == pytest.approx(4.0)
    assert factors(config.resolved(hidden_size=8), squared).up == pytest.approx(4.0)
    assert factors(config.resolved(hidden_size=8), relu).up == pytest.approx(8.0)
    assert factors(config.resolved(hidden_size=8), relu).down_bias == pytest.approx(8.0)
    config = UpcycleConfig(experts=8, top_k=2, router_order="softmax-topk", scale="uniform")
    assert factors(config.resolved(hidden_size=8), gated).up == pytest.approx(1.587, abs=1e-3)
    config = UpcycleConfig(experts=64, granularity=8, top_k=8, scale="uniform")
    assert factors(config.resolved(hidden_size=8), gated).down == pytest.approx(2.0)
    assert published(27.0, gated).down == pytest.approx(3.0)


def test_calibration_measures_the_weight_sum(tmp_path):
    source = write_dense(tmp_path / "dense")
    config = UpcycleConfig(experts=8, granularity=2, top_k=4, router_order="softmax-topk", router_std=0.3)
    ids = INPUT.flatten()[:96]
    made = upcycling_of(source, config, calibration_texts=[ids])
    # Slowly: the dense model's own inputs, token by token.
    model, seen = load_model(source), {}
    for layer, block in enumerate(model.model.layers):
        block.mlp.register_forward_pre_hook(lambda module, args, layer=layer: seen.update({layer: args[0][0]}))
    logits(model, ids[None])
    for layer, x in seen.items():
        sums = [(made.tensors.router(layer).double() @ token.double()).softmax(0).topk(4).values.sum() for token in x]
        assert made.measured.weight_sums[layer] == pytest.approx(torch.stack(sums).mean().item(), rel=1e-5)
        factor = made.tensors.factors[layer]
        assert factor.up * factor.down == pytest.approx(2 / made.measured.weight_sums[layer])


def test_calibrated_beats_uniform_and_none(tmp_path):
    source = write_dense(tmp_path / "dense")
    errors = {}
    for scale in ("calibrated", "uniform", "none"):
        config = UpcycleConfig(experts=8, granularity=2, top_k=2, router_order="softmax-topk", scale=scale)
        made, target = upcycling_of(source, config), tmp_path / scale
        upcycle_folder(source, target, config)
        errors[scale] = relative(logits(load_model(target)), logits(load_model(source)))
        assert made.format.name == "qwen2_moe"
    assert errors["calibrated"] < 0.05 < min(errors["uniform"], errors["none"])


def test_expected_weight_sum_agrees_with_sampling():
    router = torch.randn(8, 64, generator=torch.Generator().manual_seed(1)) * 0.1
    norm = torch.rand(64, generator=torch.Generator().manual_seed(2)) + 0.5
    inputs = torch.randn(200_000, 64, generator=torch.Generator().manual_seed(3)) * norm
    sampled = mean_weight_sum(inputs, router, top_k=2)
    assert expected_weight_sum(router, norm, top_k=2, seed=0) == pytest.approx(sampled, rel=0.01)


def test_top_1_defaults_to_a_router_that_learns():
    config = UpcycleConfig(experts=4, top_k=1).resolved(hidden_size=64)
    assert (config.router_order, config.scale, config.router_std) == ("softmax-topk", "calibrated", 0.05 / 8)
    weights = route(
        torch.randn(5, 8),
        torch.randn(4, 8),
        MoEConfig(hidden_size=8, expert_size=1, num_experts=4, top_k=1, router_order="topk-softmax"),
        noisy=False,
    ).weights_TK
    assert torch.equal(weights, torch.ones(5, 1))


def test_bfloat16_scales_without_rounding(tmp_path):
    source = write_dense(tmp_path / "dense")
    bf16 = tmp_path / "bf16"
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(bf16)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bf16 / name).write_bytes((source / name).read_bytes())
    report = upcycle_folder(
        bf16, tmp_path / "moe", UpcycleConfig(experts=8, granularity=2, top_k=2), verify_text=text_file(tmp_path)
    )
    assert [comparison.dtype for comparison in report.comparisons] == ["bfloat16", "float32"]
    # The weights themselves are exact, since G = 2 needs powers of two only.
    assert report.comparisons[1].relative_logit_difference <= 1e-5


def test_broken_groups_are_counted():
    experts = torch.tensor([[0, 1, 6, 7], [7, 0, 6, 1], [0, 2, 6, 7], [0, 1, 2, 3]])
    assert broken_groups([experts], granularity=2) == 0.25
    assert broken_groups([experts], granularity=1) == 0.0


def test_record_says_where_the_model_came_from(tmp_path):
    source = write_dense(tmp_path / "dense")
    upcycle_folder(source, tmp_path / "moe", UpcycleConfig(experts=4, top_k=2), verify_text=text_file(tmp_path))
    record = json.loads((tmp_path / "moe" / "moewright.json").read_text())
    assert record["backbone"] == "llama"
    assert record["upcycle"]["source"]["sha256"] == ModelFolder(source).fingerprint()
    assert record["upcycle"]["settings"]["router_std"] == 0.02
    assert record["upcycle"]["verification"][0]["relative_logit_difference"] <= 1e-5
    ModelFolder(tmp_path / "moe").verify_checksums()


def test_dry_run_writes_nothing_and_foretells_the_folder(tmp_path):
    source = write_dense(tmp_path / "dense", tie_word_embeddings=True)
    config = UpcycleConfig(experts=8, granularity=2, top_k=2)
    before = sorted(tmp_path.iterdir())
    foretold = upcycle_folder(source, tmp_path / "moe", config, dry_run=True).as_dict()
    assert sorted(tmp_path.iterdir()) == before
    upcycle_folder(source, tmp_path / "moe", config)
    facts = inspect_folder(tmp_path / "moe")
    assert foretold["parameters"]["total"] == facts["parameters"]["total"]
    assert foretold["parameters"]["active"] == facts["parameters"]["active"]
    assert foretold["bytes"] == facts["bytes"]
    # Same FLOPs as the dense model but for the routers: 2 layers of 8 x 32.
    flops = foretold["flops_per_token"]
    assert flops["sparse"] - flops["dense"] == 2 * 2 * 8 * 32


@pytest.mark.parametrize(
    ("family", "settings", "wanted", "first", "others"),
    [
        ("llama", {}, "mixtral", ("yes", ""), {"yes"}),
        ("qwen3", {"router_order": "softmax-topk"}, "qwen3_moe", ("yes", ""), {"yes", "no"}),
        ("gemma2", {}, "moewright", ("yes", "after import moewright.auto"), {"no"}),
        ("m2m_100", {}, "nllb-moe", ("no", "its code mixes experts up"), {"no"}),
    ],
)
def test_a_dry_run_says_which_runtimes_will_load_the_folder(tmp_path, family, settings, wanted, first, others):
    source = write_dense(tmp_path / "dense", family)
    config = UpcycleConfig(experts=4, top_k=2, **settings)
    foretold = upcycle_folder(source, tmp_path / "moe", config, format=wanted, dry_run=True).as_dict()
    assert foretold["target_format"] == wanted
    here, *rest = foretold["runtimes"]
    assert (here["runtime"].partition(" ")[0], here["loads"], here["why"]) == ("transformers", *first)
    assert {row["loads"] for row in rest} == others
    assert all(row["why"] for row in rest if row["loads"] == "no")


def test_what_measuring_takes_is_foretold(tmp_path):
    source, config = write_dense(tmp_path / "dense"), UpcycleConfig(experts=4, top_k=2)
    text = tmp_path / "text.txt"
    text.write_text("abcdefgh" * 40)
    measured = replace(config, neurons="clustered", granularity=2, calibration_text=str(text))
    model = 4 * sum(parameter.numel() for parameter in load_model(source).parameters())
    needed = [upcycle_folder(source, tmp_path / "moe", each, dry_run=True).summary["memory_needed"]
              for each in (config, measured)]  # fmt: skip
    assert needed[0] < model == needed[1]


def test_inspect_counts_tied_and_untied(tmp_path):
    source = write_dense(tmp_path / "dense", tie_word_embeddings=True)
    plain = AutoModelForCausalLM.from_pretrained(source)
    counts = inspect_folder(source)["parameters"]
    assert counts["total"] == sum(p.numel() for p in plain.parameters())
    assert counts["total_untied"] - counts["total"] == plain.lm_head.weight.numel()
    upcycle_folder(source, tmp_path / "moe", UpcycleConfig(experts=4, top_k=1))
    counts = inspect_folder(tmp_path / "moe")["parameters"]
    assert counts["total"] - counts["active"] == 2 * 3 * 3 * 32 * 64


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"top_k": 5}, "top_k=5 > experts=4"),
        ({"experts": 8, "granularity": 2, "top_k": 3}, r"top_k=3 is not a multiple of granularity=2.*use 2, 4, 6, 8"),
        ({"experts": 9, "granularity": 2}, "experts=9 is not a multiple of granularity=2"),
        ({"experts": 0}, "experts=0"),
        ({"scale": "exact", "router_order": "softmax-topk"}, "scale=exact with router_order=softmax-topk"),
        ({"scale": "calibrated"}, "scale=calibrated with router_order=topk-softmax"),
        ({"scale": "best"}, "choose one of exact, full, uniform, calibrated, none"),
        ({"router_order": "softmax"}, "choose one of softmax-topk, topk-softmax"),
        ({"router_std": 0.0}, "router_std=0.0"),
    ],
)
def test_senseless_settings_are_refused(changes, words):
    with pytest.raises(UsageError, match=words):
        UpcycleConfig(**({"experts": 4, "top_k": 2} | changes))


@pytest.mark.parametrize("layers", ["", "every:0", "every:9", "0,0", "2", "-1", "a", "0,,1"])
def test_senseless_layers_are_refused(layers):
    with pytest.raises(UsageError, match="layers="):
        chosen_layers(layers, tiny_config("llama"))


def test_granularity_must_divide_the_width(tmp_path):
    source = write_dense(tmp_path / "dense")
    with pytest.raises(UsageError, match="granularity=3 does not divide the feed-forward width 64"):
        upcycle_folder(source, tmp_path / "moe", UpcycleConfig(experts=6, granularity=3, top_k=3))
    assert not (tmp_path / "moe").exists()


def test_bad_sources_and_targets_are_refused_and_leave_nothing(tmp_path):
    config = UpcycleConfig(experts=4, top_k=2)
    source = write_dense(tmp_path / "dense")
    upcycle_folder(source, tmp_path / "moe", config)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    cases = [
        (tmp_path / "moe", tmp_path / "again", "already a mixture of experts", ModelError),
        (source, source, "source", ModelError),
        (source, tmp_path / "moe", "exists", ModelError),
        (tmp_path / "nowhere", tmp_path / "out", "no such folder", ModelError),
    ]
    for start, target, words, error in cases:
        with pytest.raises(error, match=words):
            upcycle_folder(start, target, config)
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"caf\xe9")
    for name, words in (("bad.txt", "UTF-8"), ("missing.txt", "no such file")):
        with pytest.raises(DataError, match=words):
            upcycle_folder(source, tmp_path / "out", config, verify_text=tmp_path / name)
    bad.unlink()
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_nan_weights_are_refused_and_leave_nothing(tmp_path):
    source = write_dense(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = math.nan
    model.save_pretrained(source)
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN or Inf"):
        upcycle_folder(source, tmp_path / "moe", UpcycleConfig(experts=4, top_k=2))
    assert [p.name for p in tmp_path.iterdir()] == ["dense"]


def test_calibration_reads_several_documents_and_stops_in_time(tmp_path):
    source = write_dense(tmp_path / "dense")
    config = UpcycleConfig(experts=4, top_k=1)
    ids = INPUT.flatten()
    one = upcycling_of(source, config, calibration_texts=[ids[:100]]).measured.weight_sums
    split = upcycling_of(source, config, calibration_texts=[ids[:0], ids[:100], ids[:0]]).measured.weight_sums
    assert split == one
    long = ids.repeat(40)[:4096]
    assert upcycling_of(source, config, calibration_texts=[long, ids]).measured.weight_sums[0] > 0
    with pytest.raises(DataError, match="no token"):
        upcycling_of(source, config, calibration_texts=[ids[:0]])


def test_an_exact_start_that_is_not_exact_is_not_committed(tmp_path, monkeypatch):
    source = write_dense(tmp_path / "dense")
    monkeypatch.setattr("moewright.upcycle.tensors.factors", lambda *_, **__: Factors(up=1.01))
    with pytest.raises(ModelError, match="nothing was written"):
        upcycle_folder(source, tmp_path / "moe", UpcycleConfig(experts=4, top_k=2), verify_text=text_file(tmp_path))
    assert not (tmp_path / "moe").exists()


def test_settings_that_are_ignored_are_named(tmp_path):
    source, text = write_dense(tmp_path / "dense"), text_file(tmp_path)
    config = UpcycleConfig(experts=4, top_k=2)
    with pytest.warns(UserWarning, match="calibration_text is ignored: scale=exact"):
        upcycle_folder(source, tmp_path / "a", replace(config, calibration_text=str(text)))
    with pytest.warns(UserWarning, match="verify_text is ignored"):
        upcycle_folder(source, tmp_path / "b", config, verify_text=text, dry_run=True)
    with pytest.warns(UserWarning, match="expert width of 4 is no multiple of 8"):
        upcycle_folder(source, tmp_path / "c", UpcycleConfig(experts=16, granularity=16, top_k=16))
    assert relative(logits(load_model(tmp_path / "c")), logits(load_model(source))) <= 1e-5


def test_what_float16_does_not_hold_is_refused(tmp_path):
    source = write_dense(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = 1e5
    model.save_pretrained(source)
    config = UpcycleConfig(experts=4, top_k=2)
    with pytest.raises(ModelError, match="larger than the 65504 that float16 holds"):
        upcycle_folder(source, tmp_path / "moe", config, dtype=torch.float16)
    assert [p.name for p in tmp_path.iterdir()] == ["dense"]
    upcycle_folder(source, tmp_path / "moe", config, dtype=torch.bfloat16)
