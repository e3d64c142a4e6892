"""glm4_moe, the twin of layers with sigmoid scores, against transformers itself."""

import json
import re
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from moewright.backbone.blocks import moe_layers
from moewright.backbone.formats.choose import choose_format
from moewright.backbone.inspect import inspect_folder
from moewright.backbone.load import load_model
from moewright.backbone.save import save_model
from moewright.cli import main
from moewright.errors import ModelError
from moewright.export import folder as export
from moewright.export.folder import export_folder
from tests.models import logits_of, plain_transformers, relative, tiny_config, tiny_model
from tests.sparse import grafted, moe_of, same_state, slow_sigmoid_block

INPUT = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(2))
GROUPS = {"num_experts": 8, "num_groups": 4, "top_groups": 2, "group_score": "top2"}
LAYERS = [
    {},
    {"selection_bias": True, "renormalize": True, "routed_scale": 2.5},
    GROUPS | {"selection_bias": True},
    {"shared_size": 32, "selection_bias": True, "top_k": 1},
]
SIZES = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def sigmoid(**changes):
    return moe_of("llama", score="sigmoid", **changes)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def edit(folder, **fields):
    path = folder / "config.json"
    changed = {k: v for k, v in (json.loads(path.read_text()) | fields).items() if v is not ...}
    path.write_text(json.dumps(changed))


def glm(**changes):
    """Glm4Moe of transformers with biases that decide some choices."""
    model = tiny_model("glm4_moe", **(SIZES | changes))
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.uniform_(-0.3, 0.3)
    return model


@pytest.mark.parametrize("changes", LAYERS, ids=str)
@pytest.mark.parametrize(
    ("model_type", "dense", "backbone"),
    [
        ("llama", 0, {}),
        ("llama", 1, {"tie_word_embeddings": True, "head_dim": 16}),
        ("mistral", 1, {}),
        ("qwen2", 1, {"tie_word_embeddings": True}),
        ("qwen3", 0, {"head_dim": 16}),
    ],
)
def test_it_is_chosen_for_sigmoid_scores_and_computes_the_same(tmp_path, model_type, dense, backbone, changes):
    model = grafted(model_type, dict.fromkeys(range(dense, 2), sigmoid(**changes)), **backbone)
    folder = save_model(model, tmp_path / "sparse")
    theirs, wanted = plain_transformers(folder), logits_of(model, INPUT)
    assert type(theirs).__name__ == "Glm4MoeForCausalLM"
    assert relative(logits_of(theirs, INPUT), wanted) < 1e-6
    ours = load_model(folder)
    assert torch.equal(logits_of(ours, INPUT), wanted)
    same_state(ours, model)
    assert {n: moe.config for n, moe in moe_layers(ours).items()} == {
        n: moe.config for n, moe in moe_layers(model).items()
    }
    assert ours.config.model_type == model_type
    assert contents(save_model(ours, tmp_path / "again")) == contents(folder)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_rotary_settings_come_along(tmp_path, rope):
    rope = rope | {"rope_theta": 500.0}
    model = grafted("llama", {1: sigmoid()}, rope_parameters=dict(rope), max_position_embeddings=64)
    folder = save_model(model, tmp_path / "sparse")
    assert relative(logits_of(plain_transformers(folder), INPUT), logits_of(model, INPUT)) < 1e-6
    ours = load_model(folder)
    assert torch.equal(logits_of(ours, INPUT), logits_of(model, INPUT))
    assert ours.config.rope_parameters == model.config.rope_parameters
    fields = json.loads((folder / "config.json").read_text())
    assert fields["partial_rotary_factor"] == fields["rope_parameters"]["partial_rotary_factor"] == 1.0
    edit(folder, rope_parameters=...)  # who reads the older form alone gets the same
    for again in (plain_transformers(folder), load_model(folder)):
        assert relative(logits_of(again, INPUT), logits_of(model, INPUT)) < 1e-6


READ = [
    {},
    {"partial_rotary_factor": 0.5, "first_k_dense_replace": 0},
    {"partial_rotary_factor": 1.0, "attention_bias": True, "use_qk_norm": True, "n_shared_experts": 3},
    {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5},
    {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "norm_topk_prob": False, "tie_word_embeddings": True},
    {"n_routed_experts": 8, "n_group": 4, "topk_group": 4},
]


