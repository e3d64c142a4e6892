"""Every row of the table of families, and every sparse architecture, against transformers itself."""

import copy
import json
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import moewright.auto  # noqa: F401  # registers our type
from moewright.backbone.auto_type import MoewrightForCausalLM
from moewright.backbone.blocks import moe_layers, routing_contexts
from moewright.backbone.formats.choose import FORMATS, TWINS, choose_format
from moewright.backbone.formats.own import settings_from
from moewright.backbone.formats.rows import Constant
from moewright.backbone.graft import graft, ungraft
from moewright.backbone.load import load_model
from moewright.backbone.save import save_model
from moewright.backbone.skeleton import has_tied_head, untie_head
from moewright.errors import ModelError, UsageError
from moewright.evaluate.perplexity import evaluate_files
from moewright.family.config import chosen_layers
from moewright.family.table import FAMILIES as TABLE
from moewright.family.table import dense_families
from moewright.train.run_file import load_run
from moewright.train.start import start
from moewright.upcycle.apply import upcycling_of
from moewright.upcycle.config import UpcycleConfig
from tests.models import (
    FAMILIES,
    SIZES,
    logits_of,
    plain_transformers,
    relative,
    tiny_config,
    tiny_model,
    write_dense,
)
from tests.sparse import INPUT, grafted, moe_of, nllb, same_state


def test_the_list_of_the_tests_is_the_table():
    assert sorted(FAMILIES) == sorted(dense_families())


FORMS = [*((name, {}) for name in FAMILIES), ("t5", {"feed_forward_proj": "gated-gelu"})]
FORMS += [("llama", {"mlp_bias": True, "attention_bias": True}), ("granite", {"mlp_bias": True})]
FORMS += [(name, {"tie_word_embeddings": True}) for name in FAMILIES if "d_model" not in SIZES.get(name, {})]


@pytest.mark.parametrize(("model_type", "changes"), FORMS)
def test_dense_folder_gives_the_model_of_transformers(tmp_path, model_type, changes):
    folder = write_dense(tmp_path / "dense", model_type, **changes)
    ours, theirs = load_model(folder), plain_transformers(folder)
    assert torch.equal(logits_of(ours, INPUT), logits_of(theirs, INPUT))
    assert has_tied_head(ours) == has_tied_head(theirs)
    again = save_model(ours, tmp_path / "again", companions=folder)
    assert torch.equal(logits_of(plain_transformers(again), INPUT), logits_of(theirs, INPUT))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_our_own_type_gives_every_model_back(tmp_path, model_type):
    layers = {0: moe_of(model_type), 1: moe_of(model_type, num_experts=6, top_k=1, shared_size=8, shared_mode="gated")}
    model = grafted(model_type, layers)
    folder = save_model(model, tmp_path / "own", format="moewright")
    fields = json.loads((folder / "config.json").read_text())
    assert (fields["model_type"], fields["backbone"]["model_type"]) == ("moewright", model_type)
    same_state(load_model(folder), model)
    auto = AutoModelForSeq2SeqLM if model.config.is_encoder_decoder else AutoModelForCausalLM
    loaded = auto.from_pretrained(folder)
    assert torch.equal(logits_of(loaded, INPUT), logits_of(model, INPUT))
    assert type(loaded) is type(model)
    again = save_model(load_model(folder), tmp_path / "again", format="moewright")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {p.name: p.read_bytes() for p in again.iterdir()}


def test_our_own_type_keeps_what_no_twin_holds(tmp_path):
    settings = moe_of("llama", score="sigmoid", selection_bias=True, renormalize=True, routed_scale=2.5, num_groups=2)
    model = grafted("llama", {1: replace(settings, shared_size=8, shared_mode="residual", balance_loss=0.01)})
    folder = save_model(model.to(torch.bfloat16), tmp_path / "own")
    ours = load_model(folder)
    same_state(ours, model)
    assert ours.dtype == torch.bfloat16
    assert moe_layers(ours)[1].router.bias.dtype == torch.float32
    assert moe_layers(ours)[1].config == moe_layers(model)[1].config


def test_plain_transformers_refuses_our_own_type(tmp_path):
    folder = save_model(grafted("nemotron", {0: moe_of("nemotron")}), tmp_path / "own")
    script = f"from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained({str(folder)!r})"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert run.returncode == 1
    assert "model type `moewright`" in run.stderr


