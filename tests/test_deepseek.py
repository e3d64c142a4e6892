"""deepseek_v3, which has an attention of its own: folders read, computed, trained and written back."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from moewright.backbone.blocks import moe_layers
from moewright.backbone.formats.choose import choose_format
from moewright.backbone.load import load_model
from moewright.backbone.save import save_model
from moewright.cli import main
from moewright.errors import ModelError
from tests.models import logits_of, plain_transformers, relative, tiny_config, tiny_model
from tests.sparse import grafted, moe_of, same_state, slow_sigmoid_block

INPUT = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(3))


def deepseek(**changes):
    """DeepseekV3 of transformers with biases that decide some choices."""
    model = tiny_model("deepseek_v3", **changes)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.uniform_(-0.3, 0.3)
    return model


def edit(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


READ = [
    {},
    {"q_lora_rank": None, "first_k_dense_replace": 0},
    {"rope_interleave": False, "attention_bias": True, "n_shared_experts": 2},
    {"n_group": 1, "topk_group": 1, "norm_topk_prob": False, "routed_scaling_factor": 1.0},
    {"n_group": 4, "topk_group": 4, "num_hidden_layers": 3, "first_k_dense_replace": 2, "tie_word_embeddings": True},
]


@pytest.mark.parametrize("changes", READ, ids=str)
def test_folders_of_others_are_read_computed_and_written_back(tmp_path, monkeypatch, changes):
    theirs = deepseek(**changes)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, wanted = load_model(tmp_path / "theirs"), logits_of(theirs, INPUT)
    assert relative(logits_of(ours, INPUT), wanted) < 2e-6
    again = save_model(ours, tmp_path / "again")
    fields = json.loads((again / "config.json").read_text())
    assert (fields["scoring_func"], fields["topk_method"]) == ("sigmoid", "noaux_tc")
    assert relative(logits_of(plain_transformers(again), INPUT), wanted) < 2e-6
    stored, source = (load_file(path / "model.safetensors") for path in (again, tmp_path / "theirs"))
    assert all(torch.equal(stored[name], tensor) for name, tensor in source.items())
    same_state(load_model(again), ours)
    monkeypatch.setattr(
        "transformers.models.deepseek_v3.modeling_deepseek_v3.DeepseekV3MoE.forward", slow_sigmoid_block
    )
    assert relative(logits_of(ours, INPUT), logits_of(theirs, INPUT)) < 2e-6, "token by token"


def test_layers_that_predict_later_tokens_are_left_out_aloud(tmp_path):
    theirs = deepseek()
    theirs.save_pretrained(tmp_path / "theirs")
    path = tmp_path / "theirs" / "model.safetensors"
    tensors = load_file(path)
    more = {name.replace("layers.1", "layers.2"): t.clone() for name, t in tensors.items() if ".layers.1." in name}
    save_file(tensors | more, path, metadata={"format": "pt"})
    with pytest.warns(UserWarning, match=f"{len(more)} tensors of layers that predict later tokens"):
        ours = load_model(tmp_path / "theirs")
    again = save_model(ours, tmp_path / "again")
    assert json.loads((again / "config.json").read_text())["num_nextn_predict_layers"] == 0
    assert relative(logits_of(plain_transformers(again), INPUT), logits_of(theirs, INPUT)) < 2e-6


def test_it_trains_and_is_exported(tmp_path, capsys):
    deepseek().save_pretrained(tmp_path / "theirs")
    model = load_model(tmp_path / "theirs").train()
    model(input_ids=INPUT, labels=INPUT).loss.backward()
    moe = moe_layers(model)[1]
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in moe.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.01 * parameter.grad
    trained = save_model(model, tmp_path / "trained", format="moewright")
    assert main(["export", str(trained), str(tmp_path / "out"), "--to", "deepseek_v3", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["proof"]["relative_logit_difference"] < 1e-6
    assert [row["loads"] for row in facts["runtimes"]] == ["yes", "unknown", "unknown", "unknown"]
    same_state(load_model(tmp_path / "out"), model)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"score": "softmax"}, "sigmoid each"),
        ({"num_groups": 2, "group_score": "max"}, "best two scores"),
        ({"shared_size": 24}, "a multiple of expert_size=16 wide, this one 24"),
        ({"output_masking": 0.5}, "no output_masking"),
        ({"router_bias": True}, "no router_bias"),
    ],
)
def test_what_it_does_not_compute_is_refused(changes, words):
    layers = {1: moe_of("deepseek_v3", **({"score": "sigmoid"} | changes))}
    with pytest.raises(ModelError, match=f"format=deepseek_v3: .*{words}"):
        choose_format(tiny_config("deepseek_v3"), layers, wanted="deepseek_v3")


def test_no_dense_family_becomes_one():
    with pytest.raises(ModelError, match=r"format=deepseek_v3: .* it stands for deepseek_v3"):
        save_model(grafted("llama", {1: moe_of("llama", score="sigmoid")}), "nowhere", format="deepseek_v3")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"n_group": 3, "topk_group": 1}, "num_groups=3 with num_experts=8"),
        ({"n_shared_experts": 0}, "n_shared_experts=0"),
        ({"first_k_dense_replace": -1}, "first_k_dense_replace=-1"),
        ({"scoring_func": "softmax"}, "scoring_func='softmax': transformers scores experts with a sigmoid"),
        ({"topk_method": "greedy"}, "topk_method='greedy'"),
        ({"moe_layer_freq": 2}, "moe_layer_freq=2"),
        ({"n_routed_experts": 16}, "calls for [16, 32]"),
        ({"quantization_config": {"quant_method": "fp8"}}, "FineGrainedFP8Config(dequantize=True)"),
    ],
)
def test_senseless_and_quantised_folders_are_refused(tmp_path, fields, words):
    deepseek().save_pretrained(tmp_path / "theirs")
    edit(tmp_path / "theirs", **fields)
    with pytest.raises(ModelError, match=re.escape(words)) as caught:
        load_model(tmp_path / "theirs")
    assert "\n" not in str(caught.value)
