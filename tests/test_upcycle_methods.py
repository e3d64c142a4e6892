"""Every method of upcycling on whole models: a folder, a live model and a second run agree; held against slow rules."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from moewright import cli
from moewright.backbone.blocks import moe_layers
from moewright.backbone.load import fill, load_model
from moewright.backbone.slots import Box
from moewright.checkpoint.files import record_of
from moewright.checkpoint.read import ModelFolder
from moewright.convert.make import make_model
from moewright.data.tokenizer import tokenise
from moewright.errors import CheckpointError, DataError, ModelError, UsageError
from moewright.family.table import family_of
from moewright.train.loop import train
from moewright.train.run_file import load_run
from moewright.upcycle import observe as observe_module
from moewright.upcycle.apply import file_digests, upcycle_folder, upcycling_of
from moewright.upcycle.config import UpcycleConfig
from moewright.upcycle.measure import measure
from moewright.upcycle.methods import expert_part
from moewright.upcycle.observe import Wanted, observe, read_prompts
from moewright.upcycle.plan import UpcyclePlan
from moewright.upcycle.tensors import SparseTensors
from tests.models import logits_of, relative, write_dense
from tests.runs import make_run
from tests.upcycling import complete

IDS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))
TEXT = "".join(f"def f{i}(a, b):\n    return a * {i} + b\n\n" for i in range(20))
PROMPTS = [["def f(x):\n    return x", "import os"], ["Once upon a time", "The king was OLD!"]]
FAMILIES = ("llama", "gpt_neox", "m2m_100", "phi3")

FINE = {"experts": 8, "granularity": 4, "top_k": 4}
HALF = {"experts": 4, "top_k": 2, "split": True}
SHARED = FINE | {"shared_size": 32}
EXACT: dict[str, dict[str, Any]] = {
    "shuffled": FINE | {"neurons": "shuffled"},
    "permuted": FINE | {"permute": True},
    "round-robin": FINE | {"neurons": "round-robin"},
    "clustered by weights": FINE | {"neurons": "clustered"},
    "clustered by activations": FINE | {"neurons": "clustered", "calibration_text": "text.txt"},
    "orthogonal": FINE | {"router_start": "orthogonal"},
    "zeros": {"experts": 4, "top_k": 2, "router_start": "zeros"},
    "centroids": FINE | {"router_start": "centroids", "calibration_text": "text.txt"},
    "prompts": FINE | {"router_start": "prompts", "prompts": "prompts.json"},
    "shared": SHARED | {"neurons": "shuffled"},
    "shared, gated, important": SHARED
    | {"shared_mode": "gated", "shared_neurons": "important", "calibration_text": "text.txt"},
    "shared, residual": SHARED | {"shared_mode": "residual"},
    "shared, new": SHARED | {"shared_neurons": "new"},
    "shared, new, gated": SHARED | {"shared_neurons": "new", "shared_mode": "gated"},
}
OTHERS: dict[str, dict[str, Any]] = {
    "noise": FINE | {"noise": 0.1},
    "redraw": FINE | {"redraw": 0.5},
    "redraw, separate": {"experts": 4, "top_k": 2, "redraw": 0.5, "redraw_sets": "separate", "noise": 0.01},
    "split": HALF | {"neurons": "round-robin"},
    "split, softmax first": HALF | {"neurons": "shuffled", "router_order": "softmax-topk"},
    "split, important": HALF | {"neurons": "important", "common_neurons": 8, "calibration_text": "text.txt"},
    "centroids, softmax first": FINE
    | {"router_start": "centroids", "router_order": "softmax-topk", "calibration_text": "text.txt"},
    "siblings": {"experts": 4, "granularity": 2, "top_k": 2, "siblings": ("sibling",)},
    "siblings, shared": {"experts": 4, "top_k": 2, "siblings": ("sibling",), "shared_size": 16, "shared_mode": "gated"},
}
# All methods for one family, and for the other forms of blocks those that treat parts apart.
PAIRS = [("llama", method) for method in EXACT | OTHERS]
PAIRS += [
    (family, method)
    for family in FAMILIES[1:]
    for method in ("clustered by activations", "shared, gated, important", "redraw", "split, important", "siblings")
]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with a dense model, its sibling, a text and prompts, for each family, written once."""
    places: dict[str, Path] = {}

    def place(family: str) -> Path:
        if family not in places:
            path = places[family] = tmp_path_factory.mktemp(family)
            write_dense(path / "dense", family)
            write_dense(path / "sibling", family, seed=1)
            (path / "text.txt").write_text(TEXT)
            (path / "prompts.json").write_text(json.dumps(PROMPTS))
        return places[family]

    return place


def config_in(place: Path, settings: dict[str, Any]) -> UpcycleConfig:
    """The settings with their files in a folder."""
    paths = {name: str(place / settings[name]) for name in ("calibration_text", "prompts") if name in settings}
    if "siblings" in settings:
        paths["siblings"] = tuple(str(place / name) for name in settings["siblings"])
    return UpcycleConfig(**settings | paths)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(("family", "method"), PAIRS)