def test_our_own_type_takes_few_arguments(tmp_path):
    folder = save_model(grafted("nemotron", {0: moe_of("nemotron")}), tmp_path / "own")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    assert (model.dtype, model.config._attn_implementation) == (torch.float64, "eager")
    assert AutoModelForCausalLM.from_pretrained(folder, device_map="cpu").device.type == "cpu"
    with pytest.raises(UsageError, match="quantization_config"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config={"load_in_8bit": True})
    with pytest.raises(UsageError, match=r"^experts_implementation: of a moewright folder"):
        AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")
    with pytest.raises(UsageError, match="config is a LlamaConfig"):
        MoewrightForCausalLM.from_pretrained(folder, config=tiny_config("llama"))
    with pytest.raises(UsageError, match="on one device"):
        AutoModelForCausalLM.from_pretrained(folder, device_map={"model": 0, "lm_head": 1})


@pytest.mark.parametrize("way", ["argument", "config", "config's backbone"])
@pytest.mark.parametrize("change", [{"use_cache": False}, {"hidden_size": 64}, {"rms_norm_eps": 1e-3}])
def test_of_a_config_nothing_changes_but_dtype_and_attention(tmp_path, change, way):
    folder = save_model(grafted("llama", {0: moe_of("llama", score="sigmoid")}), tmp_path / "own")
    config = AutoConfig.from_pretrained(folder)
    if way == "argument":
        arguments = change
    else:
        arguments = {"config": config}
        config.backbone.update(change if way != "config" else {})
        for name, value in change.items() if way == "config" else ():
            setattr(config, name, value)
    with pytest.raises(UsageError) as caught:
        AutoModelForCausalLM.from_pretrained(folder, **arguments)
    name = "backbone" if way == "config's backbone" else next(iter(change))
    assert str(caught.value) == (
        f"{name}: of a moewright folder only dtype, device_map and attn_implementation can be chosen when it "
        "is loaded; change its config.json, or the loaded model"
    )
    assert AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16").dtype == torch.bfloat16
    again = AutoConfig.from_pretrained(folder)
    again.dtype = "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(folder, config=again).dtype == torch.bfloat16
    assert AutoModelForCausalLM.from_pretrained(folder, config=again, dtype=torch.float32).dtype == torch.float32


def test_sparse_layers_are_changed_in_the_folder_or_where_weights_are_random(tmp_path):
    folder = save_model(grafted("llama", {0: moe_of("llama", score="sigmoid")}), tmp_path / "own")
    config = AutoConfig.from_pretrained(folder)
    config.sparse_layers[0]["top_k"], config.dtype = 1, "bfloat16"
    with pytest.raises(UsageError, match=r"^sparse_layers: of a moewright folder"):
        AutoModelForCausalLM.from_pretrained(folder, config=config)
    model = AutoModelForCausalLM.from_config(config)
    assert (moe_layers(model)[0].config.top_k, model.dtype) == (1, torch.bfloat16)
    with pytest.raises(UsageError, match=r"^use_cache: of a moewright folder"):
        AutoModelForCausalLM.from_config(config, use_cache=False)


@pytest.mark.parametrize("model_type", ["llama", "bart"])
def test_automodel_gives_the_model_without_a_head_which_does_not_save_itself(tmp_path, model_type):
    whole = grafted(model_type, {0: moe_of(model_type, score="sigmoid")})
    folder = save_model(whole, tmp_path / "own")
    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    assert type(model).__name__ == type(whole.base_model).__name__
    same_state(model, whole.base_model)
    mask = torch.ones_like(INPUT)
    mask[0, 5:] = 0
    hidden, wanted = (one(input_ids=INPUT, attention_mask=mask).last_hidden_state for one in (model, whole.base_model))
    assert torch.equal(hidden, wanted)
    with pytest.raises(UsageError, match="save the whole model"):
        model.save_pretrained(tmp_path / "out")
    assert type(AutoModel.from_config(AutoConfig.from_pretrained(folder))) is type(model)


def test_t5_has_no_model_without_a_head(tmp_path):
    folder = save_model(grafted("t5", {0: moe_of("t5", score="sigmoid")}), tmp_path / "own")
    with pytest.raises(UsageError, match="a t5 model has no part that is all but its head; use AutoModelForSeq2SeqLM"):
        AutoModel.from_pretrained(folder)


