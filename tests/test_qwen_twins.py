"""Qwen2-MoE and Qwen3-MoE whose attention slides or has no biases, against transformers itself."""

import json

import pytest
import torch

from moewright.backbone.blocks import moe_layers
from moewright.backbone.load import load_model
from moewright.backbone.save import save_model
from moewright.errors import ModelError
from tests.models import logits_of, plain_transformers, relative, tiny_model
from tests.sparse import grafted, moe_of, same_state

INPUT = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(1))
FULL, SLIDING = "full_attention", "sliding_attention"
WINDOW = {"use_sliding_window": True, "sliding_window": 4}
SIZES = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def edit(folder, **fields):
    path = folder / "config.json"
    changed = {k: v for k, v in (json.loads(path.read_text()) | fields).items() if v is not ...}
    path.write_text(json.dumps(changed))


WRITTEN = [
    ("qwen2", WINDOW | {"max_window_layers": 0}, (0, 1), [SLIDING, SLIDING]),
    ("qwen2", WINDOW | {"max_window_layers": 1}, (0, 1), [FULL, SLIDING]),
    ("qwen2", WINDOW | {"layer_types": [SLIDING, FULL]}, (1,), [SLIDING, FULL]),
    ("qwen2", WINDOW | {"max_window_layers": 2}, (0, 1), [FULL, FULL]),
    ("mistral", {"sliding_window": 4}, (1,), [SLIDING, SLIDING]),
    ("qwen3", WINDOW | {"max_window_layers": 0}, (0, 1), [SLIDING, SLIDING]),
    ("qwen3", WINDOW | {"max_window_layers": 2}, (1,), [FULL, FULL]),
]


@pytest.mark.parametrize(("model_type", "changes", "layers", "types"), WRITTEN)
def test_windows_are_written_and_read_back(tmp_path, model_type, changes, layers, types):
    model = grafted(model_type, dict.fromkeys(layers, moe_of(model_type)), **changes)
    folder = save_model(model, tmp_path / "sparse")
    theirs, wanted = plain_transformers(folder), logits_of(model, INPUT)
    assert theirs.config.model_type == ("qwen3_moe" if model_type == "qwen3" else "qwen2_moe")
    assert relative(logits_of(theirs, INPUT), wanted) < 1e-6
    ours = load_model(folder)
    assert torch.equal(logits_of(ours, INPUT), wanted)
    same_state(ours, model)
    assert contents(save_model(ours, tmp_path / "again")) == contents(folder)
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(theirs.generate(INPUT, **settings), model.generate(INPUT, **settings)), "with a cache"
    # That the windows matter at all: without them the logits are others.
    edit(folder, use_sliding_window=False, layer_types=[FULL] * 2)
    changed = relative(logits_of(plain_transformers(folder), INPUT), wanted)
    assert changed > 1e-3 if SLIDING in types else changed < 1e-6


READ = [
    ("qwen3_moe", WINDOW, "qwen3"),
    ("qwen3_moe", {"use_sliding_window": False, "sliding_window": 4}, "qwen3"),
    ("qwen2_moe", WINDOW, "qwen2"),
    ("qwen2_moe", WINDOW | {"layer_types": [FULL, SLIDING]}, "qwen2"),
    ("qwen2_moe", {"qkv_bias": False}, "llama"),
    ("qwen2_moe", {"qkv_bias": False, "mlp_only_layers": [0]}, "llama"),
    ("qwen2_moe", WINDOW | {"qkv_bias": False, "layer_types": [SLIDING, SLIDING]}, "mistral"),
]


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize(("model_type", "changes", "backbone"), READ)
def test_folders_of_others_are_read_as_transformers_reads_them(tmp_path, model_type, changes, backbone, told):
    tiny_model(model_type, **SIZES, **changes).save_pretrained(tmp_path / "theirs")
    if not told and "layer_types" not in changes:  # as before transformers 5: the class says which layers slide
        edit(tmp_path / "theirs", layer_types=...)
    theirs, ours = plain_transformers(tmp_path / "theirs"), load_model(tmp_path / "theirs")
    assert ours.config.model_type == backbone
    assert relative(logits_of(ours, INPUT), logits_of(theirs, INPUT)) < 1e-6
    again = save_model(ours, tmp_path / "again")
    assert relative(logits_of(plain_transformers(again), INPUT), logits_of(theirs, INPUT)) < 1e-6
    same_state(load_model(again), ours)
    assert moe_layers(load_model(again)).keys() == moe_layers(ours).keys()


def test_biases_that_are_not_there_are_written_as_zeros(tmp_path):
    tiny_model("qwen2_moe", **SIZES, qkv_bias=False).save_pretrained(tmp_path / "theirs")
    again = plain_transformers(save_model(load_model(tmp_path / "theirs"), tmp_path / "again"))
    assert again.config.qkv_bias
    assert not again.model.layers[0].self_attn.q_proj.bias.any()


@pytest.mark.parametrize(
    ("model_type", "fields", "words"),
    [
        ("qwen2_moe", WINDOW | {"qkv_bias": False, "layer_types": [FULL, SLIDING]}, "no dense family is like that"),
        ("qwen2_moe", {"qkv_bias": False}, "no place for: model.layers.0.self_attn.k_proj.bias"),
        ("qwen2_moe", WINDOW | {"sliding_window": 0, "layer_types": ...}, "sliding_window=0"),
        ("qwen2_moe", WINDOW | {"sliding_window": "x"}, "makes no model"),
        ("qwen3_moe", WINDOW | {"sliding_window": 0}, "sliding_window=0"),
        ("qwen3_moe", WINDOW | {"sliding_window": "x"}, "sliding_window='x'"),
    ],
)
def test_windows_and_biases_that_cannot_be_are_refused(tmp_path, model_type, fields, words):
    tiny_model(model_type, **SIZES).save_pretrained(tmp_path / "theirs")
    edit(tmp_path / "theirs", **fields)
    with pytest.raises(ModelError, match=words):
        load_model(tmp_path / "theirs")


@pytest.mark.parametrize(("backbone", "types"), [("llama", [SLIDING] * 2), ("mistral", [FULL, SLIDING])])
def test_layer_types_that_the_recorded_backbone_has_not_are_refused(tmp_path, backbone, types):
    folder = save_model(grafted(backbone, {1: moe_of(backbone)}), tmp_path / "sparse")
    edit(folder, layer_types=types, **WINDOW)
    with pytest.raises(ModelError, match=f"moewright.json names the backbone '{backbone}'"):
        load_model(folder)


def test_qwen3_that_slides_in_some_layers_is_our_own_type(tmp_path):
    model = grafted("qwen3", dict.fromkeys((0, 1), moe_of("qwen3")), **WINDOW, max_window_layers=1)
    with pytest.raises(ModelError, match="in every layer or in none"):
        save_model(model, tmp_path / "out", format="qwen3_moe")
    folder = save_model(model, tmp_path / "own")
    assert json.loads((folder / "config.json").read_text())["model_type"] == "moewright"
    assert torch.equal(logits_of(load_model(folder), INPUT), logits_of(model, INPUT))