def test_folder_live_model_and_second_run_agree(made, tmp_path, family, method):
    place = made(family)
    config = config_in(place, (EXACT | OTHERS)[method])
    for name in ("a", "b"):
        upcycle_folder(place / "dense", tmp_path / name, config)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    ModelFolder(tmp_path / "a").verify_checksums()  # which read every byte: leaves with one key hold the same
    stored = load_model(tmp_path / "a")
    live, _ = make_model(upcycling_of(place / "dense", config, dtype=torch.float32))
    weights = dict(live.named_parameters())
    assert list(weights) == [name for name, _ in stored.named_parameters()]
    for name, parameter in stored.named_parameters():
        assert torch.equal(weights[name], parameter), name
        assert parameter.isfinite().all()
    found, dense = logits_of(stored, IDS), logits_of(load_model(place / "dense"), IDS)
    if method in EXACT:
        assert config.resolved_scale() == "exact"
        assert relative(found, dense) <= 1e-5
    else:
        assert config.resolved_scale() in ("full", "calibrated")
        assert relative(found, dense) > 1e-4


@pytest.mark.parametrize("method", ["shared, gated, important", "split, important", "siblings, shared"])
def test_plain_transformers_loads_it(made, tmp_path, method):
    place = made("llama")
    upcycle_folder(place / "dense", tmp_path / "moe", config_in(place, (EXACT | OTHERS)[method]))
    plain, report = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert relative(logits_of(plain.eval(), IDS), logits_of(load_model(tmp_path / "moe"), IDS)) <= 1e-5


# -- a part of a tensor --


PARTS: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "one expert a tensor": ("llama", "mixtral", FINE | {"redraw": 0.5}),
    "stacks of our own type": ("llama", "moewright", FINE | {"noise": 0.1, "shared_size": 32, "shared_mode": "gated"}),
    "stacks of a twin": ("granite", "granitemoe", {"experts": 4, "top_k": 2, "permute": True}),
    "stacked biases": ("m2m_100", "moewright", {"experts": 4, "top_k": 2, "neurons": "shuffled"}),
    "siblings": ("llama", "moewright", OTHERS["siblings"]),
}


def planned(place: Path, case: str) -> tuple[UpcyclePlan, SparseTensors]:
    _, wanted, settings = PARTS[case]
    plan = UpcyclePlan(ModelFolder(place / "dense"), config_in(place, settings), format=wanted)
    return plan, SparseTensors(plan, measure(plan))