@pytest.mark.parametrize("model_type", ["llama", "bart"])
def test_a_model_of_the_other_kind_is_refused(tmp_path, model_type):
    folder = save_model(grafted(model_type, {0: moe_of(model_type, score="sigmoid")}), tmp_path / "own")
    right, wrong = AutoModelForCausalLM, AutoModelForSeq2SeqLM
    if TABLE[model_type].seq2seq:
        right, wrong = wrong, right
    assert right.from_pretrained(folder)
    for load in (lambda: wrong.from_pretrained(folder), lambda: wrong.from_config(AutoConfig.from_pretrained(folder))):
        with pytest.raises(UsageError, match=f"on {model_type}: load it with {right.__name__}") as caught:
            load()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt_neox", "bart", "t5"])
def test_our_own_config_answers_for_its_backbone_and_is_written_as_before(tmp_path, model_type):
    model = grafted(model_type, {0: moe_of(model_type, score="sigmoid")})
    folder = save_model(model, tmp_path / "own")
    config = AutoConfig.from_pretrained(folder)
    for name in ("hidden_size", "vocab_size", "num_hidden_layers", "num_attention_heads"):
        assert getattr(config, name) == getattr(model.config, name)
    with pytest.raises(AttributeError, match="has no nothing, and neither has its backbone"):
        _ = config.nothing
    config.backbone |= {"auto_map": {}, "quantization_config": {}, "_vocab_size": 1}
    assert not any(hasattr(config, name) for name in ("auto_map", "quantization_config", "_vocab_size"))
    config = AutoConfig.from_pretrained(folder)
    assert "hidden_size" not in config.to_dict()
    config.save_pretrained(tmp_path / "again")
    written, again = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "again"))
    assert again.keys() <= written.keys() | {"transformers_version"}
    assert all(again[name] == value for name, value in written.items() if name != "is_encoder_decoder" or value)
    assert copy.deepcopy(config).hidden_size == model.config.hidden_size


@pytest.mark.parametrize(
    "name",
    ["state_dict", "ignore_mismatched_sizes", "max_memory", "quantization_config", "generation_config",
     "output_loading_info"],
)  # fmt: skip
def test_arguments_that_ask_for_more_are_refused_by_name(tmp_path, name):
    folder = save_model(grafted("llama", {0: moe_of("llama", score="sigmoid")}), tmp_path / "own")
    value = {"some": torch.ones(3)} if name in ("state_dict", "max_memory", "quantization_config") else True
    with pytest.raises(UsageError, match=f"^{name}: of a moewright folder only dtype"):
        AutoModelForCausalLM.from_pretrained(folder, **{name: value})
    assert AutoModelForCausalLM.from_pretrained(folder, ignore_mismatched_sizes=False, output_loading_info=False)


