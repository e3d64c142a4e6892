"""The eleven defects of Megatron-LM's upcycling (commit d98e8a64, core 0.20.0), each by the behaviour that ours has."""

import json
import subprocess
import sys

import pytest
import torch

from moewright import cli
from moewright.backbone.blocks import moe_layers
from moewright.backbone.load import load_model
from moewright.checkpoint.read import ModelFolder
from moewright.convert.make import lazy_tensors, make_model
from moewright.errors import ModelError, UsageError
from moewright.train.loop import train
from moewright.upcycle.apply import upcycle_folder, upcycling_of
from moewright.upcycle.config import UpcycleConfig
from tests.models import logits_of, plain_transformers, relative, write_dense
from tests.runs import make_run, metrics

IDS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))


pytestmark = pytest.mark.usefixtures("one_thread")


def difference(source, sparse) -> float:
    """Of the logits of two folders, or of a folder and a model."""
    sparse = sparse if isinstance(sparse, torch.nn.Module) else plain_transformers(sparse)
    return relative(logits_of(sparse, IDS), logits_of(plain_transformers(source), IDS))


def live(source, **settings):
    return make_model(upcycling_of(source, UpcycleConfig(**settings), dtype=torch.float32))[0]


def test_defect_1_the_command_line_works_from_end_to_end(tmp_path, capsys):
    source, target = write_dense(tmp_path / "dense"), tmp_path / "moe"
    line = ["upcycle", str(source), str(target), "--experts", "8", "--granularity", "2", "--top-k", "2", "--json"]
    assert cli.main(line) == 0
    assert json.loads(capsys.readouterr().out)["written"]
    assert difference(source, target) <= 1e-5


def test_defect_2_dense_and_sparse_layers_mix(tmp_path):
    source = write_dense(tmp_path / "dense", num_hidden_layers=3)
    for layers, sparse in (("1", [1]), ("0,2", [0, 2]), ("every:3", [2])):
        upcycle_folder(source, tmp_path / layers, UpcycleConfig(experts=4, top_k=2, layers=layers))
        assert sorted(moe_layers(load_model(tmp_path / layers))) == sparse
        assert difference(source, tmp_path / layers) <= 1e-5


@pytest.mark.filterwarnings("ignore:top_k=1 with router_order")
def test_defect_3_gate_and_up_are_cut_apart_whatever_the_activation(tmp_path):
    for activation in ("silu", "gelu_pytorch_tanh"):
        source = write_dense(tmp_path / activation, hidden_act=activation)
        for granularity in (1, 2, 8):
            settings = {"experts": 2 * granularity, "granularity": granularity, "top_k": granularity}
            assert difference(source, live(source, **settings, router_order="topk-softmax")) <= 1e-5


def test_defect_4_any_part_of_the_model_converts_alone_and_in_any_order(tmp_path):
    # There a pipeline stage got the layers of another. Here nothing depends on what else is made, or before.
    source = write_dense(tmp_path / "dense", num_hidden_layers=4)
    config = UpcycleConfig(experts=4, granularity=2, top_k=2, neurons="shuffled", redraw=0.5, noise=0.1)
    whole = {name: list(lazy.make()) for name, lazy in lazy_tensors(upcycling_of(source, config)).items()}
    for stages in (1, 2, 4):
        for stage in reversed(range(stages)):
            alone = lazy_tensors(upcycling_of(source, config))
            mine = [name for name in alone if f".layers.{stage}." in name]
            for name in reversed(mine):
                for found, expected in zip(alone[name].make(), whole[name], strict=True):
                    assert torch.equal(found, expected), name
            assert len(mine) == 2 + 4 + 1 + 3 * 4


def test_defect_5_the_output_bias_follows_the_sum_of_the_weights(tmp_path):
    for family in ("gpt_neox", "m2m_100"):
        source = write_dense(tmp_path / family, family)
        exact = live(source, experts=8, granularity=2, top_k=4)
        assert difference(source, exact) <= 1e-5
        # With an undecided router s is K / N of every token, and 1 / s is due on the bias.
        settings = {"experts": 8, "granularity": 2, "top_k": 4, "router_order": "softmax-topk", "router_std": 1e-7}
        first = live(source, **settings)
        assert difference(source, first) <= 1e-5
        for layer, moe in moe_layers(first).items():
            bias = moe_layers(exact)[layer].experts.down_proj_bias
            torch.testing.assert_close(moe.experts.down_proj_bias, 2 * bias, rtol=1e-5, atol=1e-6)