@pytest.mark.parametrize("case", PARTS)
def test_the_parts_of_a_tensor_are_the_whole(made, case):
    plan, tensors = planned(made(PARTS[case][0]), case)
    for slot in plan.format.slots(plan.model):
        whole = tensors.read(slot)
        assert torch.equal(torch.cat([piece.flatten() for piece in tensors.pieces(slot)]), whole.flatten())
        for dim, size in enumerate(slot.shape):
            parts = [slice(0, size // 2), slice(size // 2, size)]
            halves = [tensors.read(slot, (slice(None),) * dim + (part,)) for part in parts]
            assert torch.equal(torch.cat(halves, dim=dim), whole), (slot.name, dim)
        if len(slot.shape) == 3:
            assert torch.equal(tensors.read(slot, (slice(1, 3), slice(2, 5), slice(0, 7))), whole[1:3, 2:5, 0:7])


@pytest.mark.parametrize("case", PARTS)
def test_each_of_two_ranks_makes_its_own_experts_alone(made, monkeypatch, case):
    place, numbers = made(PARTS[case][0]), []

    def recorded(*args: Any, expert: int, **rest: Any) -> torch.Tensor:
        numbers.append(expert)
        return expert_part(*args, expert=expert, **rest)

    monkeypatch.setattr("moewright.upcycle.tensors.expert_part", recorded)
    plan, tensors = planned(place, case)
    fill(plan.model, plan.format, tensors)
    experts = plan.config.experts
    assert set(numbers) >= set(range(experts))
    for rank in (0, 1):
        mine = range(rank * experts // 2, (rank + 1) * experts // 2)

        numbers.clear()
        here, tensors = planned(place, case)
        divided = {id(p) for name, p in here.model.named_parameters() if ".experts." in name}

        def boxes_of(meta: torch.Tensor, mine: range = mine, divided: set[int] = divided) -> list[Box]:
            first = slice(mine.start, mine.stop) if id(meta) in divided else slice(0, len(meta))
            others = [slice(0, size) for size in meta.shape[1:]]
            return [Box((first, *others), (slice(0, first.stop - first.start), *others))]

        fill(here.model, here.format, tensors, boxes_of=boxes_of)
        assert {number for number in numbers if number >= 0} == set(mine)
        whole = dict(plan.model.named_parameters())
        for name, parameter in here.model.named_parameters():
            part = whole[name][mine.start : mine.stop] if ".experts." in name else whole[name]
            assert torch.equal(parameter, part), name


# -- what is in the tensors --


def dense_parts(folder: Path, layer: int) -> dict[str, torch.Tensor]:
    """The parts of a layer's block, written down by hand for the families tested."""
    source = ModelFolder(folder)
    kind = source.config["model_type"]
    if kind == "llama":
        names = {part: f"model.layers.{layer}.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
    elif kind == "phi3":
        both = source.read(f"model.layers.{layer}.mlp.gate_up_proj.weight")
        down = source.read(f"model.layers.{layer}.mlp.down_proj.weight")
        return {"gate": both[:64], "up": both[64:], "down": down}
    elif kind == "gpt_neox":
        stem = f"gpt_neox.layers.{layer}.mlp.dense_"
        names = {"up": f"{stem}h_to_4h.weight", "up_bias": f"{stem}h_to_4h.bias"}
        names |= {"down": f"{stem}4h_to_h.weight", "down_bias": f"{stem}4h_to_h.bias"}
    else:
        stem = f"model.{'encoder' if layer < 2 else 'decoder'}.layers.{layer % 2}.fc"
        names = {"up": f"{stem}1.weight", "up_bias": f"{stem}1.bias"}
        names |= {"down": f"{stem}2.weight", "down_bias": f"{stem}2.bias"}
    return {part: source.read(name) for part, name in names.items()}


def rows_of(moe, expert: int, part: str) -> torch.Tensor:
    experts = moe.experts
    if part in ("down", "down_bias"):
        return experts.get_parameter("down_proj" + part.removeprefix("down"))[expert]
    bias = "_bias" if part.endswith("bias") else ""
    first = experts.get_parameter(experts.first_name + bias)[expert]
    if not experts.gated:
        return first
    half = len(first) // 2
    return first[:half] if part.startswith("gate") else first[half:]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["shuffled", "permuted", "clustered by activations", "split, important", "siblings"])
def test_experts_hold_the_neurons_of_the_table_and_their_factors(made, family, method):
    place = made(family)
    config = config_in(place, (EXACT | OTHERS)[method])
    upcycling = upcycling_of(place / "dense", config)
    model, _ = make_model(upcycling_of(place / "dense", config, dtype=torch.float32))
    gated = family in ("llama", "phi3")
    for layer, moe in moe_layers(model).items():
        table = upcycling.tensors.held(layer).routed_EF.tolist()
        for j, row in enumerate(table):
            owner = "dense"
            if method == "siblings":  # two experts, one virtual group, of each
                owner = "dense" if j < 2 else "sibling"
            dense = dense_parts(place / owner, layer)
            # topk-softmax: S = G, with which a split's neuron counts min(K, E / copies) times; up gets a power of two.
            # An activation that is no power takes all of S in down.
            times = [1.0] * len(row)
            total = {"split, important": 1.0, "siblings": 2.0}.get(method, 4.0)
            if method == "split, important":
                times = [1.0 if sum(neuron in other for other in table) == 4 else 2.0 for neuron in row]
                assert times.count(1.0) == 8
            up = 2.0 ** round(math.log2(total) / 2) if gated else 1.0 if family == "gpt_neox" else None
            if up is None:  # m2m_100: relu, degree 1
                up = 2.0 ** round(math.log2(total) / 2)
            for place_, neuron in enumerate(row):
                if gated:
                    assert torch.equal(rows_of(moe, j, "gate")[place_], dense["gate"][neuron])
                assert torch.equal(rows_of(moe, j, "up")[place_], dense["up"][neuron] * up)
                due = dense["down"][:, neuron] * (total / up * times[place_])
                assert torch.equal(rows_of(moe, j, "down")[:, place_], due)
                if "up_bias" in dense:
                    assert rows_of(moe, j, "up_bias")[place_] == dense["up_bias"][neuron] * up
            if "down_bias" in dense:
                assert torch.equal(rows_of(moe, j, "down_bias"), dense["down_bias"])
        if method not in ("split, important",):
            assert complete(upcycling.tensors.held(layer).routed_EF, granularity=config.granularity, width=64)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_a_shared_expert_holds_the_most_important_neurons(made, family):
    place = made(family)
    config = config_in(place, EXACT["shared, gated, important"])
    upcycling = upcycling_of(place / "dense", config)
    model, _ = make_model(upcycling_of(place / "dense", config, dtype=torch.float32))
    for layer, moe in moe_layers(model).items():
        dense, score = dense_parts(place / "dense", layer), upcycling.measured.importance[layer]
        best = sorted(sorted(range(64), key=lambda j: -score[j].item())[:32])
        first = moe.shared.get_submodule(moe.shared.first_name)
        if family == "llama":
            assert torch.equal(first.weight, torch.cat([dense["gate"][best], dense["up"][best]]))
        else:
            assert torch.equal(first.weight, dense["up"][best])
            assert torch.equal(first.bias, dense["up_bias"][best])
            # It is always on, so all of the bias is there, and the routed experts have none.
            assert torch.equal(moe.shared.down_proj.bias, 2 * dense["down_bias"])
            assert not moe.experts.down_proj_bias.any()
        assert torch.equal(moe.shared.down_proj.weight, 2 * dense["down"][:, best])  # sigmoid(0) = 1/2
        assert not moe.shared.gate.weight.any()
        assert sorted(best + upcycling.tensors.held(layer).routed_EF[:4].flatten().tolist()) == list(range(64))


def test_new_shared_neurons_say_nothing_and_can_learn(made):
    place = made("llama")
    model, _ = make_model(upcycling_of(place / "dense", config_in(place, EXACT["shared, new"]), dtype=torch.float32))
    for layer, moe in moe_layers(model).items():
        dense = dense_parts(place / "dense", layer)
        gate, up = moe.shared.gate_up_proj.weight.chunk(2)
        assert not moe.shared.down_proj.weight.any()
        for found, part in ((gate, "gate"), (up, "up")):
            assert found.std().item() == pytest.approx(dense[part].std().item(), rel=0.2)
        assert not torch.equal(gate, up)
    logits_of.__wrapped__(model, IDS).square().sum().backward()
    assert all(moe.shared.down_proj.weight.grad.abs().max() > 0 for moe in moe_layers(model).values())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["split", "split, softmax first", "split, important"])
def test_a_split_gives_each_chosen_part_in_full(made, family, method):
    """Token by token from the dense block: its chosen experts' neurons, each as often as the weights say."""
    place = made(family)
    config = config_in(place, OTHERS[method])
    upcycling = upcycling_of(place / "dense", config)
    model, _ = make_model(upcycling_of(place / "dense", config, dtype=torch.float32))
    act = {"llama": F.silu, "phi3": F.silu, "gpt_neox": F.gelu, "m2m_100": F.relu}[family]
    draws = torch.Generator().manual_seed(3)
    for layer, moe in moe_layers(model).items():
        dense = {part: tensor.double() for part, tensor in dense_parts(place / "dense", layer).items()}
        table, x = upcycling.tensors.held(layer).routed_EF.tolist(), torch.randn(5, 32, generator=draws)
        found, mean = moe(x).detach().double(), upcycling.measured.weight_sums.get(layer, 1.0)
        for token, output in zip(x.double(), found, strict=True):
            up = dense["up"] @ token + dense.get("up_bias", 0.0)
            hidden = act(dense["gate"] @ token) * up if "gate" in dense else act(up)
            logits = moe.router.weight.detach().double() @ token
            best = logits.argsort(descending=True)[:2].tolist()
            among = best if config.resolved_order() == "topk-softmax" else range(4)
            scores = {j: math.exp(logits[j]) / sum(math.exp(logits[i]) for i in among) for j in best}
            due = torch.zeros(32, dtype=torch.float64)
            for j, score in scores.items():
                for neuron in table[j]:
                    everywhere = all(neuron in row for row in table)
                    due += score / mean * (1 if everywhere else 2) * hidden[neuron] * dense["down"][:, neuron]
                due += score / mean * dense.get("down_bias", 0.0)
            torch.testing.assert_close(output, due, rtol=1e-5, atol=1e-5)


def test_branch_train_mix_is_means_and_whole_blocks(made):
    place = made("llama")
    settings = OTHERS["siblings, shared"] | {"layers": "0"}
    model, _ = make_model(upcycling_of(place / "dense", config_in(place, settings), dtype=torch.float32))
    folders = [ModelFolder(place / name) for name in ("dense", "sibling")]
    state = model.state_dict()

    def mean(name):
        a, b = (folder.read(name).double() for folder in folders)
        return ((a + b) / 2).float()

    averaged = [name for name in state if "mlp" not in name or ".layers.1." in name]
    assert len(averaged) == 2 + 2 * 6 + 3 + 1
    for name in averaged:
        assert torch.equal(state[name], mean(name)), name
    moe, stem = moe_layers(model)[0], "model.layers.0.mlp"
    for j in range(4):
        down = folders[j % 2].read(f"{stem}.down_proj.weight")
        assert torch.equal(moe.experts.down_proj[j], down[:, 16:])
    shared = torch.cat([mean(f"{stem}.{part}_proj.weight")[:16] for part in ("gate", "up")])
    assert torch.equal(moe.shared.gate_up_proj.weight, shared)


# -- what is observed --


@pytest.mark.parametrize("family", FAMILIES)
def test_importance_and_activations_are_those_of_the_dense_model(made, family, monkeypatch):
    place = made(family)
    monkeypatch.setattr(observe_module, "WINDOW", 50)
    monkeypatch.setattr(observe_module, "SAMPLED_TOKENS", 30)
    texts = [IDS.flatten()[:30], torch.randint(0, 256, (90,), generator=torch.Generator().manual_seed(1))]
    model = load_model(place / "dense")
    layers = range(len(family_of(model.config).places(model.config)))
    found = observe(model, layers, texts, wanted=Wanted(inputs=True, hidden=True, importance=True, seed=5))
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())

    slow = load_model(place / "dense")
    gated, due = family in ("llama", "phi3"), {layer: torch.zeros(64, dtype=torch.float64) for layer in layers}
    inputs: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}
    hidden: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}
    modules = {
        "llama": lambda n: ([slow.model.layers[n].mlp.gate_proj, slow.model.layers[n].mlp.up_proj],
                            slow.model.layers[n].mlp.down_proj),
        "phi3": lambda n: ([slow.model.layers[n].mlp.gate_up_proj], slow.model.layers[n].mlp.down_proj),
        "gpt_neox": lambda n: ([slow.gpt_neox.layers[n].mlp.dense_h_to_4h], slow.gpt_neox.layers[n].mlp.dense_4h_to_h),
        "m2m_100": lambda n: (
            [(slow.model.encoder if n < 2 else slow.model.decoder).layers[n % 2].fc1],
            (slow.model.encoder if n < 2 else slow.model.decoder).layers[n % 2].fc2,
        ),
    }  # fmt: skip
    for layer in layers:
        firsts, down = modules[family](layer)
        firsts[0].register_forward_pre_hook(lambda m, args, layer=layer: inputs[layer].append(args[0].view(-1, 32)))
        down.register_forward_pre_hook(lambda m, args, layer=layer: hidden[layer].append(args[0].view(-1, 64)))
    for window in (texts[0], texts[1][:50], texts[1][50:]):
        slow.zero_grad()
        logits = logits_of.__wrapped__(slow, window[None])[0]
        F.cross_entropy(logits[:-1], window[1:]).backward()
        for layer in layers:
            firsts, down = modules[family](layer)
            score = (down.weight * down.weight.grad).sum(dim=0).double()
            for first in firsts:
                own = (first.weight * first.weight.grad).sum(dim=1).double()
                if not gated:
                    own += (first.bias * first.bias.grad).double()
                score += own.view(-1, 64).sum(dim=0)  # the two halves of a fused projection
            due[layer] += score.abs()
    last = torch.cat(inputs[layers[-1]]).detach()  # where no two tokens are alike
    assert len(last) == 120
    chosen = [int((last - row).abs().sum(dim=1).argmin()) for row in found.inputs[layers[-1]]]
    assert chosen == sorted(set(chosen))
    assert len(chosen) == 30
    for layer in layers:
        torch.testing.assert_close(found.importance[layer], due[layer].detach(), rtol=1e-3, atol=1e-6)
        all_x, all_h = torch.cat(inputs[layer]).detach(), torch.cat(hidden[layer]).detach()
        torch.testing.assert_close(found.inputs[layer], all_x[chosen], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.hidden[layer].float(), all_h[chosen], rtol=1e-2, atol=1e-2)