SPARSE = [
    ("qwen2_moe", "qwen2", {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24}),
    ("olmoe", "olmoe", {"num_experts": 4, "intermediate_size": 16}),
    ("olmoe", "olmoe", {"num_experts": 4, "norm_topk_prob": True, "tie_word_embeddings": True}),
    ("flex_olmo", "olmo2", {"num_experts": 4, "intermediate_size": 16}),
    ("granitemoe", "granite", {"num_local_experts": 4, "logits_scaling": 2.0, "residual_multiplier": 0.5}),
    ("granitemoeshared", "granite", {"num_local_experts": 4, "shared_intermediate_size": 24}),
    ("deepseek_v3", "deepseek_v3", {}),
    ("gpt_oss", "gpt_oss", {}),
    ("switch_transformers", "t5", {"num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}),
    ("switch_transformers", "t5", {"num_experts": 4, "num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 1}),
]
"""Of each format one or more: what its folders are read as, and changes to the config. A new format is added here."""


@pytest.mark.parametrize(("model_type", "backbone", "changes"), SPARSE)
@pytest.mark.filterwarnings("ignore:expert_capacity=64")
def test_sparse_folders_of_transformers_are_read_and_written_back(tmp_path, model_type, backbone, changes):
    changes = changes if model_type == "switch_transformers" else {"num_experts_per_tok": 2} | changes
    theirs = tiny_model(model_type, **changes)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    assert ours.config.model_type == backbone
    assert relative(logits_of(ours, INPUT), logits_of(theirs, INPUT)) < 2e-6
    again = save_model(ours, tmp_path / "again", format=model_type)
    assert relative(logits_of(plain_transformers(again), INPUT), logits_of(theirs, INPUT)) < 2e-6
    same_state(load_model(again), ours)
    stored, wanted = (load_file(path / "model.safetensors") for path in (again, tmp_path / "theirs"))
    assert all(torch.equal(stored[name], tensor) for name, tensor in wanted.items()), "to the bit"
    own = save_model(ours, tmp_path / "own", format="moewright")
    same_state(load_model(own), ours)
    same_gradients(ours, theirs)


def same_gradients(ours, theirs):
    """Fail unless all that both call by one name, from the embedding to the last norm, has the same gradient."""
    labels = {"decoder_input_ids": INPUT} if theirs.config.is_encoder_decoder else {}
    for model in (ours, theirs):  # in evaluation: no jitter, no drops
        model(input_ids=INPUT, labels=INPUT, use_cache=False, **labels).loss.backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    shared = [name for name, _ in ours.named_parameters() if name in gradients]
    assert len(shared) >= 5
    for name in shared:
        wanted = gradients[name]
        assert (ours.get_parameter(name).grad - wanted).abs().max() <= 1e-4 * wanted.abs().max(), name


JITTER = {"router_jitter_noise", "input_jitter_noise"}
NOT_OF_THE_CLASS = {
    # Noise in training: of these classes Mixtral's alone has a field for it, but a folder of any may ask for it.
    "mixtral": {"input_jitter_noise"},
    **dict.fromkeys(("qwen2_moe", "qwen3_moe", "olmoe", "flex_olmo", "granitemoe", "granitemoeshared"), JITTER),
    # DeepSeek's own code and the serving runtimes read these; transformers computes the one value whatever they say.
    "deepseek_v3": {"scoring_func", "topk_method", "moe_layer_freq"},
}


@pytest.mark.parametrize("twin", TWINS, ids=lambda twin: twin.name)
def test_a_missing_field_means_what_the_class_of_transformers_takes(twin):
    theirs, unknown = CONFIG_MAPPING[twin.name](), set()
    for row in (*twin.rows, twin.sparse):
        names = getattr(row, "fields", None) or (getattr(row, "field", "?"),)
        default = row.value if isinstance(row, Constant) and row.refusal else getattr(row, "default", None)
        if isinstance(default, tuple):
            names, default = ("n_group", "topk_group"), default
        if default is not None:
            defaults = default if isinstance(default, tuple) else [default] * len(names)
            for name, value in zip(names, defaults, strict=True):
                if hasattr(theirs, name):
                    assert getattr(theirs, name) == value, name
                else:
                    unknown.add(name)
    assert unknown == NOT_OF_THE_CLASS.get(twin.name, set())


DEFAULTS = [
    ("qwen2_moe", "qkv_bias", {"qkv_bias": False}),
    ("qwen2_moe", "decoder_sparse_step", {"decoder_sparse_step": 2}),
    ("qwen2_moe", "mlp_only_layers", {"mlp_only_layers": [1]}),
    ("qwen3_moe", "use_sliding_window", {"use_sliding_window": True, "sliding_window": 8}),
    ("qwen3_moe, sliding", "sliding_window", {"sliding_window": 4095}),
    ("glm4_moe", "num_nextn_predict_layers", {"num_nextn_predict_layers": 2}),
    ("glm4_moe", "n_shared_experts", {"n_shared_experts": 2}),
    ("glm4_moe", "n_group", {"n_group": 2}),
    ("deepseek_v3", "num_nextn_predict_layers", {"num_nextn_predict_layers": 0}),
    ("deepseek_v3", "n_shared_experts", {"n_shared_experts": 2}),
    ("deepseek_v3", "n_group", {"n_group": 16}),
    ("deepseek_v3", "topk_group", {"topk_group": 2}),
    ("nllb-moe", "encoder_sparse_step", {"encoder_sparse_step": 3}),
    ("nllb-moe", "decoder_sparse_step", {"decoder_sparse_step": 3}),
    ("nllb-moe", "moe_eval_capacity_token_fraction", {"moe_eval_capacity_token_fraction": 0.5}),
    ("switch_transformers", "num_sparse_encoder_layers encoder_sparse_step", {"encoder_sparse_step": 2}),
    ("switch_transformers", "num_sparse_decoder_layers decoder_sparse_step", {"decoder_sparse_step": 2}),
    ("switch_transformers", "expert_capacity", {"expert_capacity": 63}),
    ("switch_transformers", "router_jitter_noise", {"router_jitter_noise": 0.02}),
    ("switch_transformers", "dense_act_fn", {"dense_act_fn": "gelu"}),
]
"""A format, fields that a method of it has a default for, and another value, so that a field nobody reads is seen."""


@pytest.mark.parametrize(("kind", "names", "other"), DEFAULTS, ids=str)
def test_a_default_of_a_method_is_the_one_of_the_class(kind, names, other):
    name, _, sliding = kind.partition(", ")
    fields = CONFIG_MAPPING[name](**({"use_sliding_window": True} if sliding else {})).to_dict()
    assert set(names.split()) <= fields.keys()
    missing = {key: value for key, value in fields.items() if key not in names.split()}
    assert reading(name, missing) == reading(name, fields) != reading(name, fields | other)


def reading(name, fields):
    """All that is made of a config.json: the backbone's config, the sparse layers, tensors left unread, warnings."""
    twin = FORMATS[name].variant(fields)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config, layers = twin.read(fields, record={}, tied=True)
    tensors = [f"model.layers.{config.num_hidden_layers + more}.mlp.gate.weight" for more in range(3)]
    unread = [twin.unread(tensor, fields, config) for tensor in tensors]
    return config.to_dict(), layers, unread, [str(warning.message) for warning in caught]


def test_a_shared_expert_that_is_added_is_exact_in_qwen2_moe(tmp_path):
    layers = dict.fromkeys((0, 1), moe_of("llama", shared_size=24))
    model = grafted("llama", layers)
    folder = save_model(model, tmp_path / "sparse")
    assert json.loads((folder / "moewright.json").read_text())["shared_expert"] == "doubled"
    assert relative(logits_of(plain_transformers(folder), INPUT), logits_of(model, INPUT)) < 1e-6
    same_state(load_model(folder), model)


OLD_CONFIGS = [
    ("phi3", {"partial_rotary_factor": 0.5}),
    ("nemotron", {"partial_rotary_factor": 1.0}),
    ("gpt_neox", {"rotary_pct": 1.0, "rotary_emb_base": 500}),
    ("gemma3_text", {"sliding_window_pattern": 2, "rope_local_base_freq": 500.0, "sliding_window": 4}),
    ("gemma3_text", {"_sliding_window_pattern": 2, "sliding_window": 4}),
    ("qwen2", {"rope_theta": 500.0}),
]


@pytest.mark.parametrize(("model_type", "fields"), OLD_CONFIGS)
def test_configs_written_before_transformers_5_are_read_as_transformers_reads_them(tmp_path, model_type, fields):
    folder = write_dense(tmp_path / "dense", model_type)
    plain = logits_of(load_model(folder), INPUT)
    path = folder / "config.json"
    old = json.loads(path.read_text())
    for name in ("rope_parameters", "layer_types"):
        old.pop(name, None)
    path.write_text(json.dumps(old | fields))
    ours, theirs = load_model(folder), plain_transformers(folder)
    assert torch.equal(logits_of(ours, INPUT), logits_of(theirs, INPUT))
    assert relative(logits_of(ours, INPUT), plain) > 1e-3, "the fields matter"


@pytest.mark.parametrize("own_head", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_switch_scales_its_output_where_t5_does(tmp_path, scaled, own_head):
    model = grafted("t5", dict.fromkeys((1, 3), moe_of("t5", top_k=1, expert_size=64)), tie_word_embeddings=scaled)
    assert model.config.scale_decoder_outputs == scaled
    if own_head:
        untie_head(model)
        torch.nn.init.normal_(model.lm_head.weight)
    folder = save_model(model, tmp_path / "sparse")
    fields = json.loads((folder / "config.json").read_text())
    assert (fields["model_type"], fields["tie_word_embeddings"]) == ("switch_transformers", scaled)
    assert relative(logits_of(plain_transformers(folder), INPUT), logits_of(model, INPUT)) < 2e-6
    again = load_model(folder)
    assert (again.config.scale_decoder_outputs, has_tied_head(again)) == (scaled, not own_head)
    same_state(again, model)
    copy = save_model(again, tmp_path / "copy")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {p.name: p.read_bytes() for p in copy.iterdir()}


@pytest.mark.filterwarnings("ignore:expert_capacity=64")
def test_untied_switch_folders_are_read_if_encoder_and_decoder_share_a_table(tmp_path):
    sparse = {"num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
    theirs = tiny_model("switch_transformers", tie_word_embeddings=False, **sparse)
    assert theirs.encoder.embed_tokens.weight is not theirs.shared.weight, "untied, transformers ties nothing"
    theirs.save_pretrained(tmp_path / "apart")
    with pytest.raises(ModelError, match=r"encoder\.embed_tokens\.weight differs from shared\.weight"):
        load_model(tmp_path / "apart")
    with torch.no_grad():
        theirs.encoder.embed_tokens.weight.copy_(theirs.shared.weight)
        theirs.decoder.embed_tokens.weight.copy_(theirs.shared.weight)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    assert not has_tied_head(ours)
    assert relative(logits_of(ours, INPUT), logits_of(theirs, INPUT)) < 2e-6
    again = save_model(ours, tmp_path / "again")
    assert relative(logits_of(plain_transformers(again), INPUT), logits_of(theirs, INPUT)) < 2e-6


@pytest.mark.filterwarnings("ignore:expert_capacity=64")
def test_a_tie_that_a_config_leaves_out_is_what_its_class_says(tmp_path):
    theirs = tiny_model("switch_transformers", num_experts=4, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1)
    theirs.save_pretrained(tmp_path / "theirs")
    path = tmp_path / "theirs" / "config.json"
    fields = json.loads(path.read_text())
    fields.pop("tie_word_embeddings", None)
    path.write_text(json.dumps(fields))
    assert relative(logits_of(load_model(tmp_path / "theirs"), INPUT), logits_of(theirs, INPUT)) < 2e-6


def test_a_model_from_our_config_alone_has_weights(tmp_path):
    folder = save_model(grafted("nemotron", {0: moe_of("nemotron")}), tmp_path / "own")
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    moe = moe_layers(model)[0]
    assert 0.01 < float(moe.router.weight.detach().std()) < 0.03
    assert float(moe.experts.up_proj.detach().abs().max()) <= 32**-0.5
    assert bool(logits_of(model, INPUT).isfinite().all())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_local_experts": 10**9}, "calls for"),
        ({"pad_token_id": 999}, "makes no model"),
        ({"vocab_size": None}, "makes no model"),
        ({"rms_norm_eps": float("inf")}, "Infinity is not a number"),
    ],
)
def test_numbers_that_make_no_model_are_refused_at_once(tmp_path, fields, words):
    folder = save_model(grafted("llama", dict.fromkeys((0, 1), moe_of("llama"))), tmp_path / "sparse")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(ModelError, match=words):
        load_model(folder)


# -- NLLB-MoE, which transformers 5.23 computes wrongly: it takes the mask of the first choice for expert numbers --


def top_2(self, hidden_states, padding_mask=None):
    """What an NLLB-MoE block should compute, token by token in float64 (arXiv 2207.04672, section 6.2)."""
    shape = hidden_states.shape
    x_TD = hidden_states.reshape(-1, shape[-1]).double()
    y_TD = torch.zeros_like(x_TD)
    for t, x_D in enumerate(x_TD):
        probabilities = (self.router.classifier.weight.double() @ x_D).softmax(0)
        weights, experts = probabilities.topk(2)
        for weight, e in zip(weights / weights.sum(), experts.tolist(), strict=True):
            expert = self.experts[f"expert_{e}"]
            hidden = expert.act(expert.fc1.weight.double() @ x_D + expert.fc1.bias.double())
            y_TD[t] += weight * (expert.fc2.weight.double() @ hidden + expert.fc2.bias.double())
    return y_TD.view(shape).to(hidden_states.dtype)


def test_nllb_moe_is_computed_right(tmp_path, monkeypatch):
    theirs = nllb()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    wrong = logits_of(theirs, INPUT)
    monkeypatch.setattr("transformers.models.nllb_moe.modeling_nllb_moe.NllbMoeSparseMLP.forward", top_2)
    right = logits_of(theirs, INPUT)
    assert relative(logits_of(ours, INPUT), right) < 2e-6
    # If this fails, transformers has been mended: then NLLB_MOE need not be `faulty` any more.
    assert relative(wrong, right) > 1e-3
    again = save_model(ours, tmp_path / "again", format="nllb-moe")
    assert relative(logits_of(plain_transformers(again), INPUT), right) < 2e-6
    same_state(load_model(again), ours)
    # Nobody who did not ask for it gets a folder that is computed wrongly.
    own = save_model(ours, tmp_path / "own")
    assert json.loads((own / "config.json").read_text())["model_type"] == "moewright"


def test_output_masking_of_nllb_comes_along(tmp_path):
    nllb(moe_token_dropout=0.2).save_pretrained(tmp_path / "theirs")
    assert {moe.config.output_masking for moe in moe_layers(load_model(tmp_path / "theirs")).values()} == {0.2}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"second_expert_policy": "sampling"}, "second_expert_policy"),
        ({"router_bias": True}, "router_bias"),
        ({"decoder_ffn_dim": 32}, "differ"),
    ],
)
def test_what_nllb_folders_ask_for_besides_is_refused(tmp_path, changes, words):
    nllb(**changes).save_pretrained(tmp_path / "theirs")
    with pytest.raises(ModelError, match=words):
        load_model(tmp_path / "theirs")