@pytest.mark.parametrize("changes", READ, ids=str)
def test_folders_of_others_are_read_and_written_back(tmp_path, monkeypatch, changes):
    theirs = glm(**changes)
    theirs.save_pretrained(tmp_path / "theirs")
    wanted = logits_of(theirs, INPUT)
    ours = load_model(tmp_path / "theirs")
    assert relative(logits_of(ours, INPUT), wanted) < 2e-6
    again = save_model(ours, tmp_path / "again")
    assert relative(logits_of(plain_transformers(again), INPUT), wanted) < 2e-6
    same_state(load_model(again), ours)
    own = save_model(ours, tmp_path / "own", format="moewright")
    same_state(load_model(own), ours)
    monkeypatch.setattr("transformers.models.glm4_moe.modeling_glm4_moe.Glm4MoeMoE.forward", slow_sigmoid_block)
    assert relative(logits_of(ours, INPUT), logits_of(theirs, INPUT)) < 2e-6


def test_biases_decide_choices_and_groups_limit_them():
    """That the cases above would tell: without the biases, or without the groups, the logits are others."""
    theirs = glm(n_routed_experts=8, n_group=4, topk_group=2)
    wanted = logits_of(theirs, INPUT)
    theirs.model.layers[1].mlp.gate.topk_group = 4
    assert relative(logits_of(theirs, INPUT), wanted) > 1e-3
    theirs.model.layers[1].mlp.gate.topk_group = 2
    theirs.model.layers[1].mlp.gate.e_score_correction_bias.zero_()
    assert relative(logits_of(theirs, INPUT), wanted) > 1e-3


def test_old_configs_rotate_half_of_each_head(tmp_path):
    glm().save_pretrained(tmp_path / "theirs")
    edit(tmp_path / "theirs", rope_parameters=..., rope_theta=1e4, rope_scaling=None)  # as before transformers 5
    ours, theirs = load_model(tmp_path / "theirs"), plain_transformers(tmp_path / "theirs")
    assert ours.config.rope_parameters["partial_rotary_factor"] == 0.5
    assert relative(logits_of(ours, INPUT), logits_of(theirs, INPUT)) < 2e-6
    edit(tmp_path / "theirs", partial_rotary_factor=1.0)
    whole = load_model(tmp_path / "theirs")
    assert relative(logits_of(whole, INPUT), logits_of(ours, INPUT)) > 1e-3
    assert relative(logits_of(whole, INPUT), logits_of(plain_transformers(tmp_path / "theirs"), INPUT)) < 2e-6