def test_calibration_of_centroids_is_on_the_tokens_that_made_them(made):
    place = made("llama")
    config = config_in(place, OTHERS["centroids, softmax first"])
    upcycling = upcycling_of(place / "dense", config)
    text = tokenise(place / "dense", [place / "text.txt"], vocabulary=264)
    seen = observe(load_model(place / "dense"), range(2), text, wanted=Wanted(inputs=True, seed=config.seed))
    for layer, x in seen.inputs.items():
        logits = x @ upcycling.tensors.router(layer).T
        sums = logits.softmax(dim=1).topk(4).values.sum(dim=1)
        assert upcycling.measured.weight_sums[layer] == pytest.approx(sums.mean().item(), rel=1e-5)
        groups = logits[:, ::4]
        assert groups.var(dim=1).mean().sqrt().item() == pytest.approx(0.05, rel=1e-3)


def test_prompts_bring_tokens_like_theirs_to_their_group(made):
    place = made("llama")
    config = config_in(place, EXACT["prompts"] | {"router_logit_std": 0.7})
    upcycling = upcycling_of(place / "dense", config)
    model = load_model(place / "dense")
    inputs: dict[int, torch.Tensor] = {}
    for layer, block in enumerate(model.model.layers):
        block.mlp.register_forward_pre_hook(lambda m, args, layer=layer: inputs.update({layer: args[0][0]}))
    means: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    for group in PROMPTS:
        states: dict[int, list[torch.Tensor]] = {0: [], 1: []}
        for prompt in group:
            logits_of(model, torch.tensor([list(prompt.encode())]).apply_(byte_id))
            for layer, x in inputs.items():
                states[layer].append(x.mean(dim=0))
        for layer, found in states.items():
            means[layer].append(torch.stack(found).mean(dim=0))
    for layer in (0, 1):
        router = upcycling.tensors.router(layer)
        for group in (0, 1):
            assert (router[::4] @ means[layer][group]).argmax() == group


