"""Export: what is written, what is proved, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moewright.backbone.blocks import moe_layers
from moewright.backbone.formats.base import Format
from moewright.backbone.load import load_model
from moewright.backbone.save import format_of, save_model, write_model
from moewright.cli import main
from moewright.errors import ModelError
from moewright.evaluate.compare import compare_logits
from moewright.export import folder as export
from moewright.export.folder import export_folder
from moewright.export.long import LONGEST, LongText
from moewright.export.runtimes import LLAMA_CPP, SGLANG, VLLM, runtimes
from moewright.export.verify import Choice, Proof, Reference, _other_choices, prove
from tests.models import tiny_model, tiny_tokenizer, write_dense
from tests.sparse import grafted, moe_of, nllb, same_state

SIGMOID_GROUPS = {"score": "sigmoid", "num_experts": 8, "num_groups": 4, "top_groups": 2, "group_score": "top2"}
GOOD = Proof("MixtralForCausalLM, transformers 5.23.0", 1e-7, 0, True, (), (), ())


def sparse_folder(path: Path, **changes: object) -> Path:
    """A llama folder of our own type, which holds what the changes say of its layers."""
    folder = save_model(grafted("llama", dict.fromkeys((0, 1), moe_of("llama", **changes))), path, format="moewright")
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_only(writer, source, form) -> None:
    """Write as export does, and do not look at what came out."""
    write_model(writer, load_model(source), form, companions=source)


def test_export_through_the_command_line(tmp_path, capsys):
    source, out = sparse_folder(tmp_path / "own"), tmp_path / "out"
    before = {p.name: p.read_bytes() for p in source.iterdir()}
    assert main(["export", str(source), str(out), "--to", "mixtral", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["format"], facts["proof"]["other_experts"]) == ("mixtral", 0)
    assert facts["proof"]["relative_logit_difference"] < 1e-6
    assert [row["evidence"] for row in facts["runtimes"]] == ["run here", *["its source was read, it was not run"] * 3]
    assert {p.name: p.read_bytes() for p in source.iterdir()} == before
    record, card = json.loads((out / "moewright.json").read_text()), (out / "README.md").read_text()
    assert record["export"]["proof"]["greedy_tokens_agree"]
    assert {"README.md", "tokenizer.json"} <= record["files"].keys()
    assert f"`{record['export']['source']['sha256']}`" in card
    assert "| vLLM 0.33 | yes |" in card
    same_state(load_model(out), load_model(source))
    # Once more, now from the result: the same bytes but for where it came from.
    assert main(["export", str(out), str(tmp_path / "again")]) == 0
    weights = "model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (out / weights).read_bytes()
    assert (tmp_path / "again" / "config.json").read_bytes() == (out / "config.json").read_bytes()
    assert main(["export", str(source), str(out)]) == 2
    assert "exists and is not empty" in capsys.readouterr().err


def test_nllb_moe_is_exported_only_on_demand(tmp_path):
    nllb().save_pretrained(tmp_path / "theirs")
    with pytest.raises(ModelError, match=r"mixes experts up.*--to moewright.*--accept-runtime-fault"):
        export_folder(tmp_path / "theirs", tmp_path / "out", to="nllb-moe")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["theirs"]
    with pytest.warns(UserWarning, match="load this folder with moewright"):
        report = export_folder(tmp_path / "theirs", tmp_path / "out", to="nllb-moe", accept_runtime_fault=True)
    assert report.proof.expert_faults
    assert report.runtimes[0].loads == "no"
    same_state(load_model(tmp_path / "out"), load_model(tmp_path / "theirs"))


def test_our_own_type_is_proved_too(tmp_path):
    settings = moe_of("llama", score="sigmoid", selection_bias=True, renormalize=True)
    source = save_model(grafted("llama", {1: settings}).to(torch.bfloat16), tmp_path / "own")
    report = export_folder(source, tmp_path / "out", to="moewright")
    assert (report.format, report.proof.problems) == ("moewright", [])
    assert {row.loads for row in report.runtimes[1:]} == {"no"}


def test_what_is_written_wrongly_is_not_kept(tmp_path, monkeypatch):
    source = sparse_folder(tmp_path / "own")
    write = export.write_model

    def write_another(writer, model, form, **kwargs):
        with torch.no_grad():
            model.model.layers[0].mlp.experts.down_proj[1].mul_(1.5)
        write(writer, model, form, **kwargs)

    monkeypatch.setattr(export, "write_model", write_another)
    with pytest.raises(ModelError, match=r"logits differ by .* nothing was written"):
        export_folder(source, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["own"]


def test_what_is_not_read_back_to_the_bit_is_not_kept(tmp_path, monkeypatch):
    source, write = sparse_folder(tmp_path / "own"), export.write_model

    def change_afterwards(writer, model, form, **kwargs):
        write(writer, model, form, **kwargs)
        with torch.no_grad():
            model.model.layers[0].mlp.experts.down_proj[1, 0, 0] += 1e-6

    monkeypatch.setattr(export, "write_model", change_afterwards)
    with pytest.raises(ModelError, match=r"layers\.0.*experts\.1\.w2\.weight: not what was written; nothing was kept"):
        export_folder(source, tmp_path / "out", to="mixtral")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["own"]


def test_what_transformers_does_not_load_is_not_kept(tmp_path, monkeypatch):
    source = sparse_folder(tmp_path / "own")
    monkeypatch.setattr(Format, "fields", lambda self, model: {"model_type": "mixtral", "hidden_size": "?"})
    monkeypatch.setattr(export, "_write", write_only)
    with pytest.raises(ModelError, match="does not load what was written"):
        export_folder(source, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["own"]


def test_dense_sources_and_unfit_formats_are_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    dense, sparse = write_dense(tmp_path / "dense"), sparse_folder(tmp_path / "own", top_k=1)
    monkeypatch.setattr(export, "load_model", None)
    with pytest.raises(ModelError, match="is a dense llama model"):
        export_folder(dense, tmp_path / "out")
    with pytest.raises(ModelError, match="always renormalises"):
        export_folder(sparse, tmp_path / "out", to="mixtral")


def windowed(path: Path, **config: object) -> Path:
    model = grafted("mistral", dict.fromkeys((0, 1), moe_of("mistral")), **config)
    return save_model(model, path, format="moewright")


def test_texts_go_past_the_sliding_window(tmp_path, capsys):
    source = windowed(tmp_path / "own", sliding_window=64)
    assert main(["export", str(source), str(tmp_path / "out"), "--to", "mixtral", "--json"]) == 0
    proof = json.loads(capsys.readouterr().out)["proof"]
    assert (proof["longest_text"], proof["not_compared"]) == (96, [])
    assert "on texts of up to 96\ntokens." in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("wrong", [63, 65, None])
def test_a_wrong_sliding_window_is_found(tmp_path, monkeypatch, capsys, wrong):
    source, fields = windowed(tmp_path / "own", sliding_window=64), Format.fields
    monkeypatch.setattr(Format, "fields", lambda self, model: fields(self, model) | {"sliding_window": wrong})
    assert main(["export", str(source), str(tmp_path / "out"), "--to", "mixtral"]) == 2
    assert "logits differ by" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


DYNAMIC = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64, "factor": 2.0}
DYNAMIC |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


def test_texts_go_past_the_original_length_of_rotary_scaling(tmp_path, monkeypatch):
    model = grafted("llama", dict.fromkeys((0, 1), moe_of("llama")), rope_parameters=DYNAMIC)
    source, fields = save_model(model, tmp_path / "own", format="moewright"), Format.fields
    assert export_folder(source, tmp_path / "out", to="mixtral").proof.longest_text == 96
    wrong = dict.fromkeys(("rope_parameters", "rope_scaling"), DYNAMIC | {"long_factor": [2.0, 2.0, 2.0, 2.1]})
    monkeypatch.setattr(Format, "fields", lambda self, model: fields(self, model) | wrong)
    with pytest.raises(ModelError, match="logits differ by"):
        export_folder(source, tmp_path / "wrong", to="mixtral")


@pytest.mark.parametrize(
    ("model_type", "config", "length", "unseen"),
    [
        ("mistral", {"sliding_window": None}, None, ()),
        ("mistral", {"sliding_window": 16}, None, ()),  # 48 tokens show it
        ("mistral", {"sliding_window": 17}, 49, ()),
        ("mistral", {"sliding_window": 128}, None, ()),  # no text is longer
        ("mistral", {"sliding_window": 120}, 128, ()),
        ("mistral", {"sliding_window": 4096, "max_position_embeddings": 2**15}, 4128, ()),
        ("mistral", {"sliding_window": 8192, "max_position_embeddings": 2**15}, None, ("sliding window beyond 8192",)),
        ("qwen2", {"sliding_window": 64, "use_sliding_window": False}, None, ()),
        ("qwen2", {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 1}, 96, ()),
        ("gemma2", {"sliding_window": 64}, 96, ()),
        ("llama", {"rope_parameters": DYNAMIC}, 96, ()),
        ("t5", {}, None, ()),
    ],
)
def test_how_long_the_long_text_is(model_type, config, length, unseen):
    found = LongText.of(tiny_model(model_type, **config), short=48)
    assert (found.length, len(found.unseen)) == (length, len(unseen))
    assert all(words in said for words, said in zip(unseen, found.unseen, strict=True))
    if length is not None:
        at = found.positions().tolist()
        assert {0, length - 1, found.limit, found.limit - 1} & set(range(length)) <= set(at)
        assert len(at) < 64 + LONGEST // 64 + 2


def test_what_is_not_compared_is_said(tmp_path, capsys):
    source = windowed(tmp_path / "own", sliding_window=8192, max_position_embeddings=2**15)
    assert main(["export", str(source), str(tmp_path / "out"), "--to", "mixtral"]) == 0
    assert "8192" in capsys.readouterr().out
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Not compared: the sliding window beyond 8192 tokens: texts of more than 4608 are not compared." in card


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"relative_logit_difference": 2e-5}, "logits differ by 2.0e-05"),
        ({"relative_logit_difference": float("nan")}, "logits differ"),
        ({"other_experts": 3}, "3 choices"),
        ({"greedy_tokens_agree": False}, "generated tokens"),
        ({"deaf_settings": ("norm_topk_prob",)}, "ignores norm_topk_prob"),
        ({"keys": ("missing lm_head.weight",)}, "missing lm_head"),
        ({"expert_faults": ("model.layers.0.mlp: expert 2 and 5 of 9 tokens",)}, "expert 2"),
    ],
)
def test_every_finding_counts(changes, words):
    assert not GOOD.problems
    (problem,) = replace(GOOD, **changes).problems
    assert words in problem


def test_ties_may_be_broken_either_way():
    logits = torch.tensor([[1.0, 2.0, 2.0 - 1e-7, 0.0], [1.0, 2.0, 1.5, 0.0]])
    choice, short = Choice(logits, torch.tensor([[1], [1]])), LongText(None, 0, ())
    reference = Reference({"mask/a": torch.ones(1, 2)}, {}, {"a": [choice]}, torch.zeros(1), short)
    theirs = torch.tensor([[False, False, True, False], [False, True, False, False]])
    assert _other_choices({"chosen/a/0": theirs}, reference, "a") == (0, 0)
    theirs[1] = theirs[0]
    assert _other_choices({"chosen/a/0": theirs}, reference, "a") == (1, 0)
    padded = replace(reference, cases={"mask/a": torch.tensor([[1, 0]])})
    assert _other_choices({"chosen/a/0": theirs}, padded, "a") == (0, 0)
    # In the long text what follows a tie may differ for its sake.
    long = replace(reference, cases={"mask/long": torch.ones(1, 2)}, choices={"long": [choice]})
    assert _other_choices({"chosen/long/0": theirs}, long, "long") == (0, 0)
    assert _other_choices({"chosen/long/0": theirs.flip(0)[[0, 0]]}, long, "long") == (0, 0)
    theirs[0] = torch.tensor([False, True, False, False])
    assert _other_choices({"chosen/long/0": theirs}, long, "long") == (1, None)


def test_choices_are_compared_by_what_they_were_made_by():
    settings = moe_of("llama", score="sigmoid", selection_bias=True, num_experts=8, num_groups=4, top_groups=2)
    model = grafted("llama", dict.fromkeys((0, 1), replace(settings, group_score="top2")))
    for moe in moe_layers(model).values():
        moe.router.bias.uniform_(-1.0, 1.0)  # so that it decides more than the logits do
    reference = Reference.of(model)
    found, name = {}, "48"
    for layer, (values_TE, experts_TK) in enumerate(reference.choices[name]):
        assert torch.equal(values_TE.topk(2).indices, experts_TK)
        assert (values_TE.isinf().sum(dim=1) == 4).all(), "of four groups two are out"
        found[f"chosen/{name}/{layer}"] = torch.zeros(values_TE.shape, dtype=torch.bool).scatter(1, experts_TK, True)
    assert _other_choices(found, reference, name) == (0, None)
    for token in range(96):
        others = {key: chosen_TE.clone() for key, chosen_TE in found.items()}
        others[f"chosen/{name}/0"][token] = found[f"chosen/{name}/0"][token].roll(1)
        assert _other_choices(others, reference, name) == (1, None)


@pytest.mark.parametrize(
    ("model_type", "changes", "wanted", "refused"),
    [
        ("llama", {}, "mixtral", {}),
        ("llama", {}, "qwen2_moe", {LLAMA_CPP: "never renormalises"}),
        ("llama", {"router_order": "softmax-topk"}, "qwen2_moe", {}),
        ("llama", {"router_order": "softmax-topk", "shared_size": 8}, "qwen2_moe", {LLAMA_CPP: "the gate is zero"}),
        ("qwen3", {"router_order": "softmax-topk"}, "qwen3_moe", {LLAMA_CPP: "always renormalises"}),
        ("llama", {"score": "sigmoid"}, "glm4_moe", {}),
        ("llama", SIGMOID_GROUPS, "glm4_moe", {LLAMA_CPP: "whatever their groups"}),
        ("olmo2", {}, "flex_olmo", {SGLANG: "no FlexOlmo", LLAMA_CPP: "no FlexOlmo"}),
        ("nemotron", {}, "moewright", dict.fromkeys((VLLM, SGLANG, LLAMA_CPP), "our own model type")),
    ],
)
def test_runtimes_are_named_with_the_reason(model_type, changes, wanted, refused):
    model = grafted(model_type, dict.fromkeys((0, 1), moe_of(model_type, **changes)))
    rows = {row.runtime: row for row in runtimes(format_of(model, wanted=wanted), model)}
    assert {name for name, row in rows.items() if row.loads == "no"} == refused.keys()
    assert all(words in rows[name].why for name, words in refused.items())


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"head_dim": 16}, "ignores head_dim"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope scaling"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1234.5}}, "truncates rope_theta=1234.5"),
    ],
)
def test_what_sglang_overlooks_in_mixtral_is_named(config, words):
    model = grafted("llama", dict.fromkeys((0, 1), moe_of("llama")), **config)
    rows = {row.runtime: row for row in runtimes(format_of(model), model)}
    assert words in rows[SGLANG].why


def test_whether_runtimes_slide_is_not_known():
    layers = {1: moe_of("mistral")}
    for window, loads in ((None, {"yes", "no"}), (6, {"unknown"})):
        model = grafted("mistral", layers, sliding_window=window)
        assert {row.loads for row in runtimes(format_of(model, wanted="qwen2_moe"), model)} == loads


def test_no_runtime_knows_glm_with_another_activation():
    model = grafted("llama", {1: moe_of("llama", score="sigmoid", activation="gelu")}, hidden_act="gelu")
    assert {row.why for row in runtimes(format_of(model, wanted="glm4_moe"), model)} == {
        "it knows no activation but silu, and this is gelu"
    }


def test_several_end_tokens_are_no_trouble():
    model = grafted("llama", dict.fromkeys((0, 1), moe_of("llama")), eos_token_id=[256, 10])
    reference = Reference.of(model)
    assert not any((ids == 10).any() for name, ids in reference.cases.items() if name.startswith("ids/"))


def test_logits_that_are_not_finite_are_not_compared():
    with pytest.raises(ModelError, match="not finite"):
        compare_logits([torch.full((3, 4), float("nan"))], [torch.ones(3, 4)], [torch.arange(3)], dtype=torch.float32)


def test_layers_that_become_sparse_late_are_probed_too(tmp_path):
    model = grafted("llama", {5: moe_of("llama")}, num_hidden_layers=6)
    report = export_folder(save_model(model, tmp_path / "own", format="moewright"), tmp_path / "out", to="qwen2_moe")
    assert not report.proof.problems


@pytest.mark.parametrize("changes", [{"balance_scope": "global"}, {"balance_adaptation": 0.2, "capacity_factor": 1.0}])
def test_what_only_training_reads_is_left_behind(tmp_path, changes):
    source = sparse_folder(tmp_path / "own", balance_loss=0.1, **changes)
    report = export_folder(source, tmp_path / "out", to="qwen2_moe")
    assert not report.proof.problems
    moving = load_model(source).state_dict().keys() - load_model(tmp_path / "out").state_dict().keys()
    assert {name.rpartition(".")[2] for name in moving} in ({"previous_counts"}, {"balance_coefficient"})


def test_padding_is_left_out_of_a_proof_and_nan_is_not(tmp_path):
    model = grafted("llama", dict.fromkeys((0, 1), moe_of("llama")))
    folder, reference = save_model(model, tmp_path / "out"), Reference.of(model)
    assert {"left", "right", "1", "7", "48"} == reference.logits.keys()
    padded = reference.cases["mask/left"] == 0
    reference.logits["left"][padded] = 99.0
    assert not prove(folder, reference, ours=False).problems
    reference.logits["left"][~padded] = float("nan")
    assert prove(folder, reference, ours=False).problems == ["logits differ by nan (1e-05 is allowed)"]