def test_the_bias_is_float32_in_a_bfloat16_folder(tmp_path):
    model = glm().to(torch.bfloat16)
    bias = model.model.layers[1].mlp.gate.e_score_correction_bias
    bias.data = torch.linspace(0.1, 0.2, 4)  # which bfloat16 does not hold
    model.save_pretrained(tmp_path / "theirs")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = load_model(tmp_path / "theirs")
        assert inspect_folder(tmp_path / "theirs")["dtype"] == "bfloat16"
    assert ours.dtype == torch.bfloat16
    assert torch.equal(moe_layers(ours)[1].router.bias, bias)
    folder = save_model(ours, tmp_path / "again")
    stored = load_file(folder / "model.safetensors")
    assert {str(tensor.dtype) for tensor in stored.values()} == {"torch.bfloat16", "torch.float32"}
    assert torch.equal(stored["model.layers.1.mlp.gate.e_score_correction_bias"], bias)
    assert torch.equal(plain_transformers(folder).model.layers[1].mlp.gate.e_score_correction_bias, bias)
    # Also where there is none to keep.
    zeros = save_model(grafted("llama", {1: sigmoid()}).to(torch.bfloat16), tmp_path / "zeros")
    assert (
        load_file(zeros / "model.safetensors")["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32
    )
    assert load_model(zeros).dtype == torch.bfloat16


def test_export_proves_it(tmp_path, capsys):
    settings = sigmoid(**GROUPS, selection_bias=True, renormalize=True, routed_scale=2.5, shared_size=16)
    model = grafted("qwen2", {1: settings})
    moe_layers(model)[1].router.bias.uniform_(-1.0, 1.0)
    source = save_model(model, tmp_path / "own", format="moewright")
    assert main(["export", str(source), str(tmp_path / "out"), "--to", "glm4_moe", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["format"], facts["proof"]["other_experts"]) == ("glm4_moe", 0)
    assert facts["proof"]["relative_logit_difference"] < 1e-6
    assert not facts["proof"]["expert_faults"] + facts["proof"]["deaf_settings"]
    assert [row["loads"] for row in facts["runtimes"]] == ["yes", "yes", "yes", "no"]
    same_state(load_model(tmp_path / "out"), load_model(source))


@pytest.mark.parametrize("what", ["bias", "scale"])
def test_export_finds_a_runtime_that_ignores_the_bias_or_the_scale(tmp_path, monkeypatch, what):
    """What is written says another thing than the model: transformers in its own process must be heard to differ."""
    model = grafted("llama", {1: sigmoid(selection_bias=True, routed_scale=2.5)})
    moe_layers(model)[1].router.bias.uniform_(-1.0, 1.0)
    source = save_model(model, tmp_path / "own", format="moewright")
    write = export.write_model

    def write_another(writer, model, form, **kwargs):
        if what == "bias":
            moe_layers(model)[1].router.bias.zero_()
        else:
            moe_layers(model)[1].configure(sigmoid(selection_bias=True))
        write(writer, model, form, **kwargs)

    monkeypatch.setattr(export, "write_model", write_another)
    with pytest.raises(ModelError, match="choices of experts differ" if what == "bias" else "logits differ"):
        export_folder(source, tmp_path / "out")


REFUSED = [
    ("llama", {}, {"score": "softmax"}, "sigmoid each"),
    ("llama", {}, {"num_experts": 1, "top_k": 1}, "two experts"),
    ("llama", {}, GROUPS | {"group_score": "max"}, "best two scores"),
    ("llama", {}, {"shared_size": 16, "shared_mode": "gated"}, "added without a gate"),
    ("llama", {}, {"shared_size": 24}, "a multiple of expert_size=16 wide, this one 24"),
    ("llama", {}, {"output_masking": 0.5}, "no output_masking"),
    ("llama", {}, {"logit_norm": 1.0}, "no logit_norm"),
    ("llama", {"attention_bias": True}, {}, "no bias on the output projection"),
    ("llama", {"mlp_bias": True}, {}, "dense layers have another form"),
    ("qwen3", {"attention_bias": True}, {}, "no bias on the output projection"),
    ("mistral", {"sliding_window": 4}, {}, "no sliding attention"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}, {}, "no sliding attention"),
    ("granite", {}, {}, "it stands for glm4_moe or llama"),
]


@pytest.mark.parametrize(("model_type", "backbone", "changes", "words"), REFUSED)
def test_what_it_does_not_compute_is_refused(model_type, backbone, changes, words):
    layers, config = {1: moe_of("llama", **({"score": "sigmoid"} | changes))}, tiny_config(model_type, **backbone)
    with pytest.raises(ModelError, match=f"format=glm4_moe: .*{words}"):
        choose_format(config, layers, wanted="glm4_moe")


def test_dense_layers_must_come_first():
    config = tiny_config("llama", num_hidden_layers=3)
    assert choose_format(config, dict.fromkeys((1, 2), sigmoid())).name == "glm4_moe"
    for layers in ((0, 1), (0, 2), (1,)):
        assert choose_format(config, dict.fromkeys(layers, sigmoid())).name == "moewright"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"norm_topk_prob": True, "num_experts_per_tok": 1}, "invalid sparse layers: renormalize with top_k=1"),
        ({"num_experts_per_tok": 5}, "top_k=5 > num_experts=4"),
        ({"n_group": 3, "topk_group": 1}, "num_groups=3 with num_experts=4"),
        ({"n_group": 2, "topk_group": 3}, "top_groups=3 of num_groups=2"),
        ({"n_group": 4, "topk_group": 2}, "each group needs two"),
        ({"n_group": "2"}, "field 'n_group'"),
        ({"n_shared_experts": 0}, "n_shared_experts=0"),
        ({"n_shared_experts": None}, "field 'n_shared_experts'"),
        ({"routed_scaling_factor": "x"}, "field 'routed_scaling_factor'"),
        ({"first_k_dense_replace": -1}, "first_k_dense_replace=-1"),
        ({"first_k_dense_replace": 2}, "none of its layers is sparse"),
        ({"n_shared_experts": 2}, "shapes that disagree"),
        ({"use_qk_norm": True}, "tensors missing"),
    ],
)
def test_senseless_folders_are_refused(tmp_path, fields, words):
    glm().save_pretrained(tmp_path / "theirs")
    edit(tmp_path / "theirs", **fields)
    with pytest.raises(ModelError, match=re.escape(words)) as caught:
        load_model(tmp_path / "theirs")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.gate.e_score_correction_bias", "model.layers.1.mlp.shared_experts.down_proj.weight"]
)
def test_zeros_that_others_changed_are_not_dropped(tmp_path, name):
    folder = save_model(grafted("llama", {1: sigmoid()}), tmp_path / "sparse")
    tensors = load_file(folder / "model.safetensors")
    assert not tensors[name].any()
    tensors[name] += 0.5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=re.escape(f"{name} is not 0 everywhere")):
        load_model(folder)
    (folder / "moewright.json").unlink()
    assert relative(logits_of(load_model(folder), INPUT), logits_of(plain_transformers(folder), INPUT)) < 2e-6


