"""Grafting, twins and folders: every family against transformers itself."""

import copy
import itertools
import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel

from moewright.backbone.blocks import configure, moe_layers, routing_contexts
from moewright.backbone.formats.choose import TWINS, choose_format, format_for
from moewright.backbone.graft import graft, ungraft
from moewright.backbone.load import FolderSource, fill, load_model, open_skeleton
from moewright.backbone.save import save_model
from moewright.backbone.slots import Box
from moewright.checkpoint.read import ModelFolder
from moewright.errors import ModelError, MoewrightError, UsageError
from moewright.family.config import backbone_config
from moewright.moe.config import MoEConfig
from tests.models import logits_of, relative, tiny_config, tiny_model, write_dense
from tests.sparse import model_of

INPUT = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))


def moe_config(**changes: object) -> MoEConfig:
    return MoEConfig(**({"hidden_size": 32, "expert_size": 16, "num_experts": 4, "top_k": 2} | changes))


def sparse_model(model_type: str, layers: tuple[int, ...] = (0, 1), **changes: object) -> PreTrainedModel:
    order = changes.pop("router_order", "topk-softmax")
    model = tiny_model(model_type, **changes)
    graft(model, dict.fromkeys(layers, moe_config(router_order=order)))
    with torch.no_grad():
        for layer in moe_layers(model).values():
            layer.router.weight.normal_()
    return model


def logits(model: PreTrainedModel, ids: torch.Tensor = INPUT, **kwargs: object) -> torch.Tensor:
    return logits_of(model, ids, **kwargs)


CASES = [
    ("llama", "topk-softmax", (0, 1), "mixtral"),
    ("llama", "topk-softmax", (1,), "qwen2_moe"),
    ("llama", "softmax-topk", (0, 1), "qwen2_moe"),
    ("mistral", "topk-softmax", (0, 1), "mixtral"),
    ("mistral", "softmax-topk", (0,), "qwen2_moe"),
    ("qwen2", "topk-softmax", (0, 1), "qwen2_moe"),
    ("qwen2", "softmax-topk", (0, 1), "qwen2_moe"),
    ("qwen3", "topk-softmax", (1,), "qwen3_moe"),
    ("qwen3", "softmax-topk", (0, 1), "qwen3_moe"),
]


