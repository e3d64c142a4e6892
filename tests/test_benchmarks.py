"""The benchmarks measure what they say: the rows, their arithmetic, the loads, and the check against float64."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import dispatch, layer_memory, memory, moe_layer, train, train_table, upcycle
from benchmarks.cases import (
    CASES,
    DTYPES,
    LIMITS,
    ROUTINGS,
    Case,
    imbalance,
    make_batch,
    make_weights,
    reference,
    relative_errors,
)
from benchmarks.layers import Layer
from benchmarks.measure import kept_bytes, milliseconds
from benchmarks.peers import build
from benchmarks.table import readme_table, table

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]
RESULT, README = ROOT / "benchmarks" / "results" / "cpu-epyc-2core.json", ROOT / "README.md"
START, END = "<!-- generated: python -m tests.test_benchmarks -->\n", "<!-- end -->"
TINY = Case(name="tiny", D=32, T=48, E=8, K=2, F=16)
ROW_FIELDS = {"case", "dtype", "impl", "ms", "ratio_to_dense", "routing", "rounds", "kept_mb", "peak_mb", "reason"}


class OneExpertTooMany(Layer):
    """The loop, with the first expert's part added twice."""

    def __init__(self, right: Layer) -> None:
        super().__init__()
        self.right = right

    def forward(self, x_TD: Tensor) -> Tensor:
        y_TD: Tensor = self.right(x_TD)
        return y_TD + 1e-3 * self.right.get_submodule("experts.0")(x_TD)

    def weight_gradients(self, first: int) -> dict[str, Tensor]:
        return self.right.weight_gradients(first)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CASES, "tiny", TINY)


def test_quick_prints_rows_and_nothing_else(tiny: None, capsys: pytest.CaptureFixture[str]) -> None:
    moe_layer.main(["--quick", "--json", "--device", "cpu", "--cases", "tiny", "--rounds", "2", "--seconds", "inf"])
    rows = json.loads(capsys.readouterr().out)
    assert {(row["case"], row["dtype"], row["routing"], row["impl"]) for row in rows} == {
        ("tiny", dtype, routing, name) for dtype in DTYPES for routing in ROUTINGS for name in ("ours", "loop", "dense")
    }
    dense = {(row["dtype"], row["routing"]): row["ms"] for row in rows if row["impl"] == "dense"}
    for row in rows:
        assert set(row) >= ROW_FIELDS
        assert row["reason"] is None
        assert row["ms_min"] <= row["ms"] <= row["ms_max"]
        assert row["ratio_to_dense"] == pytest.approx(dense[row["dtype"], row["routing"]] / row["ms"])
        assert row["rounds"] == (1 if row["impl"] == "loop" else 2)


def test_quick_takes_the_cases_of_the_issue_by_itself() -> None:
    options = moe_layer.parse(["--quick", "--device", "cpu"])
    assert (options.cases, options.dtypes) == (["coarse", "fine", "finest"], ["fp32", "bf16"])
    sizes = {name: (case.D, case.T, case.E, case.K, case.F) for name, case in CASES.items()}
    assert sizes["coarse"] == (512, 2048, 8, 2, 1408)
    assert sizes["fine"] == (512, 2048, 64, 8, 704)
    assert sizes["finest"] == (512, 2048, 64, 8, 176)


