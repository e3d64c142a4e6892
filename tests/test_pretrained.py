"""What others call on a model with MoELayers: save_pretrained, load_state_dict, and transformers' Trainer with both."""

import copy
import gc
import json
import logging
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrize
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_utils import load_sharded_checkpoint
from transformers.utils import hub

from moewright.backbone.blocks import HOOKS, moe_layers
from moewright.backbone.graft import graft, ungraft
from moewright.backbone.load import load_model
from moewright.backbone.save import save_model
from moewright.backbone.skeleton import has_tied_head
from moewright.errors import ModelError, UsageError
from tests.models import FAMILIES, logits_of, plain_transformers, relative, tiny_model, write_dense
from tests.sparse import INPUT, KINDS, grafted, model_of, moe_of, same_state


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def zeroed(model: Any) -> Any:
    """A model like it, all of whose weights are 0."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.zero_()
    return other


# Saving


@pytest.mark.parametrize("kind", KINDS)
def test_save_pretrained_writes_what_save_model_writes(tmp_path, kind):
    model = model_of(kind)
    model.generation_config.update(top_k=7, do_sample=True)
    before, random = copy.deepcopy(model.config.to_dict()), torch.get_rng_state()
    model.save_pretrained(tmp_path / "theirs")
    assert torch.equal(torch.get_rng_state(), random)
    assert model.config.to_dict() == before
    save_model(model, tmp_path / "ours")
    theirs, ours = content(tmp_path / "theirs"), content(tmp_path / "ours")
    assert json.loads(ours["config.json"])["model_type"] == kind.split(",")[0]
    assert json.loads(theirs.pop("generation_config.json"))["top_k"] == 7
    assert "generation_config.json" in json.loads(theirs.pop("moewright.json"))["files"]
    assert theirs == {name: data for name, data in ours.items() if name != "moewright.json"}
    loaded = load_model(tmp_path / "theirs")
    same_state(loaded, model)
    assert loaded.generation_config.top_k == 7
    assert has_tied_head(loaded) == has_tied_head(model)


def test_plain_transformers_loads_what_was_saved(tmp_path):
    model = model_of("mixtral")
    model.save_pretrained(str(tmp_path / "out"), is_main_process=True, safe_serialization=True, token="hf_secret")
    assert relative(logits_of(plain_transformers(tmp_path / "out"), INPUT), logits_of(model, INPUT)) < 1e-5


def test_what_can_be_honoured_is(tmp_path):
    model = model_of("mixtral")
    model.save_pretrained(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none").exists()
    model.save_pretrained(tmp_path / "out", max_shard_size="40KB")
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 2
    assert all(len(load_file(shard)) == 1 or shard.stat().st_size < 42_000 for shard in shards)
    same_state(load_model(tmp_path / "out"), model)
    model.save_pretrained(tmp_path / "out", max_shard_size=10**9)
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert not list((tmp_path / "out").glob("model-*.safetensors"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"push_to_hub": True}, r"push_to_hub=True is not supported .* model.push_to_hub"),
        ({"safe_serialization": False}, "safe_serialization=False"),
        ({"variant": "fp16"}, "variant='fp16'"),
        ({"save_original_format": False}, "save_original_format=False"),
        ({"distributed_checkpoint": True}, "distributed_checkpoint=True"),
        ({"save_function": print}, "save_function="),
        ({"max_shard_size": "5 gigs"}, "max_shard_size='5 gigs'"),
        ({"max_shard_size": 0}, "max_shard_size=0"),
    ],
)
def test_what_cannot_is_refused_by_name(tmp_path, arguments, words):
    with pytest.raises(UsageError, match=words):
        model_of("mixtral").save_pretrained(tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_push_to_hub_uploads_what_save_pretrained_writes(monkeypatch):
    uploaded = {}
    repository = SimpleNamespace(create_repo=lambda name, **_: SimpleNamespace(repo_id=name))
    monkeypatch.setattr(hub, "hf_api", lambda: repository)
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *_, **__: SimpleNamespace(save=lambda path: None))
    model = model_of("mixtral")

    def upload(folder, repo, **_):
        uploaded.update(content(Path(folder)), repo=repo)

    monkeypatch.setattr(model, "_upload_modified_files", upload)
    model.push_to_hub("someone/mixture")
    assert uploaded["repo"] == "someone/mixture"
    assert json.loads(uploaded["config.json"])["model_type"] == "mixtral"
    assert {"model.safetensors", "moewright.json"} <= uploaded.keys()


@pytest.mark.parametrize("kind", ["mixtral, tied", "qwen2_moe, doubled", "switch_transformers", "moewright, inline"])
def test_a_state_dict_is_written_in_place_of_the_models_values(tmp_path, kind):
    model = model_of(kind)
    state = {name: (tensor * 0.5).clone() for name, tensor in model.state_dict().items()}
    zeroed(model).save_pretrained(tmp_path / "out", state_dict=state)
    loaded = load_model(tmp_path / "out").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    wide = {name: tensor.double() for name, tensor in state.items()}
    model.save_pretrained(tmp_path / "wide", state_dict=wide)
    assert load_model(tmp_path / "wide").dtype == torch.float64


def test_a_state_dict_of_something_else_is_refused(tmp_path):
    model = model_of("mixtral")
    state = model.state_dict()
    name = "model.layers.0.mlp.experts.down_proj"
    for changed, words in [
        ({}, "state_dict lacks .* and .* more"),
        ({k: v for k, v in state.items() if k != name}, f"state_dict lacks {name}"),
        (state | {"model.layers.0.mlp.experts.lora_A": torch.ones(2)}, "lora_A are no weights of a llama .* merge"),
        (state | {name: state[name][:2]}, "size mismatch for .*down_proj"),
        (state | {name: state[name].to("meta")}, "down_proj are sharded or offloaded"),
    ]:
        with pytest.raises(ModelError, match=words) as caught:
            model.save_pretrained(tmp_path / "out", state_dict=changed)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe, silent", "moewright, inline"])
def test_a_state_by_the_names_on_disk_is_not_written(tmp_path, kind):
    model = model_of(kind)
    disk = load_file(save_model(model, tmp_path / "disk") / "model.safetensors")
    with pytest.raises(ModelError, match="are names on disk; state_dict takes the names in memory, those of") as caught:
        model.save_pretrained(tmp_path / "out", state_dict=disk)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_sharded_model_is_refused_without_the_whole_state(tmp_path):
    model = model_of("mixtral")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ModelError, match="sharded or offloaded; gather them, and pass state_dict="):
            model.save_pretrained(tmp_path / "out")
        model.save_pretrained(tmp_path / "out", state_dict=state)
        disk = load_file(tmp_path / "out" / "model.safetensors")
        with pytest.raises(ModelError, match="not here as a whole"):
            model.load_state_dict(disk)
    finally:
        dist.destroy_process_group()
    loaded = load_model(tmp_path / "out").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_dtypes_that_differ_are_written_as_the_widest(tmp_path):
    model = model_of("mixtral").to(torch.bfloat16)
    model.model.norm.float()
    model.save_pretrained(tmp_path / "out")
    assert load_model(tmp_path / "out").dtype == torch.float32
    assert torch.equal(load_model(tmp_path / "out").model.norm.weight, model.model.norm.weight)


def test_an_ungrafted_model_saves_and_loads_as_before(tmp_path):
    model = tiny_model("llama")
    hooks = len(model._load_state_dict_pre_hooks)
    ungraft(model, graft(model, {0: moe_of("llama")}))
    assert HOOKS not in model.__dict__
    assert type(model).__base__ is type(tiny_model("llama")).__base__
    assert len(model._load_state_dict_pre_hooks) == hooks
    model.save_pretrained(tmp_path / "out")
    assert plain_transformers(tmp_path / "out").config.model_type == "llama"


def test_a_grafted_model_is_what_it_was_and_goes_when_nobody_holds_it():
    model = tiny_model("llama")
    kind = type(model)
    taken = graft(model, {0: moe_of("llama")})
    assert isinstance(model, kind)
    assert (type(model).__name__, type(model).__module__) == (kind.__name__, kind.__module__)
    assert type(model) is type(model_of("mixtral"))
    graft(model, {1: moe_of("llama")})
    assert type(model).__base__ is kind
    ungraft(model, taken)
    assert type(model).__base__ is kind, "one layer is still sparse"
    gone = weakref.ref(model)
    gc.disable()
    try:
        del model, taken
        assert gone() is None
    finally:
        gc.enable()


def test_copies_save_themselves(tmp_path):
    model = model_of("mixtral")
    other = zeroed(model)
    for number, copied in enumerate((other, copy.copy(model))):  # both go the way that a pickle goes
        copied.save_pretrained(tmp_path / str(number))
        same_state(load_model(tmp_path / str(number)), copied)
    assert not other.lm_head.weight.any()
    other.load_state_dict(load_file(tmp_path / "1" / "model.safetensors"))
    same_state(other, model)


@pytest.mark.parametrize(
    ("kind", "parts"), [("mixtral", ["model"]), ("moewright, inline", ["model", "model.encoder", "model.decoder"]),
                        ("switch_transformers", ["encoder", "decoder"])]
)  # fmt: skip
def test_a_part_of_a_model_does_not_save_itself(tmp_path, kind, parts):
    model, dense = model_of(kind), tiny_model(KINDS[kind][0], **KINDS[kind][2])
    taken = graft(dense, {layer: moe.config for layer, moe in moe_layers(model).items()})
    for whole in (model, copy.deepcopy(model), copy.copy(model), dense):
        inside = [name for name, module in whole.named_modules() if name and isinstance(module, PreTrainedModel)]
        assert inside == parts
        for part in map(whole.get_submodule, parts):
            with pytest.raises(UsageError, match=r"is a part of a model with MoE.*save the whole") as caught:
                part.save_pretrained(tmp_path / "out")
            assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    ungraft(dense, taken)
    plain = tiny_model(KINDS[kind][0], **KINDS[kind][2])
    assert all(type(dense.get_submodule(name)) is type(plain.get_submodule(name)) for name in ("", *parts))


class Louder(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 1.5


def test_experts_may_be_computed_as_adapters_do_until_they_are_merged(tmp_path):
    # PEFT's target_parameters registers a parametrization that adds the product of its two matrices.
    model, wanted = model_of("mixtral"), model_of("mixtral")
    with torch.no_grad():
        moe_layers(wanted)[0].experts.gate_up_proj.mul_(1.5)
    experts = moe_layers(model)[0].experts
    parametrize.register_parametrization(experts, "gate_up_proj", Louder())
    assert torch.equal(logits_of(model, INPUT), logits_of(wanted, INPUT))
    with pytest.raises(ModelError, match="merge or take out what was added"):
        model.save_pretrained(tmp_path / "out")
    parametrize.remove_parametrizations(experts, "gate_up_proj")
    model.save_pretrained(tmp_path / "out")
    same_state(load_model(tmp_path / "out"), wanted)


# Loading by the names on disk


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("own", [False, True])
def test_load_state_dict_takes_the_names_on_disk(tmp_path, kind, own):
    model = model_of(kind)
    folder = save_model(model, tmp_path / "out", format="moewright" if own else None)
    other, tied = zeroed(model), {*getattr(model, "all_tied_weights_keys", {})}
    result = other.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    assert not result.unexpected_keys
    assert set(result.missing_keys) <= tied
    same_state(other, model)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_names_in_memory_are_left_to_torch(model_type):
    model = grafted(model_type, {0: moe_of(model_type)})
    other = zeroed(model)
    other.load_state_dict(model.state_dict())
    same_state(other, model)


def test_shards_are_taken_one_after_the_other(tmp_path):
    model = model_of("qwen3_moe")
    model.save_pretrained(tmp_path / "out", max_shard_size="4KB")  # experts of a layer in several files
    other = zeroed(model)
    load_sharded_checkpoint(other, str(tmp_path / "out"), strict=False)
    same_state(other, model)


def test_what_is_not_there_is_named(tmp_path):
    model = model_of("mixtral")
    state = load_file(save_model(model, tmp_path / "out") / "model.safetensors")
    gone = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    without = {name: tensor for name, tensor in state.items() if name != gone}
    assert model.load_state_dict(without, strict=False).missing_keys == [gone]
    with pytest.raises(RuntimeError, match=rf"Missing key.*{gone}"):
        model.load_state_dict(without)
    with pytest.raises(RuntimeError, match=f"size mismatch for {gone}"):
        model.load_state_dict(without | {gone: torch.ones(2, 2)}, strict=False)


def test_what_stands_for_nothing_must_still_be_nothing(tmp_path):
    model = model_of("qwen2_moe, silent")
    state = load_file(save_model(model, tmp_path / "out") / "model.safetensors")
    with pytest.raises(RuntimeError, match=r"q_proj\.bias is not 0 everywhere"):
        model.load_state_dict(state | {"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}, strict=False)


def test_half_a_model_is_refused(tmp_path):
    model = model_of("mixtral")
    dense = load_file(write_dense(tmp_path / "dense") / "model.safetensors")
    with pytest.raises(ModelError, match=r"layer 0 has model.layers.0.mlp.down_proj.weight.*load their folder"):
        model.load_state_dict(dense, strict=False)
    mixtral = load_file(save_model(model, tmp_path / "out") / "model.safetensors")
    with pytest.raises(ModelError, match="of a format that does not compute this one"):
        model_of("qwen2_moe, silent").load_state_dict(mixtral, strict=False)
    # But for a part that says nothing of experts torch's own report is enough.
    assert model.load_state_dict({"model.layers.0.self_attn.extra": torch.ones(1)}, strict=False).unexpected_keys


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe, silent", "glm4_moe", "moewright, inline"])
def test_a_key_that_nobody_knows_changes_nothing_but_torchs_report(tmp_path, kind):
    model = model_of(kind)
    state = load_file(save_model(model, tmp_path / "out") / "model.safetensors")
    extra = {"value_head.weight": torch.ones(1), "model.layers.0.self_attn.extra": torch.ones(1)}
    other = zeroed(model)
    assert other.load_state_dict(state | extra, strict=False).unexpected_keys == [*extra]
    same_state(other, model)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*value_head.weight"):
        other.load_state_dict(state | extra)
    # A part of a state, too.
    partial, name = zeroed(model), next(name for name in state if name not in model.state_dict())
    assert partial.load_state_dict({name: state[name]} | extra, strict=False).unexpected_keys == [*extra]
    assert any(tensor.any() for tensor in partial.state_dict().values()) == bool(state[name].any())
    # What is computed from the config is no key at all.
    other = zeroed(model)
    other.load_state_dict(state | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, strict=False)
    same_state(other, model)


def test_half_a_model_is_refused_whatever_else_there_is(tmp_path):
    extra = {"value_head.weight": torch.ones(1)}
    dense = load_file(write_dense(tmp_path / "dense", "qwen2") / "model.safetensors")  # biases, as a qwen2_moe has
    with pytest.raises(ModelError, match=r"layer 0 has model.layers.0.mlp.down_proj.weight.*load their folder"):
        model_of("qwen2_moe, silent").load_state_dict(dense | extra, strict=False)
    # Experts of the same names, and a shared expert that this format has not.
    qwen = load_file(save_model(model_of("qwen2_moe, doubled"), tmp_path / "qwen") / "model.safetensors")
    with pytest.raises(ModelError, match=r"layer 1 has model.layers.1.mlp.shared_expert.*load their folder"):
        model_of("glm4_moe").load_state_dict(qwen | extra, strict=False)
    # A layer that is dense here and sparse there.
    both = load_file(save_model(model_of("mixtral"), tmp_path / "both") / "model.safetensors")
    model = grafted("llama", {0: moe_of("llama")})
    with pytest.raises(ModelError, match=r"layer 0 has model.layers.0.block_sparse_moe.*load their folder"):
        model.load_state_dict(both | extra, strict=False)


# transformers' Trainer


def train(model: Any, out: Path, *, resume: bool | str = False, **settings: Any) -> Trainer:
    ids = torch.randint(0, 256, (32, 12), generator=torch.Generator().manual_seed(5))
    rows = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in ids]
    values = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2} | settings
    arguments = TrainingArguments(str(out), use_cpu=True, report_to=[], disable_tqdm=True, seed=3, **values)
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows[:8])
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Any:
    """What Trainer warns of."""
    logger = logging.getLogger("transformers.trainer")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*pin_memory")
@pytest.mark.parametrize("kind", ["mixtral", "mixtral, tied", "qwen2_moe, silent", "glm4_moe", "moewright"])
def test_trainer_saves_and_resumes_as_if_nothing_had_happened(tmp_path, kind, said):
    whole, first = model_of(kind).train(), model_of(kind).train()
    train(whole, tmp_path / "whole")
    train(first, tmp_path / "halves")
    halfway = tmp_path / "halves" / "checkpoint-2"
    assert {"optimizer.pt", "trainer_state.json", "config.json", "moewright.json"} <= content(halfway).keys()
    second = zeroed(first).train()
    train(second, tmp_path / "halves", resume=str(halfway))
    same_state(second, whole)
    same_state(load_model(tmp_path / "halves" / "checkpoint-4"), whole)
    assert not torch.equal(load_model(halfway).lm_head.weight, whole.lm_head.weight)
    assert not said.records
    # In shards, too; Trainer compares their names by itself, and warns of all that differ.
    load_model(halfway).save_pretrained(halfway, max_shard_size="20KB")
    third = zeroed(first).train()
    train(third, tmp_path / "halves", resume=str(halfway))
    same_state(third, whole)
    assert bool(said.records) == (kind != "moewright")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*pin_memory")
def test_trainer_loads_the_best_model_at_the_end(tmp_path, said):
    model = model_of("mixtral").train()
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "learning_rate": 1.0}
    trainer = train(model, tmp_path / "out", load_best_model_at_end=True, **settings)
    best, last = Path(trainer.state.best_model_checkpoint), tmp_path / "out" / "checkpoint-4"
    assert best != last
    same_state(model, load_model(best))
    assert not said.records
    trainer.save_model()  # into the folder that holds the checkpoints
    same_state(model, load_model(tmp_path / "out"))
    trainer.save_model()
    assert (last / "optimizer.pt").exists()
    assert load_model(last)
