"""Layer-wise distillation: gradients, isolation of layers, the choice of a top-k, folders, refusals."""

import copy
import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from moewright import cli
from moewright.backbone.blocks import moe_layers
from moewright.backbone.load import load_model
from moewright.backbone.save import save_model
from moewright.data.pack import PackedRows
from moewright.distil import apply as distil
from moewright.distil.apply import distil_folder
from moewright.distil.choose import choose_top_k
from moewright.distil.config import DistilConfig
from moewright.distil.layerwise import distil_layers
from moewright.distil.measure import measure_layers, possible_top_ks
from moewright.distil.rows import Rows, read_rows
from moewright.distil.teach import layer_loss, train_layers, training_config
from moewright.distil.teacher import Block, Teacher
from moewright.errors import CheckpointError, DataError, ModelError, UsageError
from moewright.moe.config import MoEConfig
from moewright.moe.layer import MoELayer
from moewright.upcycle.apply import upcycle_folder
from moewright.upcycle.config import UpcycleConfig
from tests import reference
from tests.models import write_dense

SPLIT = UpcycleConfig(experts=4, granularity=4, top_k=4)
COPIES = UpcycleConfig(experts=3, top_k=2)
QUICK = DistilConfig(
    tolerance=0.7, tokens=1920, held_out_tokens=128, batch_size=4, sequence_length=16, learning_rate=1e-2, top_k=2
)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model of three layers, what it was split and copied into, and a text of 60 documents."""
    path = tmp_path_factory.mktemp("distil")
    write_dense(path / "dense", num_hidden_layers=3)
    upcycle_folder(path / "dense", path / "split", SPLIT)
    upcycle_folder(path / "dense", path / "copies", COPIES)
    lines = [{"text": f"{n} times {n} is {n * n}, and {n} plus {n} is {n + n}"} for n in range(60)]
    (path / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "held-out.txt").write_text("Seven times eight is fifty-six. " * 12)
    return path


def rows_of(lengths: list[int], *, S: int = 16, seed: int = 0) -> PackedRows:
    """Documents of random bytes; the last row has padding unless the lengths add up to a multiple of S."""
    tokens = np.random.default_rng(seed).integers(0, 256, sum(lengths), dtype=np.int32)
    return PackedRows(tokens, lengths=np.asarray(lengths), sequence_length=S, end_token=256)


PACKED = rows_of([5, 30, 9, 100, 61, 47, 90, 33] * 8 + [3])
LEARNED, HELD_OUT = Rows(PACKED, range(len(PACKED) - 8)), Rows(PACKED, range(len(PACKED) - 8, len(PACKED)))


def pair(folders: Path, name: str = "split"):
    dense, sparse = load_model(folders / "dense", dtype=torch.float32), load_model(folders / name, dtype=torch.float32)
    return dense.requires_grad_(False), sparse


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("order", ["topk-softmax", "softmax-topk"])
def test_gradients_of_a_layer_are_those_of_a_loop_in_float64(order):
    torch.manual_seed(1)
    D, F, E, K, variance = 6, 5, 4, 2, 1.7
    config = MoEConfig(hidden_size=D, expert_size=F, num_experts=E, top_k=K, router_order=order)
    settings = replace(QUICK, balance_loss=0.3, z_loss=0.2, top_k=K)
    moe = MoELayer(training_config(config, settings)).train()
    with torch.no_grad():
        moe.router.weight.normal_()
    x_BSD, y_BSD = torch.randn(2, 4, D), torch.randn(2, 4, D)
    mask = torch.ones(2, 4, dtype=torch.bool)
    mask[1, 2:] = False
    x_BSD[1, 2:] = y_BSD[1, 2:] = torch.nan  # what padding holds is nobody's
    loss = layer_loss(moe, Block(x_BSD, y_BSD), mask, variance=variance, dtype="float32")
    loss.backward()

    def slow(name: str) -> torch.Tensor:
        return moe.get_parameter(name).detach().double().requires_grad_()

    router, first, down = slow("router.weight"), slow("experts.gate_up_proj"), slow("experts.down_proj")
    x_TD, y_TD = x_BSD[mask].double(), y_BSD[mask].double()
    out_TD = reference.moe(x_TD, router, first, down, top_k=K, order=order, activation="silu", gated=True)
    error = sum(((o - y) ** 2).sum() for o, y in zip(out_TD, y_TD, strict=True)) / (6 * variance)
    total = error + 0.3 * reference.balance(x_TD, router, K, order) + 0.2 * reference.z(x_TD, router)
    total.backward()
    assert loss.item() == pytest.approx(error.item(), rel=1e-5)  # the others join in the backward pass alone
    learned = (moe.router.weight, moe.experts.gate_up_proj, moe.experts.down_proj)
    for found, right in zip(learned, (router, first, down), strict=True):
        assert (found.grad.double() - right.grad).abs().max() <= 1e-5 * right.grad.abs().max()


def test_blocks_are_what_the_model_computes(folders):
    dense, _ = pair(folders)
    batch = PACKED.batch([3, len(PACKED) - 1])
    assert not batch.token_mask.all()
    inputs = {}
    for layer in (0, 2):
        dense.model.layers[layer].mlp.register_forward_pre_hook(lambda m, a, layer=layer: inputs.update({layer: a[0]}))
    blocks = Teacher(dense).blocks(batch, [0, 2], dtype="float32")
    assert list(blocks) == [0, 2]
    for layer, block in blocks.items():
        assert torch.equal(block.x_BSD, inputs[layer])
        assert torch.equal(block.y_BSD, dense.model.layers[layer].mlp(block.x_BSD))
        assert not block.x_BSD.requires_grad
        assert not block.y_BSD.requires_grad
    # A document sees nothing of another, nor of padding: alone it gives the same.
    alone = PACKED.batch([len(PACKED) - 1])
    last = Teacher(dense).blocks(alone, [2], dtype="float32")[2]
    assert torch.allclose(last.y_BSD[0], blocks[2].y_BSD[1], atol=1e-5)
    assert not any(module._forward_hooks for module in dense.modules())


def test_a_layer_learns_the_same_bits_whichever_others_learn_beside_it(folders):
    tables, models = [], []
    for at_once in (1, 2, 3):
        dense, sparse = pair(folders)
        tables.append(distil_layers(Teacher(dense), sparse, LEARNED, HELD_OUT, replace(QUICK, layers_at_once=at_once)))
        models.append(weights(sparse))
    assert tables[0] == tables[1] == tables[2]
    assert same(models[0], models[1])
    assert same(models[0], models[2])

    dense, sparse = pair(folders)
    alone = moe_layers(sparse)[1]
    (before,) = measure_layers(Teacher(dense), {1: alone}, HELD_OUT, batch_size=4).values()
    alone.configure(training_config(alone.config, QUICK))
    train_layers(Teacher(dense), {1: alone}, LEARNED, variances={1: before.variance}, settings=QUICK)
    assert same(weights(alone), weights(moe_layers(load_like(sparse, models[0]))[1]))


def load_like(model, tensors):
    model = copy.deepcopy(model)
    model.load_state_dict(tensors, strict=False)
    return model


def test_errors_fall_and_the_dense_model_stays_as_it_is(folders):
    dense, sparse = pair(folders)
    before_dense, before = copy.deepcopy(dense.state_dict()), weights(sparse)
    table = distil_layers(Teacher(dense), sparse, LEARNED, HELD_OUT, QUICK)
    assert [row["layer"] for row in table] == [0, 1, 2]
    for row in table:
        assert row["trained"]
        assert row["trained_with"] == 2
        assert row["error_after"] < 0.7 * row["error_before"]
        assert row["top_k"] == 2
        assert 1 <= row["load_imbalance"] <= 4
        assert row["top_ks"] == [1, 2, 3, 4]
    assert same(before_dense, dense.state_dict())
    assert not dense.training
    assert all(parameter.grad is None for parameter in dense.parameters())
    changed = {name for name, tensor in weights(sparse).items() if not torch.equal(tensor, before[name])}
    inside = {name for name in before if ".mlp." in name}
    assert changed == inside
    # What a layer was trained with does not stay behind.
    for row, moe in zip(table, moe_layers(sparse).values(), strict=True):
        original = moe_layers(pair(folders)[1])[row["layer"]].config
        assert moe.config == replace(original, top_k=row["top_k"])
        assert moe.context.token_mask is None
        assert not moe.training


@torch.no_grad()
@pytest.mark.parametrize("order", ["topk-softmax", "softmax-topk"])
def test_errors_of_every_top_k_are_those_of_a_loop_in_float64(folders, order):
    dense, sparse = pair(folders)
    layers = moe_layers(sparse)
    torch.manual_seed(0)
    for moe in layers.values():
        moe.configure(replace(moe.config, router_order=order))
        moe.router.weight.normal_(0.0, 0.3)
    found = measure_layers(Teacher(dense), layers, HELD_OUT, batch_size=3)
    assert all(moe.config.top_k == 4 for moe in layers.values())
    read = {layer: [] for layer in layers}
    for number in HELD_OUT.numbers:
        batch = PACKED.batch([number])
        for layer, block in Teacher(dense).blocks(batch, list(layers), dtype="float32").items():
            read[layer].append(block.x_BSD[batch.token_mask])
    for layer, moe in layers.items():
        x_TD = torch.cat(read[layer]).double()
        y_TD = copy.deepcopy(dense.model.layers[layer].mlp).double()(x_TD)
        variance = y_TD.var(dim=0, correction=0).sum().item()
        assert found[layer].variance == pytest.approx(variance, rel=1e-4)
        tensors = (moe.router.weight.double(), moe.experts.gate_up_proj.double(), moe.experts.down_proj.double())
        brute = {}
        for k in (1, 2, 3, 4):
            out_TD = reference.moe(x_TD, *tensors, top_k=k, order=order, activation="silu", gated=True)
            brute[k] = ((out_TD - y_TD) ** 2).sum(dim=1).mean().item() / variance
            chosen = [e for x in x_TD for e in reference.choose(tensors[0] @ x, k, order)]
            assert found[layer].counts[k].tolist() == [chosen.count(e) for e in range(4)]
        assert found[layer].errors == pytest.approx(brute, rel=1e-3, abs=1e-9)
        for tolerance in (0.01, 0.3, 0.6, 0.9):
            within = [k for k in (1, 2, 3, 4) if brute[k] <= tolerance]
            right = within[0] if within else sorted((brute[k], k) for k in brute)[0][1]
            assert choose_top_k(found[layer].errors, tolerance=tolerance) == right


def test_the_smallest_top_k_within_the_tolerance():
    draws = random.Random(0)
    for _ in range(300):
        ks = sorted(draws.sample(range(1, 9), draws.randint(1, 8)))
        errors = {k: draws.choice((0.0, 0.1, 0.2, 0.3, 0.5)) for k in ks}
        k = choose_top_k(errors, tolerance=0.2)
        if min(errors.values()) <= 0.2:
            assert errors[k] <= 0.2
            assert all(errors[smaller] > 0.2 for smaller in ks if smaller < k)
        else:
            assert errors[k] == min(errors.values())
            assert all(errors[smaller] > errors[k] for smaller in ks if smaller < k)


def test_top_ks_that_other_options_exclude_are_left_out():
    sizes = {"hidden_size": 4, "expert_size": 4, "num_experts": 6}
    assert possible_top_ks(MoEConfig(**sizes, top_k=2)) == [1, 2, 3, 4, 5, 6]
    assert possible_top_ks(MoEConfig(**sizes, top_k=2, num_groups=3, top_groups=2)) == [1, 2, 3, 4]
    renormalised = MoEConfig(**sizes, top_k=2, router_order="softmax-topk", renormalize=True)
    assert possible_top_ks(renormalised) == [2, 3, 4, 5, 6]


def test_an_exact_start_stays_and_gets_the_smallest_top_k(folders):
    for name, chosen in (("copies", 1), ("split", 4)):
        dense, sparse = pair(folders, name)
        before = weights(sparse)
        with pytest.warns(UserWarning, match="layers 0, 1, 2 compute their dense blocks already"):
            table = distil_layers(Teacher(dense), sparse, LEARNED, HELD_OUT, replace(QUICK, tolerance=1e-6, top_k=None))
        assert same(before, weights(sparse))
        for row in table:
            assert row["error_before"] < 1e-12
            assert not row["trained"]
            assert row["top_k"] == chosen
            assert row["within_tolerance"]


def test_a_layer_takes_its_trained_weights_only_if_they_are_better(folders):
    dense, sparse = pair(folders)
    before, strict = weights(sparse), replace(QUICK, tolerance=1e-6)
    with pytest.warns(UserWarning, match="layers 0, 1, 2 keep the weights that they had"):
        table = distil_layers(Teacher(dense), sparse, LEARNED, HELD_OUT, strict)
    for row in table:  # all four experts were exact, and after training no number is within the tolerance
        assert not row["trained"]
        assert row["top_k"] == 4
        assert row["error"] == row["errors_before"][3] < 1e-12 < row["errors_after"][3]
    assert same(before, weights(sparse))

    with torch.no_grad():
        for moe in moe_layers(sparse).values():
            moe.experts.down_proj.mul_(3.0)
    with pytest.warns(UserWarning, match="layers 0, 1, 2 miss the tolerance 1e-06 with any top-k"):
        table = distil_layers(Teacher(dense), sparse, LEARNED, HELD_OUT, strict)
    for row in table:
        assert row["trained"]
        assert not row["within_tolerance"]
        assert row["error"] == min(row["errors_after"]) < min(row["errors_before"])


def test_training_with_one_renormalised_expert_is_warned_of(folders):
    dense, sparse = pair(folders)
    with pytest.warns(UserWarning, match="top_k=1 with router_order=topk-softmax"):
        distil_layers(Teacher(dense), sparse, LEARNED, HELD_OUT, replace(QUICK, top_k=1, tolerance=0.99))


def command(folders: Path, out: Path, *more: str, sparse: str = "split") -> list[str]:
    options = "--tolerance 0.4 --top-k 2 --tokens 1920 --held-out-tokens 128 --batch-size 4 --sequence-length 16"
    names = [str(folders / "dense"), str(folders / sparse), str(out)]
    return ["distil", *names, "--text", str(folders / "text.jsonl"), *options.split(), "--learning-rate", "1e-2", *more]


@pytest.mark.filterwarnings("ignore:layers .* keep the weights")
def test_the_command_writes_what_it_reports(folders, tmp_path, capsys):
    assert cli.main(command(folders, tmp_path / "out", "--json")) == 0
    facts = json.loads(capsys.readouterr().out)
    record = json.loads((tmp_path / "out" / "moewright.json").read_text())
    upcycled = json.loads((folders / "split" / "moewright.json").read_text())
    assert record["upcycle"] == upcycled["upcycle"]
    assert {"target": str(tmp_path / "out")} | record["distil"] == facts
    assert facts["settings"]["tolerance"] == 0.4
    assert facts["steps"] == 30
    assert facts["text"]["held_out"] == "the end of text"
    assert facts["sha256"].keys() == {"dense", "sparse", "text"}
    assert facts["sha256"]["dense"] == upcycled["upcycle"]["source"]["sha256"]

    model = load_model(tmp_path / "out")
    layers = moe_layers(model)
    assert [moe.config.top_k for moe in layers.values()] == [row["top_k"] for row in facts["layers"]]
    experts = sum(4 - row["top_k"] for row in facts["layers"]) * 3 * 32 * 16
    assert facts["parameters"]["active_saved"] == experts
    assert facts["parameters"]["active"] == facts["parameters"]["active_before"] - experts
    assert 1 < facts["comparison"]["sparse_perplexity"] < 1.5 * facts["comparison"]["dense_perplexity"]

    assert cli.main(command(folders, tmp_path / "again")) == 0
    capsys.readouterr()
    for file in (tmp_path / "out").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name


@pytest.mark.filterwarnings("ignore:layers .* keep the weights")
def test_errors_are_those_of_the_folder_also_in_bfloat16(folders, tmp_path):
    """What is written was measured: after rounding, and with differing top-k in our own model type."""
    upcycle_folder(folders / "dense", tmp_path / "narrow", SPLIT, dtype=torch.bfloat16)
    held_out = (str(folders / "held-out.txt"),)
    text, config = (str(folders / "text.jsonl"),), replace(QUICK, dtype="bfloat16", tolerance=0.56, layers_at_once=2)
    seen: list[int] = []

    def track(total: int):
        seen.append(-total)
        return seen.append

    args = (folders / "dense", tmp_path / "narrow", tmp_path / "out", config)
    facts = distil_folder(*args, text=text, verify_text=held_out, track=track)
    assert sum(seen) == 0, "the bar ends where it was told to"
    assert facts["text"]["held_out"] == "verify_text"
    assert facts["sha256"].keys() == {"dense", "sparse", "text", "verify_text"}
    assert len({row["top_k"] for row in facts["layers"]}) > 1
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "moewright"
    assert load_model(tmp_path / "out").dtype == torch.bfloat16

    dense, sparse = load_model(folders / "dense"), load_model(tmp_path / "out", dtype=torch.float32)
    _, rows = read_rows(
        folders / "dense",
        config,
        vocabulary=dense.config.vocab_size,
        text=text,
        verify_text=held_out,
        cache_dir=tmp_path / "cache",
    )
    layers = moe_layers(sparse)
    again = measure_layers(Teacher(dense), layers, rows, batch_size=config.batch_size)
    for row in facts["layers"]:
        assert layers[row["layer"]].config.top_k == row["top_k"]
        assert list(again[row["layer"]].errors.values()) == row["errors_after" if row["trained"] else "errors_before"]


def test_nothing_is_left_when_it_is_interrupted_or_diverges(folders, tmp_path, monkeypatch):
    args, text = (folders / "dense", folders / "split", tmp_path / "out"), (str(folders / "text.jsonl"),)
    with pytest.raises(CheckpointError, match=r"lower the learning rate"):
        distil_folder(*args, replace(QUICK, learning_rate=1e30), text=text)
    assert not list(tmp_path.iterdir())

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(distil, "distil_layers", interrupted)
    with pytest.raises(KeyboardInterrupt):
        distil_folder(*args, QUICK, text=text)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tolerance": 0.0}, r"tolerance=0.0: it is a share"),
        ({"tolerance": 1.0}, r"tolerance=1.0: it is a share"),
        ({"tolerance": float("nan")}, r"tolerance=nan: it is a share"),
        ({"tokens": 63}, r"tokens=63: a step takes 64"),
        ({"held_out_tokens": 1}, r"held_out_tokens=1: it must be at least 2"),
        ({"top_k": 0}, r"top_k=0: it must be at least 1"),
        ({"layers_at_once": 0}, r"layers_at_once=0"),
        ({"batch_size": 0}, r"batch_size=0"),
        ({"sequence_length": 1}, r"sequence_length=1"),
        ({"seed": -1}, r"seed=-1"),
        ({"learning_rate": 0.0}, r"learning_rate=0.0: it must be a finite number, above 0"),
        ({"balance_loss": -1.0}, r"balance_loss=-1.0: it must be a finite number, 0 or more"),
        ({"z_loss": float("inf")}, r"z_loss=inf"),
        ({"dtype": "float16"}, r"dtype='float16': choose one of float32, bfloat16"),
        ({"device": "tpu"}, r"device='tpu': choose one of auto, cpu, cuda"),
    ],
)
def test_settings_that_make_no_sense(changes, message):
    with pytest.raises(UsageError, match=message):
        replace(QUICK, **changes)


@pytest.mark.parametrize(
    ("names", "changes", "error", "message"),
    [
        (("dense", "dense"), {}, ModelError, r"dense is a dense model \(llama\); give the dense model first"),
        (("split", "split"), {}, ModelError, r"split is a mixture of experts \(mixtral\); give the dense model first"),
        (("other", "split"), {}, ModelError, r"not upcycled from .*, or was trained since: .* has other values"),
        (("wider", "split"), {}, ModelError, r"not upcycled from .*: hidden_size is 32, not 48"),
        (("theta", "split"), {}, ModelError, r"not upcycled from .*: rope_parameters is"),
        (("dense", "trained"), {}, ModelError, r"or was trained since: model.layers.1.self_attn.q_proj.weight has oth"),
        (("t5", "t5-split"), {}, ModelError, r"distillation of an encoder-decoder \(t5\) is not supported"),
        (("dense", "split"), {"top_k": 5}, UsageError, r"top_k=5 > num_experts=4"),
        (("dense", "split"), {"sequence_length": 256, "tokens": 9999}, UsageError, r"=256: the model has 128 pos"),
        (("dense", "split"), {"batch_size": 200, "tokens": 9999}, DataError, r"the text has \d+ tokens, where a batch"),
        (("dense", "split"), {"held_out_tokens": 9999}, DataError, r"a batch and the held-out rows take \d+"),
        (("missing", "split"), {}, ModelError, r"missing"),
    ],
)  # fmt: skip
def test_what_does_not_belong_together_is_refused(folders, tmp_path, names, changes, error, message):
    made = {"other": {"seed": 1}, "wider": {"hidden_size": 48}, "theta": {"rope_theta": 999.0}}
    for name in names:
        path = folders / name
        if name in made and not path.exists():
            write_dense(path, num_hidden_layers=3, **made[name])
        if name == "trained" and not path.exists():
            model = load_model(folders / "split")
            with torch.no_grad():
                model.model.layers[1].self_attn.q_proj.weight[0, 0] += 0.5
            save_model(model, path, companions=folders / "split")
        if name == "t5-split" and not path.exists():
            write_dense(folders / "t5", "t5")
            upcycle_folder(folders / "t5", path, SPLIT)
    if names[0] == "theta":  # one setting that no tensor shows
        shutil.copytree(folders / "dense", folders / "theta", dirs_exist_ok=True)
        fields = json.loads((folders / "theta" / "config.json").read_text())
        fields["rope_parameters"]["rope_theta"] = 999.0
        (folders / "theta" / "config.json").write_text(json.dumps(fields))
    args = (folders / names[0], folders / names[1], tmp_path / "out")
    with pytest.raises(error, match=message):
        distil_folder(*args, replace(QUICK, **changes), text=[str(folders / "text.jsonl")])
    assert not list(tmp_path.iterdir())


def test_targets_and_texts_that_are_refused(folders, tmp_path):
    text = [str(folders / "text.jsonl")]

    def run(out: Path, **options):
        options = {"text": text} | options
        distil_folder(folders / "dense", folders / "split", out, QUICK, **options)

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(ModelError, match=r"exists and is not empty"):
        run(tmp_path / "full")
    with pytest.raises(ModelError, match=r"has no config.json, so it is no model folder"):
        run(tmp_path / "full", overwrite=True)
    for name in ("dense", "split"):
        with pytest.raises(ModelError, match=rf"would overwrite or mix with its source .*{name}"):
            run(folders / name, overwrite=True)
    with pytest.raises(UsageError, match=r"text.jsonl is in both `text` and `verify_text`"):
        run(tmp_path / "out", verify_text=text)
    with pytest.raises(DataError, match=r"there is no such file"):
        run(tmp_path / "out", text=[str(tmp_path / "none.txt")])
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--tolerance", "2"], 2, "--tolerance 2.0: it is a share of the dense output's variance"),
        (["--held-out-tokens", "99999"], 3, "the text has"),
        (["--learning-rate", "1e30"], 4, "layer 0: "),
        (["--tolerence", "1"], 2, "unknown argument '--tolerence' (did you mean --tolerance?)"),
    ],
)
def test_the_command_ends_with_the_code_of_what_went_wrong(folders, tmp_path, capsys, more, code, message):
    assert cli.main(command(folders, tmp_path / "out", *more)) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"moewright: error: {message}")
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()