# -- encoders and decoders --


def test_layers_are_numbered_encoder_first():
    config = tiny_config("m2m_100", encoder_layers=3, decoder_layers=4)
    assert chosen_layers("all", config) == tuple(range(7))
    assert chosen_layers("every:2", config) == (1, 4, 6)
    assert chosen_layers("encoder.2,decoder.0,6", config) == (2, 3, 6)
    for text in ("every:5", "every:0", "decoder.4", "7", "0,0", "encoder.0,0", "x"):
        with pytest.raises(UsageError, match=r"encoder\.0 to decoder\.3"):
            chosen_layers(text, config)


def test_each_stack_has_the_mask_of_its_own():
    model = grafted("m2m_100", dict.fromkeys(range(4), moe_of("m2m_100")))
    encoder, decoder = routing_contexts(model)
    mask, other = torch.ones_like(INPUT), torch.ones_like(INPUT[:, :7])
    mask[0, 5:], other[1, 3:] = 0, 0
    with torch.no_grad():
        model(input_ids=INPUT, attention_mask=mask, decoder_input_ids=INPUT[:, :7], decoder_attention_mask=other)
    assert encoder.token_mask.tolist() == mask.flatten().bool().tolist()
    assert decoder.token_mask.tolist() == other.flatten().bool().tolist()
    counts = [int(moe.stats.tokens_per_expert.sum()) for moe in moe_layers(model).values()]
    assert counts == [2 * int(mask.sum())] * 2 + [2 * int(other.sum())] * 2