def byte_id(byte: int) -> int:
    """The id that the tests' tokenizer has for a byte: printable characters come first."""
    return tokens_of_bytes()[byte]


def tokens_of_bytes() -> dict[int, int]:
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return {ord(c): i for i, c in enumerate(alphabet) if ord(c) < 128} | {ord(" "): alphabet.index("Ġ"),
                                                                         ord("\n"): alphabet.index("Ċ")}  # fmt: skip


# -- through the command line, and from run files --

FINE_OPTIONS = "--experts 8 --granularity 4 --top-k 4 "
HALF_OPTIONS = "--experts 4 --top-k 2 --split "
CLI: dict[str, tuple[dict[str, Any], str]] = {
    "siblings": (OTHERS["siblings"], "--experts 4 --granularity 2 --top-k 2 --siblings {place}/sibling"),
    "prompts": (EXACT["prompts"], FINE_OPTIONS + "--router-start prompts --prompts {place}/prompts.json"),
    "clustered": (
        EXACT["clustered by activations"],
        FINE_OPTIONS + "--neurons clustered --calibration-text {place}/text.txt",
    ),
    "redraw": (OTHERS["redraw, separate"], "--experts 4 --top-k 2 --redraw 0.5 --redraw-sets separate --noise 0.01"),
    "split": (
        OTHERS["split, important"],
        HALF_OPTIONS + "--neurons important --common-neurons 8 --calibration-text {place}/text.txt",
    ),
    "shared": (EXACT["shared, residual"], FINE_OPTIONS + "--shared-size 32 --shared-mode residual"),
}