def test_defect_6_what_the_scale_does_not_know_is_handled_or_refused(tmp_path):
    source = write_dense(tmp_path / "dense")
    for mode in ("added", "gated", "residual"):  # shared experts are reckoned with
        shared = live(source, experts=8, granularity=2, top_k=2, shared_size=16, shared_mode=mode, neurons="shuffled")
        assert difference(source, shared) <= 1e-5
    biased = write_dense(tmp_path / "biased", mlp_bias=True)  # and so are biases of gate, up and down
    assert difference(biased, live(biased, experts=8, granularity=2, top_k=2)) <= 1e-5
    upcycle_folder(source, tmp_path / "moe", UpcycleConfig(experts=4, top_k=2))
    with pytest.raises(ModelError, match="already a mixture of experts"):  # sigmoid scores or not
        live(tmp_path / "moe", experts=4, top_k=2)


def test_defect_7_experts_a_token_are_whole_groups():
    with pytest.raises(UsageError, match=r"top_k=3 is not a multiple of granularity=2.*use 2, 4, 6, 8"):
        UpcycleConfig(experts=8, granularity=2, top_k=3)


def test_defect_8_exact_is_exact_and_what_is_not_says_by_how_much(tmp_path):
    source = write_dense(tmp_path / "dense")
    (tmp_path / "text.txt").write_text("def add(a, b):\n    return a + b\n" * 8)
    errors = {}
    for scale in ("exact", "uniform"):
        config = UpcycleConfig(experts=8, granularity=4, top_k=4, scale=scale)
        report = upcycle_folder(source, tmp_path / scale, config, verify_text=tmp_path / "text.txt")
        errors[scale] = report.comparisons[0].relative_logit_difference
        written = json.loads((tmp_path / scale / "moewright.json").read_text())["upcycle"]
        assert written["verification"][0]["relative_logit_difference"] == errors[scale]
        assert all((row["output_error"] <= 1e-6) == (scale == "exact") for row in written["layers"])
    assert errors["exact"] <= 1e-6
    assert errors["uniform"] > 0.05  # the cube root on all three projections


def test_defect_9_dense_and_sparse_are_never_in_memory_together(tmp_path):
    # 8 layers of 3 x 4 MB: the writer may hold a block (12 MB) and a piece, far less than the model.
    source = write_dense(tmp_path / "dense", hidden_size=256, intermediate_size=4096, num_hidden_layers=8)
    script = (
        "import resource, sys\n"
        "from moewright.upcycle.apply import upcycle_folder\n"
        "from moewright.upcycle.config import UpcycleConfig\n"
        "config = UpcycleConfig(experts=8, granularity=2, top_k=2)\n"
        "upcycle_folder(sys.argv[1], sys.argv[2], config, dry_run=True)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "upcycle_folder(sys.argv[1], sys.argv[2], config)\n"
        "print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))\n"
    )
    command = [sys.executable, "-c", script, str(source), str(tmp_path / "moe")]
    used = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert (tmp_path / "moe" / "model.safetensors").stat().st_size > 400e6
    assert used < 100e6


def test_defect_10_every_change_is_an_option_with_a_seed(tmp_path):
    source = write_dense(tmp_path / "dense")
    for name, change in {
        "noise": {"noise": 0.1},
        "redraw": {"redraw": 0.5},
        "permute": {"permute": True},
        "shuffled": {"neurons": "shuffled"},
    }.items():
        settings = {"experts": 4, "granularity": 2, "top_k": 2} | change
        written = {}
        for run, seed in (("a", 0), ("b", 0), ("c", 1)):
            target = tmp_path / f"{name}-{run}"
            foretold = upcycle_folder(source, target, UpcycleConfig(**settings, seed=seed), dry_run=True)
            assert not target.exists()
            upcycle_folder(source, target, UpcycleConfig(**settings, seed=seed))
            assert foretold.summary["bytes"] == sum(i.end - i.start for i in ModelFolder(target).tensors.values())
            written[run] = {path.name: path.read_bytes() for path in target.iterdir()}
        assert written["a"] == written["b"]
        assert written["a"]["model.safetensors"] != written["c"]["model.safetensors"]


def test_defect_11_both_orders_start_right_and_train(tmp_path):
    for order, tolerance in (("topk-softmax", 1e-5), ("softmax-topk", 0.05)):
        config = UpcycleConfig(experts=8, granularity=2, top_k=4, router_order=order)
        run = make_run(tmp_path, out=order, upcycle=config, steps=20, learning_rate=3e-3)
        assert difference(run.model, make_model(upcycling_of(run.model, config, dtype=torch.float32))[0]) <= tolerance
        train(run)
        losses = [line["loss"] for line in metrics(run)]
        assert sum(losses[-5:]) < sum(losses[:5]) - 0.5