@pytest.mark.parametrize("model_type", ["m2m_100", "bart", "t5"])
def test_grafting_into_encoder_decoders_can_be_undone(model_type):
    model = tiny_model(model_type)
    wanted = logits_of(model, INPUT)
    taken = graft(model, {0: moe_of(model_type), 3: moe_of(model_type)})
    assert not torch.equal(logits_of(model, INPUT), wanted)
    ungraft(model, taken)
    assert torch.equal(logits_of(model, INPUT), wanted)


def test_experts_choose_in_encoders_only(tmp_path):
    choosing = moe_of("m2m_100", choice="expert", top_k=0, expert_choice=2.0, causal=False)
    with pytest.raises(UsageError, match="later tokens"):
        graft(tiny_model("m2m_100"), {2: choosing})
    model = grafted("m2m_100", {0: choosing})
    same_state(load_model(save_model(model, tmp_path / "own")), model)


def test_dropout_between_the_projections_is_named(tmp_path):
    source = write_dense(tmp_path / "dense", "bart", activation_dropout=0.25)
    with pytest.warns(UserWarning, match=r"activation_dropout=0\.25"):
        upcycling_of(source, UpcycleConfig(experts=4, top_k=2))


def test_a_head_of_its_own_that_t5_configs_do_not_tell_of(tmp_path):
    # T5 1.1: config.json says untied, the class ties all the same, and the file decides.
    theirs = tiny_model("t5", tie_word_embeddings=False, feed_forward_proj="gated-gelu")
    theirs.lm_head.weight = torch.nn.Parameter(torch.randn_like(theirs.lm_head.weight))
    theirs.all_tied_weights_keys.pop("lm_head.weight")
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    assert not has_tied_head(ours)
    assert torch.equal(logits_of(ours, INPUT), logits_of(plain_transformers(tmp_path / "theirs"), INPUT))
    graft(ours, {0: moe_of("t5", activation="gelu_new", gated=True)})
    again = load_model(save_model(ours, tmp_path / "own"))
    assert not has_tied_head(again)
    same_state(again, ours)