def test_a_full_run_writes_a_file_and_its_table(tiny: None, tmp_path: Path) -> None:
    names = "ours,dense,megatron,scattermoe"
    arguments = ["--device", "cpu", "--cases", "tiny", "--dtypes", "fp32", "--rounds", "1", "--no-memory"]
    moe_layer.main([*arguments, "--impls", names, "--out", str(tmp_path), "--name", "here"])
    content = json.loads((tmp_path / "here.json").read_text())
    assert {"machine", "versions", "date", "rows", "matmul_gflops"} <= set(content)
    missing = [row for row in content["rows"] if row["ms"] is None]
    assert {row["impl"] for row in missing} == {"megatron", "scattermoe"}
    assert all(row["reason"] for row in missing)
    page = (tmp_path / "here.md").read_text()
    assert page == table(content)
    assert "scattermoe: not run: its Triton kernels need a GPU" in page
    (tmp_path / "here.md").unlink()
    moe_layer.main(["--table", str(tmp_path / "here.json")])
    assert (tmp_path / "here.md").read_text() == page


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["ours", "ours:grouped", "ours:loop", "loop", "transformers-eager"])
def test_implementations_agree_with_float64(name: str, dtype: str, routing: str) -> None:
    weights, batch = make_weights(TINY), make_batch(TINY, routing)
    expected = reference(weights, batch, device=CPU, first=TINY.E)
    layer = build(name, TINY, weights, device=CPU, dtype=DTYPES[dtype])
    errors = moe_layer.disagreement(layer, batch, expected, dtype=DTYPES[dtype])
    assert moe_layer.refusal(errors, LIMITS[dtype]) is None


def test_a_wrong_implementation_is_refused() -> None:
    weights, batch = make_weights(TINY), make_batch(TINY, "balanced")
    expected = reference(weights, batch, device=CPU, first=TINY.E)
    wrong = OneExpertTooMany(build("loop", TINY, weights, device=CPU, dtype=torch.float32))
    reason = moe_layer.refusal(moe_layer.disagreement(wrong, batch, expected, dtype=torch.float32), LIMITS["fp32"])
    assert reason is not None
    assert "computes something else" in reason


def test_nan_and_another_shape_are_refused() -> None:
    expected = {"output": torch.ones(2, 2, dtype=torch.float64)}
    for found in (torch.full((2, 2), math.nan), torch.ones(2, 1)):
        assert moe_layer.refusal(relative_errors({"output": found}, expected), 1.0) is not None


def test_the_reference_has_the_gradients_of_its_output() -> None:
    case = Case(name="tiny", D=8, T=4, E=4, K=2, F=3)
    weights, batch = make_weights(case), make_batch(case, "skewed")
    found = reference(weights, batch, device=CPU, first=case.E)

    def loss(position: int, change: float) -> float:
        moved = [batch.x_TD.double(), *(part.double() for part in weights)]
        moved[position] = moved[position].clone()
        moved[position].view(-1)[1] += change
        output = reference(type(weights)(*moved[1:]), batch._replace(x_TD=moved[0]), device=CPU, first=0)["output"]
        return float((output * batch.gradient_TD).sum())

    for position, name in enumerate(("x", "router", "gate", "up", "down")):
        slope = (loss(position, 1e-5) - loss(position, -1e-5)) / 2e-5
        assert found[name].flatten()[1] == pytest.approx(slope, rel=1e-6, abs=1e-9)


def test_routing_is_as_described() -> None:
    case = CASES["finest"]
    batches = {routing: make_batch(case, routing) for routing in ROUTINGS}
    assert imbalance(case, batches["balanced"]) == 1.0
    assert imbalance(case, batches["skewed"]) > 4
    for batch in batches.values():
        ordered_TK = batch.experts_TK.sort(dim=1).values
        assert bool((ordered_TK[:, 1:] > ordered_TK[:, :-1]).all())
        logits_TE = batch.x_TD @ make_weights(case).router_ED.T
        chosen_TK = logits_TE.bfloat16().topk(case.K, dim=1).indices.sort(dim=1).values
        assert torch.equal(chosen_TK, ordered_TK)


def test_changing_routing_gives_all_implementations_the_same_new_batches() -> None:
    problem = moe_layer.Problem(TINY, ["changing"], device=CPU, quick=True)
    steps = moe_layer.Bench(problem, "fp32", ["ours", "loop"]).steps().values()
    seen: list[list[torch.Tensor]] = []
    for step in steps:
        seen.append([])
        for _ in range(3):
            milliseconds(step)
            seen[-1].append(torch.cat([step.x_TD.detach(), step.gradient_TD]))
    assert len(seen) == 2
    for first, second in zip(*seen, strict=True):
        assert torch.equal(first, second)
    assert not torch.equal(seen[0][0], seen[0][1])
    assert not torch.equal(seen[0][1], seen[0][2])