@pytest.mark.parametrize("method", CLI)
def test_through_the_command_line(made, tmp_path, capsys, method):
    place, (settings, options) = made("llama"), CLI[method]
    line = ["upcycle", str(place / "dense"), str(tmp_path / "cli"), "--verify-text", str(place / "text.txt"), "--json"]
    dry = [*line[:3], "--dry-run", "--json", *options.format(place=place).split()]
    assert cli.main(dry) == 0
    foretold = json.loads(capsys.readouterr().out)
    assert not (tmp_path / "cli").exists()
    assert cli.main([*line, *options.format(place=place).split()]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["bytes"] == foretold["bytes"]
    assert facts["parameters"] == foretold["parameters"]
    assert all(0 <= row["output_error"] < 2 for row in facts["layers"])
    upcycle_folder(place / "dense", tmp_path / "lib", config_in(place, settings), verify_text=place / "text.txt")
    assert contents(tmp_path / "cli") == contents(tmp_path / "lib")
    record = json.loads((tmp_path / "cli" / "moewright.json").read_text())["upcycle"]
    assert str(place) not in json.dumps(record)
    source = record["source"]
    assert source["sha256"] == ModelFolder(place / "dense").fingerprint()
    if method == "siblings":
        assert source["siblings"] == [ModelFolder(place / "sibling").fingerprint()]
    if method == "prompts":
        assert source["prompts"] == record_of(place / "prompts.json")["sha256"]
    assert ("calibration_text" in source) == (method in ("clustered", "split"))


def test_a_run_file_has_every_setting(made, tmp_path):
    place = made("llama")
    settings = {
        **{"experts": 8, "granularity": 2, "top_k": 2, "neurons": "clustered", "permute": True, "noise": 0.1},
        **{"redraw": 0.25, "redraw_sets": "separate", "router_start": "centroids", "router_logit_std": 0.3},
        **{"shared_size": 16, "shared_mode": "gated", "shared_neurons": "important", "scale": "full"},
        **{"siblings": ["sibling"], "calibration_text": "text.txt"},
    }
    lines = [f"{name} = {json.dumps(value)}" for name, value in settings.items()]
    head = 'model = "m"\nout = "o"\n[data]\nfiles = ["f"]\nsequence_length = 8\n[train]\nbatch_size = 1\nsteps = 1\n'
    (tmp_path / "run.toml").write_text(head + "[upcycle]\n" + "\n".join(lines))
    config = load_run(tmp_path / "run.toml").upcycle
    assert config == UpcycleConfig(**settings | {"siblings": ("sibling",)})
    with pytest.raises(UsageError, match=r"--upcycle\.neurons best: choose one of contiguous"):
        load_run(tmp_path / "run.toml", ["--upcycle.neurons", "best"])
    run = make_run(tmp_path / "run", upcycle=config_in(place, settings), steps=2)
    train(run)
    record = json.loads((Path(run.out) / "final" / "moewright.json").read_text())["upcycle"]
    assert record["settings"]["redraw"] == 0.25
    assert record["source"]["siblings"] == [ModelFolder(place / "sibling").fingerprint()]


def test_a_run_is_told_by_what_upcycling_read_not_by_where_it_lay(tmp_path):
    write_dense(tmp_path / "sibling", seed=1)
    text, moved = tmp_path / "text.txt", tmp_path / "moved.txt"
    text.write_text(TEXT)
    settings = {"experts": 4, "top_k": 2, "router_order": "softmax-topk"}
    siblings = (str(tmp_path / "sibling"),)
    run = make_run(
        tmp_path,
        upcycle=UpcycleConfig(**settings, scale="calibrated", calibration_text=str(text), siblings=siblings),
        steps=2,
    )
    finished = train(run)
    text.rename(moved)
    again = replace(run, upcycle=replace(run.upcycle, calibration_text=str(moved)))
    assert train(again).losses == finished.losses
    moved.write_text(TEXT + "more")
    with pytest.raises(CheckpointError, match=r"other settings: upcycle\.calibration_text \(other content\);"):
        train(again)
    moved.write_text(TEXT)
    other = replace(again, upcycle=replace(again.upcycle, siblings=(run.model,)))
    with pytest.raises(CheckpointError, match=r"other settings: upcycle\.siblings \(other content\);"):
        train(other)


# -- refused and ignored --


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"neurons": "best"}, "neurons='best': choose one of contiguous, shuffled, round-robin, clustered, important"),
        ({"neurons": "important"}, "neurons=important without split"),
        ({"router_start": "random"}, "choose one of normal, zeros, orthogonal, centroids, prompts"),
        ({"granularity": 2, "router_start": "zeros"}, "router_start=zeros with granularity=2: all experts tie"),
        ({"split": True, "router_start": "zeros"}, "router_start=zeros with granularity=4"),
        ({"router_start": "prompts"}, "router_start=prompts without prompts: name a JSON file with 4 lists"),
        ({"granularity": 4, "top_k": 4, "router_start": "centroids"}, "centroids with 1 virtual group"),
        ({"router_logit_std": 0.0}, "router_logit_std=0.0"),
        ({"noise": -1.0}, "noise=-1.0"),
        ({"redraw": 1.5}, "redraw=1.5"),
        ({"redraw_sets": "own"}, "choose one of shared, separate"),
        ({"shared_size": -1}, "shared_size=-1"),
        ({"common_neurons": -1}, "common_neurons=-1"),
        ({"shared_mode": "both"}, "choose one of added, gated, residual"),
        ({"shared_neurons": "last"}, "choose one of first, important, new"),
        ({"split": True, "granularity": 2}, "granularity=2 with split: the block is cut into experts=4 parts"),
        ({"split": True, "top_k": 4}, "top_k=4 with split: every token would get all parts"),
        ({"split": True, "top_k": 5}, "top_k=5 > experts=4"),
        ({"split": True, "scale": "uniform"}, "scale=uniform with split"),
        ({"split": True, "scale": "exact"}, "scale=exact with split: a token gets 2 of 4 parts.*use scale=full"),
        ({"noise": 0.1, "scale": "exact"}, "scale=exact with noise=0.1: experts compute something else"),
        ({"redraw": 0.1, "scale": "exact"}, "scale=exact with redraw=0.1"),
        ({"siblings": ("b",), "scale": "exact"}, "scale=exact with siblings"),
        ({"noise": 0.1, "scale": "calibrated"}, "need no calibration; use scale=full"),
        ({"router_order": "softmax-topk", "scale": "full"}, "scale=full with router_order=softmax-topk"),
        ({"siblings": ("b", "c")}, "experts=4 with granularity=1 and 3 siblings"),
        ({"split": True, "siblings": ("b",)}, "2 siblings: .* multiple of 8"),
    ],
)
def test_senseless_methods_are_refused(changes, words):
    with pytest.raises(UsageError, match=words):
        UpcycleConfig(**({"experts": 4, "top_k": 2} | changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"redraw_sets": "separate"}, "redraw_sets=separate is ignored: redraw is 0"),
        ({"common_neurons": 3}, "common_neurons=3 is ignored: neurons is contiguous"),
        ({"router_std": 0.1, "router_start": "zeros"}, "router_std=0.1 is ignored: router_start is zeros"),
        ({"router_logit_std": 0.1}, "router_logit_std=0.1 is ignored: router_start is normal"),
        ({"prompts": "prompts.json"}, "prompts=.* is ignored: router_start is normal"),
        ({"shared_mode": "gated"}, "shared_mode=gated is ignored: shared_size is 0"),
        ({"shared_neurons": "new"}, "shared_neurons=new is ignored: shared_size is 0"),
        ({"calibration_text": "text.txt"}, "calibration_text is ignored: scale=exact"),
    ],
)
def test_ignored_settings_are_named(made, changes, words):
    place = made("llama")
    with pytest.warns(UserWarning, match=words):
        upcycling = upcycling_of(place / "dense", config_in(place, {"experts": 4, "top_k": 2} | changes))
    assert {moe.shared_size for moe in upcycling.plan.layers.values()} == {0}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (HALF | {"neurons": "important"}, "neurons=important is measured on text: give a calibration_text"),
        (SHARED | {"shared_neurons": "important"}, "shared_neurons=important is measured on text"),
        (FINE | {"router_start": "centroids"}, "router_start=centroids is measured on text"),
        (FINE | {"shared_size": 64}, "shared_size=64: a shared expert carved from a width of 64 takes 1 to 63"),
        (FINE | {"shared_size": 7}, "granularity=4 does not divide the 57 neurons that a shared expert of 7 leaves"),
        (HALF | {"neurons": "important", "common_neurons": 17, "calibration_text": "text.txt"}, "holds 0 to 16"),
    ],
)
def test_what_the_model_does_not_fit_is_refused(made, tmp_path, settings, words):
    place = made("llama")
    with pytest.raises(UsageError, match=words):
        upcycle_folder(place / "dense", tmp_path / "moe", config_in(place, settings))
    assert list(tmp_path.iterdir()) == []