def test_a_part_of_heads_that_the_recorded_backbone_does_not_rotate_is_refused(tmp_path):
    folder = save_model(grafted("llama", {1: sigmoid()}), tmp_path / "sparse")
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
    edit(folder, rope_parameters=rope | {"partial_rotary_factor": 0.5})
    with pytest.raises(ModelError, match=r"llama, which moewright\.json names, rotates whole heads"):
        load_model(folder)
    edit(folder, rope_parameters="x")
    with pytest.raises(ModelError, match="rope settings 'x' are no table"):
        load_model(folder)


def test_layers_that_predict_later_tokens_are_left_out_aloud(tmp_path):
    theirs = glm()
    theirs.save_pretrained(tmp_path / "theirs")
    path = tmp_path / "theirs" / "model.safetensors"
    tensors = load_file(path)
    more = {name.replace("layers.1", "layers.2"): t.clone() for name, t in tensors.items() if ".layers.1." in name}
    save_file(tensors | more, path, metadata={"format": "pt"})
    with pytest.warns(UserWarning, match=f"{len(more)} tensors of layers that predict later tokens"):
        ours = load_model(tmp_path / "theirs")
    assert relative(logits_of(ours, INPUT), logits_of(theirs, INPUT)) < 2e-6
    again = save_model(ours, tmp_path / "again")
    assert json.loads((again / "config.json").read_text())["num_nextn_predict_layers"] == 0
    assert relative(logits_of(plain_transformers(again), INPUT), logits_of(theirs, INPUT)) < 2e-6
    edit(tmp_path / "theirs", num_nextn_predict_layers=0)
    with pytest.raises(ModelError, match=r"no place for: .*model\.layers\.2"):
        load_model(tmp_path / "theirs")


def test_a_layer_whose_number_transformers_ignores_elsewhere_must_be_whole(tmp_path):
    # Its class ignores tensors of layers 46 and 92, where GLM-4.5 keeps what predicts later tokens.
    glm(num_hidden_layers=47).save_pretrained(tmp_path / "theirs")
    path = tmp_path / "theirs" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.46.self_attn.q_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"missing .*model\.layers\.46\.self_attn\.q_proj"):
        load_model(tmp_path / "theirs")


def test_a_grafted_glm_trains(tmp_path):
    glm().save_pretrained(tmp_path / "theirs")
    model = load_model(tmp_path / "theirs").train()
    model(input_ids=INPUT, labels=INPUT).loss.backward()
    moe = moe_layers(model)[1]
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in moe.parameters())