@pytest.mark.parametrize(("model_type", "order", "layers", "twin"), CASES)
@pytest.mark.parametrize("tied", [False, True])
def test_twin_computes_what_the_grafted_model_computes(tmp_path, model_type, order, layers, twin, tied):
    dense = write_dense(tmp_path / "dense", model_type)
    model = sparse_model(model_type, layers, router_order=order, tie_word_embeddings=tied)
    folder = save_model(model, tmp_path / "sparse", companions=dense)

    theirs, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert theirs.config.model_type == twin
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert relative(logits(theirs), logits(model)) < 1e-5

    ours = load_model(folder)
    assert not any(tensor.is_meta for tensor in (*ours.parameters(), *ours.buffers()))
    assert ours.config.model_type == model_type
    assert sorted(moe_layers(ours)) == sorted(layers)
    assert torch.equal(logits(ours), logits(model))
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied

    again = save_model(ours, tmp_path / "again", companions=folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {p.name: p.read_bytes() for p in again.iterdir()}


def test_folder_loads_in_a_process_that_never_saw_moewright(tmp_path):
    model = sparse_model("llama", tie_word_embeddings=True)
    folder = save_model(model, tmp_path / "sparse", companions=write_dense(tmp_path / "dense"))
    script = (
        "import json, sys, torch; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"m = AutoModelForCausalLM.from_pretrained({str(folder)!r}); AutoTokenizer.from_pretrained({str(folder)!r})\n"
        f"ids = torch.tensor({INPUT.tolist()})\n"
        "with torch.no_grad(): print(json.dumps(m(ids).logits.double().tolist()))\n"
        "assert not any(name.startswith('moewright') for name in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert relative(torch.tensor(json.loads(run.stdout)), logits(model).double()) < 1e-5


@pytest.mark.parametrize("twin", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_config_survives_both_ways(twin):
    model_type, order, layers, _ = next(case for case in CASES if case[3] == twin)
    config = tiny_config(model_type)
    configs = dict.fromkeys(layers, moe_config(router_order=order))
    written = choose_format(config, configs).config_fields(config, configs, dtype=torch.float32)
    assert format_for(written).name == twin
    record = {"backbone": model_type, "shared_expert": "silent"}
    backbone, read = format_for(written).read(written, record=record, tied=False)
    assert read == configs
    changed = {k for k, v in config.to_dict().items() if backbone.to_dict()[k] != v}
    assert changed <= {"architectures", "dtype", "intermediate_size", "sliding_window"}


ROPES = [
    {"rope_parameters": None, "rope_theta": 500.0},
    {"rope_parameters": None, "rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_parameters": {"rope_type": "linear", "factor": 2.0}, "rope_theta": 500.0},
    {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
]


@pytest.mark.parametrize("rope", ROPES, ids=str)
def test_rope_is_read_as_transformers_reads_it(tmp_path, rope):
    folder = write_dense(tmp_path / "dense")
    plain = logits(load_model(folder))
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | rope))
    ours = logits(load_model(folder))
    assert torch.equal(ours, logits(AutoModelForCausalLM.from_pretrained(folder)))
    assert relative(ours, plain) > 1e-3


def test_written_config_says_old_and_new_fields_alike():
    config = tiny_config("llama", rope_parameters={"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0,
        "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64})  # fmt: skip
    layers = {0: moe_config(), 1: moe_config()}
    fields = choose_format(config, layers).config_fields(config, layers, dtype=torch.float32)
    assert fields["rope_theta"] == fields["rope_parameters"]["rope_theta"] == 1e4
    assert fields["rope_scaling"]["factor"] == 8.0
    assert fields["torch_dtype"] == fields["dtype"]


@pytest.mark.parametrize(
    ("model_type", "changes", "layers", "order", "words"),
    [
        ("llama", {"head_dim": 16}, (0,), "topk-softmax", "cannot mix.*head width"),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, (0, 1), "topk-softmax",
         "in every layer or in none.*sigmoid"),
    ],
)  # fmt: skip
def test_what_no_twin_computes_is_refused(model_type, changes, layers, order, words):
    config = tiny_config(model_type, **changes)
    configs = dict.fromkeys(layers, moe_config(router_order=order))
    assert choose_format(config, configs).name == "moewright"
    assert re.search(words, "; ".join(str(twin.refuses(config, configs)) for twin in TWINS))
    with pytest.raises(ModelError, match=f"format=mixtral: it does not compute this {model_type} model"):
        choose_format(config, configs, wanted="mixtral")


def test_layers_that_differ_fit_no_twin():
    config, layers = tiny_config("llama"), {0: moe_config(), 1: moe_config(num_experts=8)}
    assert choose_format(config, layers).name == "moewright"
    with pytest.raises(ModelError, match="differ from one another"):
        choose_format(config, layers, wanted="mixtral")


def test_mistral_window_is_kept(tmp_path):
    dense = write_dense(tmp_path / "dense", "mistral", sliding_window=6)
    model = sparse_model("mistral", sliding_window=6)
    folder = save_model(model, tmp_path / "sparse", companions=dense)
    assert relative(logits(AutoModelForCausalLM.from_pretrained(folder)), logits(model)) < 1e-5
    model.config.sliding_window = None
    assert relative(logits(AutoModelForCausalLM.from_pretrained(folder)), logits(model)) > 1e-3


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model_type": "gpt2"}, "llama, mistral, qwen2, qwen3"),
        ({}, "model_type=None"),
    ],
)
def test_unsupported_models_are_named(fields, words):
    with pytest.raises(ModelError, match=words):
        backbone_config(fields)


def test_embeddings_changed_by_others_are_loaded_untied(tmp_path):
    model = sparse_model("llama", tie_word_embeddings=True)
    folder = save_model(model, tmp_path / "sparse", companions=write_dense(tmp_path / "dense"))
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        theirs.lm_head.weight.mul_(2.0)
    theirs.save_pretrained(folder)
    with pytest.warns(UserWarning, match="loaded untied"):
        ours = load_model(folder)
    assert relative(logits(ours), logits(theirs)) < 1e-5


def test_biases_changed_by_others_are_not_dropped(tmp_path):
    model = sparse_model("llama", router_order="softmax-topk")
    folder = save_model(model, tmp_path / "sparse", companions=write_dense(tmp_path / "dense"))
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        theirs.model.layers[1].self_attn.q_proj.bias.fill_(0.5)
    theirs.save_pretrained(folder)
    with pytest.raises(ModelError, match=r"q_proj\.bias is not 0 everywhere"):
        load_model(folder)
    (folder / "moewright.json").unlink()
    assert relative(logits(load_model(folder)), logits(theirs)) < 1e-5


def test_graft_and_ungraft_give_the_dense_model_back():
    model = tiny_model("qwen3")
    wanted = logits(model)
    taken = graft(model, {1: moe_config()})
    assert not torch.equal(logits(model), wanted)
    assert list(ungraft(model, taken)) == [1]
    assert torch.equal(logits(model), wanted)
    assert routing_contexts(model) == ()


def test_token_mask_reaches_the_layers_and_no_other_model():
    model = sparse_model("llama")
    twin = copy.deepcopy(model)
    mask = torch.ones_like(INPUT, dtype=torch.bool)
    mask[0, 5:] = False
    logits(model, token_mask=mask)
    assert routing_contexts(model)[0].token_mask.tolist() == mask.flatten().tolist()
    assert routing_contexts(twin)[0].token_mask is None
    assert moe_layers(model)[0].stats.tokens_per_expert.sum() == mask.sum() * 2
    logits(twin, attention_mask=mask.long())
    assert routing_contexts(twin)[0].token_mask.tolist() == mask.flatten().tolist()
    logits(model)
    assert moe_layers(model)[0].stats.tokens_per_expert.sum() == INPUT.numel() * 2


def test_generation_with_a_cache_and_padding_equals_the_twin(tmp_path):
    model = sparse_model("llama")
    folder = save_model(model, tmp_path / "sparse", companions=write_dense(tmp_path / "dense"))
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    mask = torch.ones_like(INPUT)
    mask[0, :7] = 0
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    assert torch.equal(model.generate(INPUT, **settings), theirs.generate(INPUT, **settings))


def test_configure_reaches_every_layer():
    model = sparse_model("llama")
    configure(model, balance_loss=0.5, z_loss=0.25, kernel="loop")
    assert {(m.config.balance_loss, m.config.z_loss, m.config.kernel) for m in moe_layers(model).values()} == {
        (0.5, 0.25, "loop")
    }


def test_names_and_shapes_are_checked_before_anything_is_allocated(tmp_path):
    folder = write_dense(tmp_path / "dense")
    path = Path(folder) / "config.json"
    path.write_text(path.read_text().replace('"intermediate_size": 64', '"intermediate_size": 96'))
    with pytest.raises(ModelError, match="96"):
        load_model(folder)


FOREIGN = [
    ("mixtral", {"num_local_experts": 4, "intermediate_size": 16, "num_experts_per_tok": 2}),
    ("mixtral", {"num_local_experts": 4, "intermediate_size": 16, "num_experts_per_tok": 2, "sliding_window": 6}),
    ("mixtral", {"num_local_experts": 4, "intermediate_size": 16, "head_dim": None, "tie_word_embeddings": True}),
    ("qwen3_moe", {"num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2, "norm_topk_prob": True}),
    ("qwen3_moe", {"num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2, "decoder_sparse_step": 2}),
    ("qwen3_moe", {"num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2, "mlp_only_layers": [0]}),
]


@pytest.mark.parametrize(("model_type", "changes"), FOREIGN)
def test_sparse_folders_made_by_transformers_are_read(tmp_path, model_type, changes):
    theirs = tiny_model(model_type, **changes)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    assert relative(logits(ours), logits(theirs)) < 1e-5
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == theirs.config.tie_word_embeddings


def test_a_tied_folder_with_a_head_of_its_own_is_read_as_transformers_reads_it(tmp_path):
    folder = write_dense(tmp_path / "dense")
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    with pytest.warns(UserWarning, match="loaded untied"):
        ours = load_model(folder)
    assert torch.equal(logits(ours), logits(AutoModelForCausalLM.from_pretrained(folder)))


def test_grafting_twice_keeps_one_record_and_one_hook():
    model = tiny_model("llama", num_hidden_layers=3)
    wanted = logits(model)
    first = graft(model, {0: moe_config()})
    second = graft(model, {2: moe_config()})
    assert len({id(layer.context) for layer in moe_layers(model).values()}) == 1
    mask = torch.ones_like(INPUT, dtype=torch.bool)
    mask[:, 10:] = False
    logits(model, token_mask=mask)
    assert {int(layer.stats.tokens_per_expert.sum()) for layer in moe_layers(model).values()} == {2 * int(mask.sum())}
    ungraft(model, first)
    logits(model, token_mask=mask)
    ungraft(model, second)
    assert torch.equal(logits(model), wanted)


def test_the_model_inside_hears_of_the_mask_too():
    model = sparse_model("llama")
    mask = torch.ones_like(INPUT)
    mask[0, :7] = 0
    logits(model, attention_mask=mask)
    with torch.no_grad():
        model.model(input_ids=INPUT[:, :5], use_cache=False)
        assert moe_layers(model)[0].stats.tokens_per_expert.sum() == INPUT[:, :5].numel() * 2
        model.forward(input_ids=INPUT, attention_mask=mask, use_cache=False)
    assert moe_layers(model)[0].stats.tokens_per_expert.sum() == mask.sum() * 2


def test_generation_settings_come_along(tmp_path):
    folder = write_dense(tmp_path / "dense")
    (folder / "generation_config.json").write_text('{"eos_token_id": [256, 10], "do_sample": true}')
    assert load_model(folder).generation_config.eos_token_id == [256, 10]


BAD_FIELDS = [
    {"hidden_size": "abc"},
    {"num_attention_heads": 0},
    {"num_attention_heads": 5},
    {"vocab_size": -5},
    {"vocab_size": None},
    {"vocab_size": 10**12},
    {"hidden_size": 10**9},
    {"num_hidden_layers": 10**6},
    {"hidden_act": "nonsense"},
    {"rope_parameters": {"rope_type": "foo"}},
    {"eos_token_id": "x"},
    {"model_type": ["llama"]},
]


@pytest.mark.parametrize("fields", BAD_FIELDS, ids=str)
def test_senseless_configs_are_refused_in_one_line(tmp_path, fields):
    folder = write_dense(tmp_path / "dense")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(ModelError) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"num_local_experts": "4"},
        {"num_local_experts": True},
        {"num_experts_per_tok": 0},
        {"num_experts_per_tok": 9},
        {"intermediate_size": None},
        {"router_jitter_noise": 0.1},
    ],
    ids=str,
)
def test_senseless_sparse_configs_are_refused(tmp_path, fields):
    folder = save_model(sparse_model("llama"), tmp_path / "moe", companions=write_dense(tmp_path / "dense"))
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(MoewrightError):
        load_model(folder)


def test_what_cannot_be_grafted_is_refused_and_changes_nothing():
    model, sizes = tiny_model("llama"), {"hidden_size": 32, "expert_size": 16, "num_experts": 4}
    for layer, config, words in [
        (9, moe_config(), "layer 9: this model has the layers 0 to 1"),
        (-1, moe_config(), "layer -1: this model has the layers 0 to 1"),
        (1, moe_config(hidden_size=48), "hidden_size=48 of layer 1: this model has 32"),
        (1, MoEConfig(**sizes, choice="expert", expert_choice=1.0, causal=False), "choice=expert"),
    ]:
        with pytest.raises(UsageError, match=words) as caught:
            graft(model, {0: moe_config(), layer: config})
        assert "\n" not in str(caught.value)
        assert not moe_layers(model)
    other = AutoModelForCausalLM.from_config(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64))
    for refused in (moe_layers, lambda model: graft(model, {0: moe_config()})):
        with pytest.raises(ModelError, match="model_type='gpt2' is not supported; the dense families are llama, "):
            refused(other)


def test_a_folder_whose_sparse_layers_have_another_hidden_size_is_refused(tmp_path):
    model = tiny_model("llama")
    graft(model, {0: moe_config()})
    folder = save_model(model, tmp_path / "own", format="moewright")
    fields = json.loads((folder / "config.json").read_text())
    fields["sparse_layers"][0]["hidden_size"] = 48
    (folder / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ModelError, match="hidden_size=48 of a sparse layer, where the backbone has 32"):
        load_model(folder)


class Watched:
    """A source that remembers what was read of each tensor."""

    def __init__(self, folder: ModelFolder) -> None:
        self.source, self.elements = FolderSource(folder), {}

    def read(self, slot, index=None):
        tensor = self.source.read(slot, index)
        assert slot.name not in self.elements, "nothing is read twice"
        self.elements[slot.name] = tensor.numel()
        return tensor


@pytest.mark.parametrize("kind", ["mixtral, tied", "qwen2_moe, doubled", "granitemoe", "gpt_oss", "moewright"])
def test_each_of_two_simulated_ranks_reads_its_part_and_nothing_else(tmp_path, kind):
    """Both in this process, one after the other: what is read depends on `boxes_of` alone."""
    folder = ModelFolder(save_model(model_of(kind), tmp_path / "out"))
    whole = load_model(folder.path)
    names = {name for name, _ in whole.named_parameters()}

    def boxes_of(rank, tensor):
        """Experts are dealt out to the ranks, of other matrices each has half the rows, and vectors are everybody's."""
        rows = slice(0, tensor.shape[0])
        if tensor.dim() > 1:
            half = tensor.shape[0] // 2
            rows = slice(rank * half, (rank + 1) * half)
        others = [slice(0, size) for size in tensor.shape[1:]]
        return [Box((rows, *others), (slice(0, rows.stop - rows.start), *others))]

    parts = []
    for rank in range(2):
        model, written_as = open_skeleton(folder)
        source = Watched(folder)
        fill(model, written_as, source, boxes_of=partial(boxes_of, rank))
        parts.append(dict(model.state_dict()))
        held = sum(parts[rank][name].numel() for name in parts[rank] if name in names or name.endswith("router.bias"))
        assert sum(source.elements.values()) == held, "as much as it holds"
        experts = {name for name in source.elements if re.search(r"experts\.\d+\.", name)}
        assert all(int(re.search(r"experts\.(\d+)\.", name)[1]) // 2 == rank for name in experts)
        assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == ("tied" in kind)
    for name, tensor in whole.state_dict().items():
        halves = [part[name] for part in parts]
        joined = torch.cat(halves) if tensor.dim() > 1 else halves[0]
        assert torch.equal(joined, tensor), name


def test_any_part_of_a_tensor_can_be_asked_for(tmp_path):
    folder = ModelFolder(save_model(model_of("gpt_oss"), tmp_path / "out"))
    whole = load_model(folder.path).state_dict()
    # Rows that lie apart: this rank's share of tensors that were joined.
    rows, here = [(slice(1, 3), slice(0, 2))], [slice(0, 6), slice(6, 15)]
    columns = [(slice(5, 11), here[0]), (slice(11 + 5, 11 + 14), here[1])]

    def boxes_of(tensor):
        end = tensor.shape[-1]
        dims = [rows, columns, [(slice(8, end), slice(0, end - 8))]][: tensor.dim()]
        return [Box(*zip(*places, strict=True)) for places in itertools.product(*dims)]

    def held(tensor):
        parts = tensor[1:3]
        if tensor.dim() > 1:
            parts = torch.cat([parts[:, 5:11], parts[:, 16:25]], dim=1)
        return parts[:, :, 8:] if tensor.dim() > 2 else parts

    model, written_as = open_skeleton(folder)
    fill(model, written_as, FolderSource(folder), boxes_of=boxes_of)
    for name, tensor in model.state_dict().items():
        if not name.endswith("previous_counts"):
            assert torch.equal(tensor, held(whole[name])), name
    assert model.model.rotary_emb.inv_freq.device.type == "cpu"