def test_text_that_holds_too_little_is_refused(made):
    place = made("llama")
    split, centroids = HALF | {"neurons": "important"}, FINE | {"router_start": "centroids"}
    for settings, ids, words in (
        (split, IDS[0, :0], "no token"),
        (split, IDS[0, :1], "no two tokens in a row"),
        (centroids, IDS[0, :1], "too few tokens to find 2 clusters"),
    ):
        with pytest.raises(DataError, match=words):
            upcycling_of(place / "dense", UpcycleConfig(**settings), calibration_texts=[ids])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read"),
        (b"caf\xe9", "not JSON"),
        (b"[", "not JSON"),
        (b'{"a": 1}', "not a list of lists of texts"),
        (b'[["a"], []]', "not a list of lists"),
        (b'[["a"], [""]]', "not a list of lists"),
        (b'[["a"], "b"]', "not a list of lists"),
        (b'[["a"]]', "prompts for 1 groups, where the router has 2"),
    ],
)
def test_prompts_that_are_none_are_refused(tmp_path, content, words):
    if content is not None:
        (tmp_path / "p.json").write_bytes(content)
    with pytest.raises(DataError, match=words):
        read_prompts(tmp_path / "p.json", groups=2)


def test_prompts_that_agree_are_refused(made, tmp_path):
    place = made("llama")
    (tmp_path / "p.json").write_text('[["same"], ["same"]]')
    config = UpcycleConfig(**FINE, router_start="prompts", prompts=str(tmp_path / "p.json"))
    with pytest.raises(DataError, match="router group 0 is no different"):
        upcycle_folder(place / "dense", tmp_path / "moe", config)
    assert not (tmp_path / "moe").exists()


