"""gpt_oss: biased routers and experts, stored transposed and interleaved, and quantised sources refused."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from moewright.backbone.blocks import moe_layers
from moewright.backbone.formats.choose import choose_format
from moewright.backbone.graft import graft, ungraft
from moewright.backbone.load import load_model
from moewright.backbone.save import save_model
from moewright.cli import main
from moewright.errors import ModelError
from tests.models import logits_of, plain_transformers, relative, tiny_config, tiny_model
from tests.sparse import model_of, moe_of, same_state

INPUT = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(4))
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "truncate": False,
}


def slow_block(self, hidden_states):
    """A block of gpt-oss, token by token in float64: of each chosen expert, columns of gate and up take turns."""
    experts, router = self.experts, self.router
    rows = []
    for x_D in hidden_states.reshape(-1, hidden_states.shape[-1]).double():
        logits = [float(w_D.double() @ x_D + b) for w_D, b in zip(router.weight, router.bias, strict=True)]
        chosen = sorted(range(len(logits)), key=lambda e: -logits[e])[: router.top_k]
        total = sum(torch.tensor(logits[e]).double().exp() for e in chosen)
        y_D = torch.zeros_like(x_D)
        for e in chosen:
            both = x_D @ experts.gate_up_proj[e].double() + experts.gate_up_proj_bias[e].double()
            gate = torch.tensor([min(float(v), 7.0) for v in both[0::2]]).double()
            up = torch.tensor([max(min(float(v), 7.0), -7.0) for v in both[1::2]]).double()
            hidden = (up + 1) * gate / (1 + (-1.702 * gate).exp())
            out = hidden @ experts.down_proj[e].double() + experts.down_proj_bias[e].double()
            y_D = y_D + torch.tensor(logits[e]).double().exp() / total * out
        rows.append(y_D)
    return torch.stack(rows).view(hidden_states.shape).to(hidden_states.dtype), None


@pytest.mark.parametrize(
    "changes",
    [{}, {"rope_parameters": YARN}, {"layer_types": ["full_attention"] * 2, "tie_word_embeddings": True},
     {"num_experts_per_tok": 1, "attention_bias": False}],
    ids=str,
)  # fmt: skip
def test_folders_of_others_are_read_computed_and_written_back(tmp_path, monkeypatch, changes):
    theirs = tiny_model("gpt_oss", **changes)
    with torch.no_grad():
        theirs.model.layers[0].mlp.experts.gate_up_proj.mul_(4.0)  # so that the activation is clamped
    theirs.save_pretrained(tmp_path / "theirs")
    ours, wanted = load_model(tmp_path / "theirs"), logits_of(theirs, INPUT)
    assert relative(logits_of(ours, INPUT), wanted) < 2e-6
    again = save_model(ours, tmp_path / "again")
    assert relative(logits_of(plain_transformers(again), INPUT), wanted) < 2e-6
    stored, source = (load_file(path / "model.safetensors") for path in (again, tmp_path / "theirs"))
    assert all(torch.equal(stored[name], tensor) for name, tensor in source.items())
    same_state(load_model(again), ours)
    monkeypatch.setattr("transformers.models.gpt_oss.modeling_gpt_oss.GptOssMLP.forward", slow_block)
    assert relative(logits_of(ours, INPUT), logits_of(theirs, INPUT)) < 2e-6, "token by token"


def test_gradients_of_experts_are_transformers_own(tmp_path):
    theirs = tiny_model("gpt_oss")
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    for model in (ours, theirs):
        model(input_ids=INPUT, labels=INPUT).loss.backward()
    for layer, moe in moe_layers(ours).items():
        block = theirs.model.layers[layer].mlp
        first, rows = block.experts.gate_up_proj.grad, moe.experts.gate_up_proj.grad
        gate, up = rows.chunk(2, dim=1)
        for found, wanted in [
            (gate.transpose(1, 2), first[..., 0::2]),
            (up.transpose(1, 2), first[..., 1::2]),
            (moe.experts.gate_up_proj_bias.grad.chunk(2, dim=1)[1], block.experts.gate_up_proj_bias.grad[:, 1::2]),
            (moe.experts.down_proj.grad.transpose(1, 2), block.experts.down_proj.grad),
            (moe.experts.down_proj_bias.grad, block.experts.down_proj_bias.grad),
            (moe.router.weight.grad, block.router.weight.grad),
            (moe.router.linear_bias.grad, block.router.bias.grad),
        ]:
            assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def test_a_layer_that_expects_two_outputs_gets_them_and_its_block_back():
    model = tiny_model("gpt_oss")
    wanted = logits_of(model, INPUT)
    taken = graft(model, {1: moe_of("gpt_oss", router_bias=True, activation="swiglu_oai")})
    assert not torch.equal(logits_of(model, INPUT), wanted)
    ungraft(model, taken)
    assert torch.equal(logits_of(model, INPUT), wanted)


def test_export_proves_it(tmp_path, capsys):
    source = save_model(model_of("gpt_oss"), tmp_path / "own", format="moewright")
    assert main(["export", str(source), str(tmp_path / "out"), "--to", "gpt_oss", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["proof"]["relative_logit_difference"] < 1e-6
    assert not facts["proof"]["expert_faults"] + facts["proof"]["deaf_settings"]
    same_state(load_model(tmp_path / "out"), load_model(source))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"router_bias": False}, "its routers have biases"),
        ({"activation": "silu"}, "activation silu is not the model's swiglu_oai"),
        ({"router_order": "softmax-topk"}, "always renormalises"),
        ({"shared_size": 16}, "no shared_size=16"),
        ({"expert_bias": False}, "its experts have no biases"),
    ],
)
def test_what_it_does_not_compute_is_refused(changes, words):
    settings = {"router_bias": True, "activation": "swiglu_oai"} | changes
    with pytest.raises(ModelError, match=f"format=gpt_oss: .*{words}"):
        choose_format(tiny_config("gpt_oss"), dict.fromkeys((0, 1), moe_of("gpt_oss", **settings)), wanted="gpt_oss")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"swiglu_limit": 6.0}, "swiglu_limit=6.0: another limit of the activation"),
        ({"swiglu_alpha": 1.0}, "swiglu_alpha=1.0: another gain"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "quantization_config=Mxfp4Config(dequantize=True)"),
    ],
)
def test_other_activations_and_quantised_folders_are_refused(tmp_path, fields, words):
    tiny_model("gpt_oss").save_pretrained(tmp_path / "theirs")
    path = tmp_path / "theirs" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(ModelError, match=re.escape(words)) as caught:
        load_model(tmp_path / "theirs")
    assert "\n" not in str(caught.value)


def test_blocks_of_four_bits_are_refused_whatever_the_config_says(tmp_path):
    tiny_model("gpt_oss").save_pretrained(tmp_path / "theirs")
    path = tmp_path / "theirs" / "model.safetensors"
    tensors, name = load_file(path), "model.layers.0.mlp.experts.down_proj"
    tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = (torch.zeros(4, 32, dtype=torch.uint8) for _ in range(2))
    del tensors[name]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"tensors .*down_proj_blocks.*Mxfp4Config"):
        load_model(tmp_path / "theirs")


@pytest.mark.parametrize("model_type", ["gpt_oss", "olmoe"])
def test_a_folder_that_asks_for_router_logits_is_computed_as_transformers_does(tmp_path, model_type):
    tiny_model(model_type, output_router_logits=True).save_pretrained(tmp_path / "theirs")
    assert json.loads((tmp_path / "theirs" / "config.json").read_text())["output_router_logits"]
    ours, theirs = load_model(tmp_path / "theirs"), plain_transformers(tmp_path / "theirs")
    assert relative(logits_of(ours, INPUT), logits_of(theirs, INPUT)) < 1e-5
