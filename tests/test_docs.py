"""Pages say what the code and the results say. `python -m tests.test_docs` renews what is generated."""

import ast
import dataclasses
import importlib.util
import inspect
import itertools
import json
import re
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import torch

from experiments.page import renewed
from moewright.data import config as data
from moewright.family.table import growing_families
from moewright.moe import config as moe
from moewright.moe.config import MoEConfig, MoESettings
from moewright.moe.kernels import KERNELS
from moewright.moe.layer import MoELayer
from moewright.parallel import config as parallel
from moewright.train import config as train
from moewright.upcycle import config as upcycle

ROOT = Path(__file__).parents[1]
TRAINING = ROOT / "docs" / "training.md"
LAYER = ROOT / "docs" / "moe-layer.md"
START, END = "<!-- keys -->", "<!-- end -->"
TABLES = [
    ("", train, "RunConfig"),
    ("upcycle.", upcycle, "UpcycleConfig"),
    ("data.", data, "DataConfig"),
    ("moe.", moe, "MoESettings"),
    ("train.", train, "TrainConfig"),
    ("parallel.", parallel, "ParallelConfig"),
]


def keys() -> str:
    """Every key of a run file with its default and the sentence under its field, as a Markdown table."""
    lines = ["| key | default | |", "|---|---|---|"]
    for prefix, module, name in TABLES:
        tree = ast.parse(inspect.getsource(module))
        (body,) = (node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
        for field, sentence in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(sentence, ast.Expr):
                default = "required" if field.value is None else f"`{ast.unparse(field.value)}`"
                if "default_factory" in default:
                    continue  # a table of its own, below
                text = " ".join(ast.literal_eval(sentence.value).split())
                lines.append(f"| `{prefix}{field.target.id}` | {default} | {text} |")
    return "\n".join(lines)


def with_keys(page: str) -> str:
    return re.sub(f"{START}.*?{END}", lambda _: f"{START}\n{keys()}\n{END}", page, flags=re.DOTALL)


def experiment(name: str) -> ModuleType:
    return module_at(ROOT / "experiments" / f"{name}.py")


def module_at(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_training_page_lists_every_key():
    page = TRAINING.read_text(encoding="utf-8")
    assert START in page
    assert with_keys(page) == page, "run python -m tests.test_docs"
    assert "train.clip_norm" in page


def test_upcycling_page_shows_the_results():
    step0 = experiment("step0")
    page, result = step0.PAGE.read_text(encoding="utf-8"), json.loads(step0.RESULT.read_text(encoding="utf-8"))
    assert renewed(page, step0.tables(result)) == page, "run python experiments/step0.py --tables"
    # What the page claims of `exact` holds for every row that was measured.
    exact = [row for row in result["exact"] + result["methods"] if row["settings"]["scale"] == "exact"]
    assert max(row["relative_logit_difference"] for row in exact) <= 1e-5
    assert [row["method"] for row in result["methods"]] == list(step0.METHODS)
    assert {(row["settings"]["granularity"], row["settings"]["top_k"]) for row in result["exact"]} == {
        (granularity, groups * granularity) for granularity in (1, 2, 4) for groups in (1, 2)
    }


def test_training_page_shows_the_results():
    experiment_ = experiment("router_rate")
    page = TRAINING.read_text(encoding="utf-8")
    result = json.loads(experiment_.RESULT.read_text(encoding="utf-8"))
    assert renewed(page, experiment_.tables(result)) == page, "run python experiments/router_rate.py --tables"


def test_distillation_page_shows_the_results():
    distil = experiment("distil")
    page, result = distil.PAGE.read_text(encoding="utf-8"), json.loads(distil.RESULT.read_text(encoding="utf-8"))
    assert renewed(page, distil.tables(result)) == page, "run python experiments/distil.py --tables"
    assert result["settings"] == dataclasses.asdict(distil.CONFIG)
    # What the page says of it.
    before, after = (sum(row[f"errors_{when}"][3] for row in result["layers"]) for when in ("before", "after"))
    assert after < before / 3
    assert max(row["errors_before"][7] for row in result["layers"]) < 1e-9


def test_growing_page_shows_the_results():
    grow = experiment("grow")
    page, result = grow.PAGE.read_text(encoding="utf-8"), json.loads(grow.RESULT.read_text(encoding="utf-8"))
    assert renewed(page, grow.tables(result)) == page, "run python experiments/grow.py --tables"
    assert [name for name in growing_families() if name not in page] == []
    # What the page claims of width and depth holds for what was measured.
    rows = result["width"] + result["depth"]
    exact = [row["relative_logit_difference"] for row in rows if row["function_preserving"]]
    assert len(exact) == 2
    assert max(exact) <= 1e-5
    found = {(row["settings"]["width"], row["settings"]["depth"]): row["grown_perplexity"] for row in result["depth"]}
    assert found["fpi", "interpolate"] < found["fpi", "stack"]
    assert found["aki", "interpolate"] > found["aki", "stack"]
    assert min(row["grown_perplexity"] for row in rows if row["settings"]["width"] == "aki") > result["vocabulary"]


def test_parallelism_page_shows_the_results():
    parity = experiment("parity")
    page, result = parity.PAGE.read_text(encoding="utf-8"), json.loads(parity.RESULT.read_text(encoding="utf-8"))
    assert renewed(page, parity.tables(result)) == page, "run python experiments/parity.py --tables"
    for dtype, most in (("float64", 1e-7), ("float32", 1e-5)):
        rows = [row for row in result["rows"] if row["dtype"] == dtype]
        assert {row["layout"] for row in rows} == {
            parity.describe(degrees) for ranks in (2, 4) for degrees in parity.layouts(ranks)
        }
        assert all(row["cases"].keys() == parity.CASES.keys() for row in rows)
        memory = [row for row in result.get("memory", []) if row["dtype"] == dtype]
        assert {row["layout"] for row in memory} <= {parity.describe(degrees) for degrees in parity.layouts(2)}
        assert all(row["cases"].keys() == parity.MEMORY.keys() for row in memory)
        errors = [error for row in rows + memory for case in row["cases"].values() for error in case.values()]
        assert max(errors) <= most


def layer_blocks(language: str) -> list[str]:
    page = LAYER.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)


def test_layer_page_names_every_option_and_no_other():
    prose = re.sub(r"^```.*?^```$", "", LAYER.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    options = {field.name for field in dataclasses.fields(MoEConfig)}
    in_tables: list[str] = []
    for table in re.findall(r"^\| option \|.*\n\|-.*\n((?:\|.*\n)+)", prose, re.MULTILINE):
        for row in table.splitlines():
            in_tables += re.findall(r"`(\w+)`", row.split("|")[1])
    assert sorted(in_tables) == sorted(options), "each option has one row"
    assert set(re.findall(r"`(\w+)=[^`]*`", prose)) <= options | {"token_mask"}
    kernels = re.findall(r"^\| `(\w+)` \|", prose.partition("## Kernels")[2].partition("\n## ")[0], re.MULTILINE)
    assert sorted(kernels) == sorted(KERNELS)


def test_layer_page_runs(tmp_path):
    (tmp_path / "page.py").write_text("\n".join(layer_blocks("python")), encoding="utf-8")
    names = vars(module_at(tmp_path / "page.py"))
    assert names["y"].shape == (4, 16, 64)
    assert names["layer"].stats.step_counts.sum() == 0
    assert names["model"].config._experts_implementation == "moewright"
    recipes = [value for value in names.values() if isinstance(value, MoEConfig)] + list(names["pr_moe"].values())
    assert len(recipes) == 1 + 8 + 12
    for config in recipes:  # of the sizes of real models, so without memory
        x = torch.empty(2, 8, config.hidden_size, device="meta", requires_grad=True)
        MoELayer(config, device="meta")(x).sum().backward()
        assert x.grad.shape == x.shape


def test_layer_page_lists_the_moe_table():
    (block,) = layer_blocks("toml")
    table = tomllib.loads(block)["moe"]
    MoESettings(**table)
    assert list(table) == [field.name for field in dataclasses.fields(MoESettings)]


@pytest.mark.parametrize("page", sorted(ROOT.glob("*.md")) + sorted((ROOT / "docs").glob("*.md")), ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"@[A-Z]+@", text), f"{page.name} has a place that nobody filled"
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


if __name__ == "__main__":
    TRAINING.write_text(with_keys(TRAINING.read_text(encoding="utf-8")), encoding="utf-8")
