"""Training runs: what they write, how they resume, what they refuse."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from moewright.backbone.blocks import moe_layers
from moewright.backbone.load import load_model
from moewright.checkpoint.read import ModelFolder
from moewright.errors import CheckpointError, DataError, ModelError, Preempted, UsageError
from moewright.moe.config import MoESettings
from moewright.parallel.apply import ALONE, Parallel
from moewright.train import loop
from moewright.train.config import RunConfig
from moewright.train.loop import train
from moewright.train.metrics import read_json_lines
from moewright.train.resume import stop_on_signals
from moewright.train.run_file import load_run, to_toml
from moewright.train.start import start
from moewright.upcycle.apply import upcycle_folder
from moewright.upcycle.config import UpcycleConfig
from tests.models import write_dense
from tests.runs import LINES, at_step, evaluations, make_run, metrics, send

SPARSE = UpcycleConfig(experts=8, top_k=4, granularity=2)
RANDOM = MoESettings(
    balance_loss=0.05,
    balance_scope="global",
    balance_adaptation=0.2,
    input_jitter=0.01,
    logit_noise=0.1,
    capacity_factor=0.75,
    min_capacity=1,
    drop_policy="random",
)
"""All that is random in a layer, and what moves outside the gradient."""


pytestmark = pytest.mark.usefixtures("one_thread")


def state(config: RunConfig, step: int) -> dict[str, torch.Tensor]:
    return load_file(Path(config.out) / "checkpoints" / f"step-{step:08}" / "rank-00000.safetensors")


def assert_same_run(first: RunConfig, second: RunConfig) -> None:
    """Metrics, evaluations, weights, moments and generator states of both runs are equal to the last bit."""
    assert metrics(first) == metrics(second)
    assert evaluations(first) == evaluations(second)
    left, right = (state(config, config.train.steps) for config in (first, second))
    assert left.keys() == right.keys()
    assert any(name.startswith("optimizer.exp_avg_sq.") for name in left)
    for name in left:
        assert torch.equal(left[name], right[name]), name
    for name in ("model.safetensors", "config.json"):
        assert (Path(first.out) / "final" / name).read_bytes() == (Path(second.out) / "final" / name).read_bytes()


# What a run writes


@pytest.mark.parametrize("upcycle", [None, SPARSE], ids=["dense", "sparse"])
def test_a_run_writes_its_folder_and_learns(tmp_path: Path, upcycle: UpcycleConfig | None) -> None:
    config = make_run(tmp_path, upcycle=upcycle, steps=30, warmup_steps=2, eval_every=10)
    result = train(config)
    run = Path(config.out)
    assert sorted(path.name for path in run.iterdir()) == [
        *("config.toml", "evaluations.jsonl", "final", "metrics.jsonl", "moewright-run.json")
    ]
    assert load_run(run / "config.toml") == config

    lines = read_json_lines(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 31))
    assert all({"loss", "tokens", "lr", "grad_norm", "seconds", "tokens_per_second"} <= line.keys() for line in lines)
    assert lines[0]["lr"] == pytest.approx(1.5e-3)
    assert lines[-1]["lr"] == pytest.approx(3e-4)
    assert result.losses == [line["loss"] for line in lines]
    assert result.tokens == lines[-1]["tokens"] <= 30 * 4 * 16
    assert result.steps == 30
    assert result.tokens_per_second > 0
    assert result.peak_memory_bytes > 2**20
    assert sum(result.losses[-5:]) / 5 < result.losses[0] - 0.5

    assert [step for step, _ in evaluations(config)] == [0, 10, 20, 30]
    assert evaluations(config)[-1][1] < evaluations(config)[0][1] - 0.5

    ids = torch.arange(20)[None]
    theirs = AutoModelForCausalLM.from_pretrained(result.final, dtype=torch.float32).eval()
    ours = load_model(result.final)
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours(ids).logits, atol=1e-5, rtol=1e-5)
    assert (result.final / "tokenizer.json").exists()


def test_the_load_of_each_expert_is_reported(tmp_path: Path) -> None:
    config = make_run(tmp_path, upcycle=SPARSE, steps=2)
    train(config)
    for line in metrics(config):
        assert line["moe_layers"] == [0, 1]
        assert [len(load) for load in line["load"]] == [8, 8]
        assert [sum(load) for load in line["load"]] == pytest.approx([1, 1], abs=1e-5)
        assert line["load_imbalance"] == pytest.approx(max(8 * max(load) for load in line["load"]), abs=1e-4)
        assert line["balance_loss"] > 0
        assert line["z_loss"] > 0


def test_dense_lines_have_no_routing(tmp_path: Path) -> None:
    config = make_run(tmp_path, steps=1)
    train(config)
    assert "load" not in metrics(config)[0]


def test_bfloat16_follows_float32(tmp_path: Path) -> None:
    exact, rounded = (make_run(tmp_path, out=dtype, upcycle=SPARSE, dtype=dtype) for dtype in ("float32", "bfloat16"))
    losses = [train(config).losses for config in (exact, rounded)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert load_file(Path(rounded.out) / "final" / "model.safetensors").popitem()[1].dtype == torch.float32


def test_a_sparse_folder_trains_on_like_the_model_in_memory(tmp_path: Path) -> None:
    in_memory = make_run(tmp_path, out="memory", upcycle=SPARSE)
    train(in_memory)
    upcycle_folder(tmp_path / "model", tmp_path / "sparse", SPARSE)
    from_folder = replace(in_memory, model=str(tmp_path / "sparse"), upcycle=None, out=str(tmp_path / "folder"))
    train(from_folder)
    assert metrics(from_folder) == metrics(in_memory)


def test_tensorboard_gets_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_run(tmp_path, steps=2, tensorboard=True)
    train(config)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(Path(config.out) / "tensorboard")).Reload()
    found = [event.value for event in events.Scalars("train/loss")]
    assert found == pytest.approx([line["loss"] for line in metrics(config)])
    assert len(events.Scalars("evaluation/loss")) == 2

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UsageError, match=r"pip install 'moewright\[track\]'"):
        train(make_run(tmp_path, out="other", tensorboard=True))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("upcycle", [None, SPARSE])
def test_parallelism_gets_a_skeleton_before_any_weight_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, upcycle: UpcycleConfig | None
) -> None:
    config = make_run(tmp_path, upcycle=upcycle, gradient_checkpointing=True)
    calls: list[str] = []
    read = ModelFolder.read

    def prepare(model: PreTrainedModel) -> Parallel:
        assert all(parameter.is_meta for parameter in model.parameters())
        assert len(moe_layers(model)) == (2 if upcycle else 0)
        model.lm_head.weight.requires_grad_(False)
        calls.append("prepare")
        return ALONE

    def spy(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append("read")
        return read(*args, **kwargs)

    monkeypatch.setattr(ModelFolder, "read", spy)
    started = start(config, cache_dir=tmp_path, prepare=prepare)
    assert calls[0] == "prepare"
    assert len(calls) > 10
    assert not any(parameter.is_meta for parameter in started.model.parameters())
    assert not started.model.lm_head.weight.requires_grad, "the skeleton that was prepared is the model that is trained"


# Resuming


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"upcycle": SPARSE},
        {"upcycle": SPARSE, "gradient_checkpointing": True},
        {"upcycle": SPARSE, "model": {"model_type": "qwen3", "tie_word_embeddings": True}},
        {"model": {"model_type": "qwen2", "attention_dropout": 0.3}},
        {"upcycle": SPARSE, "gradient_checkpointing": True, "moe": RANDOM},
    ],
    ids=["dense", "sparse", "recompute", "tied", "dropout", "random"],
)
def test_a_stopped_run_goes_on_to_the_last_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    settings = settings | {"eval_every": 3, "checkpoint_every": 6}
    whole, stopped = make_run(tmp_path, out="whole", **settings), make_run(tmp_path, out="stopped", **settings)
    train(whole)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with monkeypatch.context() as patch:
        at_step(patch, 3, send(signal.SIGTERM))
        with pytest.raises(Preempted, match="SIGTERM: stopped and saved after step 3 of 6"):
            train(stopped)
    assert {number: signal.getsignal(number) for number in before} == before
    assert not (Path(stopped.out) / "final").exists()
    torch.manual_seed(99)  # what a new process would have is something else
    train(stopped)
    assert_same_run(whole, stopped)


def test_a_crashed_run_makes_its_lost_steps_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"upcycle": SPARSE, "eval_every": 1, "checkpoint_every": 2}
    whole, crashed = make_run(tmp_path, out="whole", **settings), make_run(tmp_path, out="crashed", **settings)
    train(whole)

    def crash(_: nn.Module) -> None:
        raise KeyError("a crash")

    with monkeypatch.context() as patch:
        at_step(patch, 6, crash)
        with pytest.raises(KeyError):
            train(crashed)
    with (Path(crashed.out) / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    assert [line["step"] for line in metrics(crashed)] == [1, 2, 3, 4, 5]
    train(crashed)
    assert_same_run(whole, crashed)


def test_the_command_stops_with_75_and_resumes_in_a_new_process(tmp_path: Path) -> None:
    settings = {"upcycle": SPARSE, "steps": 250, "checkpoint_every": 250}
    whole, stopped = make_run(tmp_path, out="whole", **settings), make_run(tmp_path, out="stopped", **settings)
    train(whole)
    (tmp_path / "run.toml").write_text(to_toml(stopped))
    command = [sys.executable, "-m", "moewright", "train", str(tmp_path / "run.toml")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    lines = Path(stopped.out) / "metrics.jsonl"
    while not (lines.exists() and lines.read_text().count("\n") >= 2):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert "stopped and saved after step" in errors
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    assert "resuming after step" in again.stderr
    assert_same_run(whole, stopped)


def test_a_damaged_checkpoint_is_skipped_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"checkpoint_every": 2}
    whole, damaged = make_run(tmp_path, out="whole", **settings), make_run(tmp_path, out="damaged", **settings)
    train(whole)
    with monkeypatch.context() as patch:
        at_step(patch, 5, send(signal.SIGINT))
        with pytest.raises(Preempted, match="SIGINT"):
            train(damaged)
    tensors = Path(damaged.out) / "checkpoints" / "step-00000005" / "rank-00000.safetensors"
    content = bytearray(tensors.read_bytes())
    content[-1] ^= 1
    tensors.write_bytes(content)
    shown = StringIO()
    train(damaged, console=Console(file=shown, width=300))
    assert "checkpoint not used: step-00000005" in shown.getvalue()
    assert "resuming after step 4 of 6" in shown.getvalue()
    assert_same_run(whole, damaged)


def test_a_run_without_a_verified_checkpoint_does_not_begin_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_run(tmp_path)
    at_step(monkeypatch, 2, send(signal.SIGTERM))
    with pytest.raises(Preempted):
        train(config)
    (Path(config.out) / "checkpoints" / "step-00000002" / "facts.json").write_text("{}")
    with pytest.raises(CheckpointError, match="step-00000002"):
        train(config)


@pytest.fixture
def stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    config = make_run(tmp_path, upcycle=SPARSE)
    with monkeypatch.context() as patch:
        at_step(patch, 2, send(signal.SIGTERM))
        with pytest.raises(Preempted):
            train(config)
    return config


def test_other_settings_are_refused_by_name(stopped: RunConfig) -> None:
    resolved = (Path(stopped.out) / "config.toml").read_bytes()
    changes = [
        (
            replace(stopped, train=replace(stopped.train, learning_rate=1.0)),
            r"train\.learning_rate \(0\.003 then, 1\.0",
        ),
        (replace(stopped, train=replace(stopped.train, steps=7)), r"train\.steps \(6 then, 7 now\)"),
        (replace(stopped, upcycle=replace(SPARSE, seed=1)), r"upcycle\.seed \(0 then, 1 now\)"),
        (replace(stopped, upcycle=None, moe=MoESettings()), r"upcycle\.experts \(8 then, None now\)"),
        (replace(stopped, data=replace(stopped.data, sequence_length=8)), r"data\.files \(other content\)"),
    ]
    for config, message in changes:
        with pytest.raises(CheckpointError, match=message):
            train(config)
    assert (Path(stopped.out) / "config.toml").read_bytes() == resolved


def test_other_text_and_another_model_are_refused(stopped: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "more.txt").write_text("more text")
    files = (*stopped.data.files, str(tmp_path / "more.txt"))
    with pytest.raises(CheckpointError, match=r"data\.files \(other content\)"):
        train(replace(stopped, data=replace(stopped.data, files=files)))
    other = write_dense(tmp_path / "other", seed=1)
    with pytest.raises(CheckpointError, match=r"model \(other content\)"):
        train(replace(stopped, model=str(other)))


def test_what_does_not_touch_the_training_may_change(stopped: RunConfig, tmp_path: Path) -> None:
    moved = Path(stopped.model).rename(tmp_path / "moved")
    free = replace(stopped.train, eval_every=2, checkpoint_every=1, keep_checkpoints=1)
    train(replace(stopped, model=str(moved), train=free))
    assert [path.name for path in (Path(stopped.out) / "checkpoints").iterdir()] == ["step-00000006"]


def test_a_finished_run_is_left_as_it_is(tmp_path: Path) -> None:
    config = make_run(tmp_path, steps=2)
    result = train(config)
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in Path(config.out).rglob("*")}
    shown = StringIO()
    assert train(config, console=Console(file=shown, width=300)) == result
    assert "is finished (2 steps)" in shown.getvalue()
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in Path(config.out).rglob("*")} == before
    with pytest.raises(CheckpointError, match=r"train\.steps \(2 then, 3 now\)"):
        train(replace(config, train=replace(config.train, steps=3)))


def test_a_second_signal_is_not_held_back() -> None:
    # A process in the background of a shell starts with SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with stop_on_signals() as stop:
            signal.raise_signal(signal.SIGINT)
            assert stop.signal == signal.SIGINT
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


# What is refused


def test_a_run_that_cannot_start_leaves_no_trace(tmp_path: Path) -> None:
    config = make_run(tmp_path, out="new/folder/run")
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    (tmp_path / "empty").mkdir()
    bad = replace(config.data, files=(str(tmp_path / "bad.txt"),))
    cases: list[tuple[RunConfig, type[Exception], str]] = [
        (replace(config, data=bad), DataError, "not UTF-8"),
        (replace(config, data=replace(config.data, files=("no.txt",))), DataError, "no such file"),
        (replace(config, model=str(tmp_path / "empty")), ModelError, "empty"),
        (replace(config, moe=MoESettings(kernel="fast")), UsageError, r"moe\.kernel = 'fast': choose one of grouped"),
        (replace(config, upcycle=replace(SPARSE, layers="9")), UsageError, r"upcycle\.layers = '9': use all"),
    ]
    for case, error, message in cases:
        with pytest.raises(error, match=message):
            train(case)
        assert not (tmp_path / "new").exists()


def test_a_file_is_no_run_folder(tmp_path: Path) -> None:
    config = make_run(tmp_path)
    with pytest.raises(UsageError, match="is a file"):
        train(replace(config, out=str(tmp_path / "text.jsonl")))


def test_a_diverged_run_stops_and_saves_nothing(tmp_path: Path) -> None:
    config = make_run(tmp_path, learning_rate=1e30, warmup_steps=0, checkpoint_every=1, schedule="constant")
    with pytest.raises(CheckpointError, match=r"step 2: (loss|grad_norm) is (nan|inf)"):
        train(config)
    assert [path.name for path in (Path(config.out) / "checkpoints").iterdir()] == ["step-00000001"]
    assert not (Path(config.out) / "final").exists()


@pytest.mark.parametrize("step", [2, 6])
def test_parameters_that_overflow_are_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    def overflow(model: nn.Module) -> None:
        model.lm_head.weight.data[3, 4] = float("inf")

    config = make_run(tmp_path, eval_every=0, checkpoint_every=0 if step == 6 else 1, data={"eval_fraction": 0.0})
    at_step(monkeypatch, step, overflow)
    with pytest.raises(CheckpointError, match=rf"step {step}: lm_head\.weight is no longer finite"):
        train(config)
    assert [path.name for path in Path(config.out).rglob("step-*")] == ([] if step == 6 else ["step-00000001"])
    assert not (Path(config.out) / "final").exists()


# Held-out text


def test_held_out_documents_are_not_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    original = loop.start
    monkeypatch.setattr(loop, "start", lambda *args, **kwargs: seen.append(original(*args, **kwargs)) or seen[-1])
    for out in ("first", "second"):
        train(make_run(tmp_path, out=out, steps=1, data={"eval_fraction": 0.25}))
    sizes = [(len(started.rows.starts), len(started.held_out.starts)) for started in seen]
    assert sizes == [(45, 15)] * 2
    assert seen[0].content() == seen[1].content()


def test_one_document_cannot_be_split(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text(" ".join(LINES))
    config = make_run(tmp_path, steps=1, data={"files": (str(tmp_path / "one.txt"),)})
    with pytest.warns(UserWarning, match=r"data\.eval_fraction = 0\.05 is ignored"):
        assert train(config).evaluations == []


def test_files_may_be_held_out_by_name(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text(" ".join(LINES))
    config = make_run(tmp_path, steps=1, data={"eval_files": (str(tmp_path / "one.txt"),)})
    assert [line["step"] for line in train(config).evaluations] == [0, 1]


# The console


@pytest.mark.parametrize("terminal", [True, False])
def test_the_progress_line_says_what_matters(tmp_path: Path, terminal: bool) -> None:
    shown = StringIO()
    train(make_run(tmp_path, upcycle=SPARSE, steps=2), console=Console(file=shown, force_terminal=terminal, width=200))
    text = shown.getvalue()
    assert all(word in text for word in ("loss ", "tokens/s", "load max/mean", "ETA", "held-out loss"))
    assert terminal == ("\x1b[" in text)