def test_tied_tensors_that_differ_are_refused(tmp_path):
    path = write_dense(tmp_path / "theirs", "bart") / "model.safetensors"
    tensors = load_file(path)
    tensors["model.encoder.embed_tokens.weight"] = tensors["model.shared.weight"].clone()
    save_file(tensors, path, metadata={"format": "pt"})
    load_model(tmp_path / "theirs")
    tensors["model.encoder.embed_tokens.weight"] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"encoder\.embed_tokens\.weight differs from model\.shared\.weight"):
        load_model(tmp_path / "theirs")


def test_what_encoder_decoders_cannot_do_yet_is_said(tmp_path):
    folder, text = write_dense(tmp_path / "dense", "t5"), tmp_path / "text.txt"
    text.write_text("one two three " * 200)
    with pytest.raises(UsageError, match="no perplexity of a text alone"):
        evaluate_files(folder, [text])
    run = tmp_path / "run.toml"
    run.write_text(
        f'model = "{folder}"\nout = "{tmp_path}/out"\n[data]\nfiles = ["{text}"]\nsequence_length = 16\n'
        "[train]\nsteps = 1\nbatch_size = 1\nlearning_rate = 1e-4\n"
    )
    with pytest.raises(UsageError, match=r"training an encoder-decoder \(t5\)"):
        start(load_run(run, []), cache_dir=tmp_path)


