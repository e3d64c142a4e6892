"""The demo's story, told quickly with a tiny model; with the real one in the slow suite."""

import io
import json
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM

from moewright.demo.findings import Findings, Sizes
from moewright.demo.model import write_smollm2
from moewright.demo.pages import verdict
from moewright.demo.process import run_python
from moewright.demo.story import run_demo
from moewright.demo.text import Split, write_split
from moewright.errors import DataError, MoewrightError, UsageError
from tests.models import tiny_tokenizer, write_dense

TINY = Sizes(train_tokens=1024, held_out_tokens=256, module_tokens=64, sequence_length=64, new_tokens=8)


@pytest.mark.timeout(600)
def test_story_measures_what_it_tells(tmp_path):
    shown = io.StringIO()
    report = run_demo(
        tmp_path / "demo", Console(file=shown, width=100), sizes=TINY, write_model=lambda path: write_dense(path)
    )
    findings = json.loads((tmp_path / "demo" / "findings.json").read_text())
    base, dense, start, moe = findings["rows"]
    assert findings["start"]["relative_logit_difference"] <= 1e-5
    assert start["perplexity"] == pytest.approx(base["perplexity"], rel=1e-5)
    assert start["parameters"] > base["parameters"] == dense["parameters"]
    assert start["active"] < start["parameters"]
    assert dense["perplexity"] != base["perplexity"] != moe["perplexity"]
    assert all(row["peak_memory_bytes"] > 10**7 for row in findings["rows"])
    assert findings["proof"]["largest_logit_difference"] < 1e-4
    assert findings["proof"]["architecture"] == "MixtralForCausalLM"
    assert len(findings["load"]) == 2
    assert all(sum(load) == pytest.approx(16, abs=1e-3) for load in findings["load"].values())
    # The same tokens in the same order: only the models differ.
    runs = [tomllib.loads((tmp_path / "demo" / f"run-{name}.toml").read_text()) for name in ("dense", "moe")]
    assert runs[1]["train"].pop("router_learning_rate_ratio") == TINY.router_learning_rate_ratio
    assert [run["data"] for run in runs] == [runs[0]["data"]] * 2
    assert [run["train"] for run in runs] == [runs[0]["train"]] * 2
    # The terminal and the page show these findings.
    page = report.read_text()
    HTMLParser().feed(page)
    for text in (f"{moe['perplexity']:.3f}", f"{dense['perplexity']:.3f}"):
        assert text in page
        assert text in shown.getvalue()
    assert page.count('<script type="application/json">') == 2


def test_a_full_folder_is_refused(tmp_path):
    (tmp_path / "mine").write_text("")
    with pytest.raises(UsageError, match="choose another --out"):
        run_demo(tmp_path, Console(quiet=True), write_model=lambda path: write_dense(path))
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_step_that_fails_stops_the_story():
    with pytest.raises(MoewrightError, match="the step ended with code 3"):
        run_python(["-c", "raise SystemExit(3)"], what="the step")


def test_split_is_by_module_and_fixed_by_the_seed(tmp_path):
    sizes = {"train_tokens": 512, "held_out_tokens": 256, "module_tokens": 64}
    split = write_split(tmp_path / "a", tiny_tokenizer(), **sizes, seed=0)
    again = write_split(tmp_path / "b", tiny_tokenizer(), **sizes, seed=0)
    other = write_split(tmp_path / "c", tiny_tokenizer(), **sizes, seed=1)
    assert [path.name for path in split.train] == [path.name for path in again.train]
    assert [path.name for path in split.train] != [path.name for path in other.train]
    assert not {path.name for path in split.train} & {path.name for path in split.held_out}
    assert (len(split.train), len(split.held_out)) == (8, 4)
    assert all(len(tiny_tokenizer()(path.read_text())["input_ids"]) == 64 for path in split.train)
    with pytest.raises(DataError, match="too few long modules"):
        write_split(tmp_path / "d", tiny_tokenizer(), train_tokens=10**9, held_out_tokens=10, module_tokens=10, seed=0)


def test_verdict_says_when_the_mixture_loses_and_when_the_gap_is_noise():
    rows = [{"perplexity": perplexity} for perplexity in (10.0, 8.0, 10.0, 9.0)]
    findings = Findings(
        sizes=TINY,
        split=Split(train=[], held_out=[], train_tokens=0, held_out_tokens=0),
        steps=3,
        prompt="",
        sized="",
        start={},
        rows=rows,
        gap=(0.118, 0.01),
    )
    assert "9.000, higher than" in verdict(findings)
    assert "does not rank" not in verdict(findings)
    rows[3]["perplexity"], findings.gap = 7.8, (-0.025, 0.02)
    assert "7.800, lower than" in verdict(findings)
    assert "does not rank" in verdict(findings)


@pytest.mark.slow
@pytest.mark.model
def test_smollm2_comes_out_of_its_package(tmp_path):
    folder = write_smollm2(tmp_path / "dense")
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.num_parameters() == 134_515_008


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.timeout(2400)
def test_story_on_the_real_model(tmp_path):
    run_demo(tmp_path / "demo", Console(quiet=True), sizes=Sizes(train_tokens=2048, held_out_tokens=1024))
    findings = json.loads((Path(tmp_path) / "demo" / "findings.json").read_text())
    base, dense, start, moe = findings["rows"]
    assert findings["start"]["relative_logit_difference"] <= 1e-5
    assert start["perplexity"] == pytest.approx(base["perplexity"], rel=1e-4)
    assert max(dense["perplexity"], moe["perplexity"]) < base["perplexity"]