def test_siblings_that_are_none_are_refused(made, tmp_path):
    place = made("llama")
    base = {"experts": 4, "top_k": 2}
    others = {
        "width": (write_dense(tmp_path / "width", num_hidden_layers=4), "no sibling"),
        "family": (made("phi3") / "dense", "no sibling"),
        "nowhere": (tmp_path / "nowhere", "no such folder"),
    }
    sparse = tmp_path / "sparse"
    upcycle_folder(place / "dense", sparse, UpcycleConfig(**base))
    others["sparse"] = (sparse, "already a mixture of experts")
    for path, words in others.values():
        with pytest.raises(ModelError, match=words):
            upcycle_folder(place / "dense", tmp_path / "moe", UpcycleConfig(**base, siblings=(str(path),)))
    copy = write_dense(tmp_path / "copy", seed=1)
    with pytest.raises(ModelError, match="source"):
        upcycle_folder(place / "dense", copy, UpcycleConfig(**base, siblings=(str(copy),)), overwrite=True)
    assert not (tmp_path / "moe").exists()


def test_the_text_of_a_calibration_may_be_ids_or_a_file(made):
    place = made("llama")
    config = config_in(place, FINE | {"router_order": "softmax-topk", "calibration_text": "text.txt"})
    ids = tokenise(place / "dense", [place / "text.txt"], vocabulary=264)
    from_file = upcycling_of(place / "dense", config).measured.weight_sums
    assert from_file == upcycling_of(place / "dense", config, calibration_texts=ids).measured.weight_sums
    assert len(from_file) == 2


def test_a_plan_that_is_let_go_takes_its_model_along(made):
    import gc
    import weakref

    place = made("llama")
    upcycling = upcycling_of(place / "dense", UpcycleConfig(**FINE))
    model = weakref.ref(upcycling.model)
    gc.disable()
    try:
        del upcycling
        assert model() is None  # no cycle keeps it until Python next looks for one
    finally:
        gc.enable()


def test_prompts_that_are_ignored_are_not_read():
    with_prompts = UpcycleConfig(experts=4, top_k=2, prompts="/no/such/prompts.json")
    assert file_digests(with_prompts) == {}
    assert any("prompts" in text for text in with_prompts.ignored())