# -- formats --


@pytest.mark.parametrize(
    ("model_type", "layers", "changes", "wanted", "words"),
    [
        ("t5", range(4), {}, "switch_transformers", "to one expert"),
        ("t5", [0], {"top_k": 1, "expert_size": 64}, "switch_transformers", "every n-th|in a step"),
        ("t5", [1, 3], {"top_k": 1}, "switch_transformers", "one width"),
        ("m2m_100", range(4), {"top_k": 1}, "nllb-moe", "two experts"),
        ("m2m_100", [0, 3], {"expert_size": 64}, "nllb-moe", "every n-th"),
        ("llama", [0, 1], {}, "qwen3_moe", "it stands for qwen3"),
        ("granite", [0, 1], {"top_k": 1}, "granitemoe", "renormalises"),
        ("granite", [0, 1], {}, "granitemoeshared", "shared expert"),
        ("olmo2", [0], {}, "flex_olmo", "cannot mix"),
        ("llama", [0, 1], {"gated": False}, "mixtral", "no gate"),
        ("llama", [0, 1], {"expert_bias": True}, "mixtral", "biases"),
        ("llama", [0, 1], {"activation": "relu"}, "mixtral", "activation relu"),
        ("llama", [1], {"expert_bias": False, "mlp_bias": True}, "qwen2_moe", "dense layers have another form"),
        (
            "t5",
            [1, 3],
            {"top_k": 1, "gated": False, "feed_forward_proj": "gated-gelu"},
            "switch_transformers",
            "dense layers have another form",
        ),
    ],
)
def test_a_format_that_would_compute_something_else_is_refused(tmp_path, model_type, layers, changes, wanted, words):
    backbone = {name: changes[name] for name in ("mlp_bias", "feed_forward_proj") if name in changes}
    settings = {name: value for name, value in changes.items() if name not in backbone}
    model = grafted(model_type, dict.fromkeys(layers, moe_of(model_type, **settings)), **backbone)
    with pytest.raises(ModelError, match=words):
        save_model(model, tmp_path / "out", format=wanted)
    assert not (tmp_path / "out").exists()


def test_unknown_formats_are_named():
    with pytest.raises(UsageError, match=f"choose one of {', '.join(FORMATS)}"):
        choose_format(tiny_config("llama"), {0: moe_of("llama")}, wanted="gguf")
    with pytest.raises(ModelError, match="only sparse models"):
        save_model(tiny_model("llama"), Path("nowhere"), format="mixtral")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"top_k": "2"}, "where type int is expected"),
        ({"experts": 4}, "no setting 'experts'"),
        ({"top_k": 9}, "invalid settings of a sparse layer"),
        ({"num_experts": True}, "int is expected"),
        ({"causal": False}, "no setting 'causal'"),
        ({"kernel": "zz"}, "no setting 'kernel'"),
    ],
)
def test_senseless_settings_of_our_own_type_are_refused(values, words):
    good = {"hidden_size": 32, "expert_size": 16, "num_experts": 4, "top_k": 2}
    assert settings_from(good).num_experts == 4
    with pytest.raises(ModelError, match=words):
        settings_from(good | values)
    with pytest.raises(ModelError, match="lacks hidden_size"):
        settings_from({"top_k": 2})