def test_kept_memory_counts_each_storage_once_and_no_parameter() -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False), torch.nn.Tanh())
    x = torch.randn(32, 64)
    assert kept_bytes(layer, x) == 2 * 32 * 64 * 4  # the input, and tanh's output


def test_memory_of_a_pass_holds_its_gradients(tiny: None) -> None:
    found = layer_memory.measure("dense", "coarse", "fp32", "balanced", 256, "cpu")
    gradients = 3 * 512 * 2 * 1408 * 4 / 1e6
    assert gradients < found["peak_mb"]
    assert 0 < found["kept_mb"] < gradients


def test_dispatch_rows(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "ONE_HOT_BYTES", 4 * 64 * 8 * 64)
    small = ["--json", "--device", "cpu", "--experts", "8", "32", "--tokens", "64", "--top-k", "2", "--width", "32"]
    dispatch.main([*small, "--rounds", "1"])
    rows = json.loads(capsys.readouterr().out)
    assert [(row["impl"], row["E"]) for row in rows] == [("sorted", 8), ("one-hot", 8), ("sorted", 32), ("one-hot", 32)]
    assert all((row["ms"] is None) == (row["reason"] is not None) for row in rows)
    assert rows[0]["ms"] > 0


def test_upcycling_rows(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    upcycle.main(["--quick", "--json", "--work", str(tmp_path / "work"), "--impls", "ours,cp"])
    ours, cp = json.loads(capsys.readouterr().out)
    assert (ours["impl"], cp["impl"]) == ("ours", "cp")
    assert ours["written_mb"] == cp["written_mb"] > 25
    assert ours["ratio_to_cp"] == pytest.approx(cp["seconds_all"][0] / ours["seconds_all"][0], rel=0.5)
    assert ours["mb_per_s"] == pytest.approx(ours["written_mb"] / ours["seconds"], rel=0.05)
    assert cp["peak_mb"] < 50 < ours["peak_mb"]
    assert 0 < ours["beyond_imports_mb"] < ours["peak_mb"] / 2
    assert list(tmp_path.iterdir()) == []


def test_training_steps_of_all_three_and_their_table(tmp_path: Path) -> None:
    arguments = ["--models", "tiny", "--mixtures", "E16G4", "--tokens", "64", "--rounds", "2"]
    train.main([*arguments, "--out", str(tmp_path), "--name", "here"])
    content = json.loads((tmp_path / "here.json").read_text())
    assert {"machine", "versions", "date", "minutes", "rows"} <= set(content)
    found = {(row["dtype"], row["impl"]): row for row in content["rows"]}
    assert set(found) == {(dtype, name) for dtype in train.DTYPES for name in ("dense", "ours", "transformers")}
    for (dtype, name), row in found.items():
        assert row["reason"] is None
        assert row["tokens_per_second"] == pytest.approx(64 / row["seconds"], rel=0.01)
        assert sum(part["seconds"] for part in row["parts"].values()) == pytest.approx(row["seconds"], rel=0.3)
        parts = {"forward", "experts", "backward", "norm and checks", "optimiser", "zeroing"}
        assert set(row["parts"]) >= (parts if name == "dense" else parts | {"router"})
        assert (row["casts"] is None) == (dtype == "fp32")
        assert row["ratio_to_dense"] > 0
    ours, plain = found["fp32", "ours"], found["fp32", "transformers"]
    assert (ours["class"], plain["class"]) == ("LlamaForCausalLM", "MixtralForCausalLM")
    assert ours["parameters"] == plain["parameters"] > 2 * found["fp32", "dense"]["parameters"]
    assert (tmp_path / "here.md").read_text() == train_table.table(content)


def test_a_twin_that_computes_something_else_has_no_time(tmp_path: Path) -> None:
    case = train.Case("tiny", train.write_dense("tiny", tmp_path / "dense"), train.MIXTURES["E8G2"])
    twin = case.contestants["transformers"].model
    assert (
        twin.model.layers[0].mlp.experts.down_proj
        is case.contestants["ours"].model.model.layers[0].mlp.experts.down_proj
    )
    twin.model.norm.weight = torch.nn.Parameter(twin.model.norm.weight.detach() * 4)
    rows = {row["impl"]: row for row in case.rows(dtype="fp32", tokens=64, rounds=1)}
    assert rows["transformers"]["reason"].startswith("computes something else")
    assert rows["transformers"]["seconds"] is None
    assert rows["ours"]["ratio_to_dense"] > 0
    assert rows["ours"]["ratio_to_transformers"] is None


def test_a_process_that_fails_or_is_missing_is_a_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def commands(impl: str, source: Path, target: Path, *, dtype: str) -> list[str] | str:
        return "not installed" if impl == "mixturekit" else ["sh", "-c", "echo first; echo the reason >&2; exit 3"]

    monkeypatch.setattr(upcycle, "command", commands)
    source = upcycle.write_random(tmp_path / "small", upcycle.SIZES["small"])
    rows = upcycle.measure("small", source, ["ours", "cp", "mixturekit"], rounds=1, peer_rounds=1)
    assert [row["reason"] for row in rows] == ["exit code 3: the reason", None, "not installed"]
    assert [row["seconds"] for row in rows] == [None, None, None]


def test_memory_of_a_process_counts_its_children(tmp_path: Path) -> None:
    child = f"{sys.executable} -c 'import time; x = bytearray(10**8); time.sleep(2)'"
    found = upcycle.run(["sh", "-c", f"{child} & {child} & wait"], folder=tmp_path, sync=False)
    assert found.failure is None
    assert found.peak_bytes > 2e8
    assert found.seconds > 2


def renewed(page: str) -> str:
    """README with the table of the results file, and with none where there is no such file."""
    before, _, rest = page.partition(START)
    shown = ""
    if RESULT.exists():
        content = json.loads(RESULT.read_text(encoding="utf-8"))
        link = RESULT.with_suffix(".md").relative_to(ROOT)
        shown = (
            f"{readme_table(content)}\n\nMeasured on {content['date']}; all rows, with memory: [{link.name}]({link}).\n"
        )
    return before + START + shown + END + rest.partition(END)[2]


def test_readme_and_the_table_show_the_results() -> None:
    for result in RESULT.parent.glob("[cg]pu-*.json"):
        content = json.loads(result.read_text(encoding="utf-8"))
        assert result.with_suffix(".md").read_text(encoding="utf-8") == table(content), "run moe_layer.py --table FILE"
    for result in RESULT.parent.glob("train-*.json"):
        content = json.loads(result.read_text(encoding="utf-8"))
        assert result.with_suffix(".md").read_text(encoding="utf-8") == train_table.table(content), (
            "run train.py --table"
        )
    for result in RESULT.parent.glob("upcycle-*.json"):
        content = json.loads(result.read_text(encoding="utf-8"))
        assert result.with_suffix(".md").read_text(encoding="utf-8") == upcycle.table(content), "run upcycle.py again"
    page = README.read_text(encoding="utf-8")
    assert START in page
    assert renewed(page) == page, "run python -m tests.test_benchmarks"


if __name__ == "__main__":
    README.write_text(renewed(README.read_text(encoding="utf-8")), encoding="utf-8")


def test_a_step_of_the_largest_model_says_what_it_took(tmp_path: Path) -> None:
    rows = []
    for offload in ("none", "all"):
        row = memory.two_steps(memory.SMALL, 1, offload, str(tmp_path), torch.device("cpu"))
        rows.append({"offload": offload, **row, "at_least": offload == "all", "peak_mb": 1})
    assert rows[0]["parameters"] == rows[1]["parameters"] > 10**5
    assert rows[0]["crossing_mb"] == 0 < rows[1]["crossing_mb"]
    machine = {"kind": "cpu", "gpu": None, "processor": "one", "cores": 2, "load": 0.0}
    settings = {"budget_mb": 16, "sizes": vars(memory.SMALL), "disk": "1 GB free"}
    page = memory.table({"machine": machine, "settings": settings, "versions": {}, "date": "today", "rows": rows})
    assert "| all | 1 | at least 0.1 | 1.0 |" in page
