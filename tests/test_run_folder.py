"""The folder of a run: whose it is, who may write there, and what is left when something breaks."""

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import weakref
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from rich.console import Console

from moewright.checkpoint.state import SavedState
from moewright.data.pack import Batch
from moewright.errors import CheckpointError, DataError, ModelError, ResourceError, UsageError
from moewright.train import folder as run_folder
from moewright.train import loop, resume, saving, start
from moewright.train.config import RunConfig
from moewright.train.folder import open_run
from moewright.train.loop import train
from moewright.train.metrics import JsonLines, read_json_lines
from moewright.train.objective import CausalLanguageModel
from moewright.train.run_file import to_toml
from tests.models import tiny_tokenizer, write_dense
from tests.runs import LINES, at_step, evaluations, make_run, metrics, send


def content(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def crash(_: Any) -> None:
    raise KeyError("a crash")


# Whose folder


@pytest.mark.parametrize("name", ["config.toml", "metrics.jsonl", "final/model.safetensors", "cache/file"])
def test_a_strangers_folder_is_neither_used_nor_changed(tmp_path: Path, name: str) -> None:
    config = make_run(tmp_path, out="theirs")
    file = Path(config.out) / name
    file.parent.mkdir(parents=True)
    file.write_text("theirs")
    before = content(Path(config.out))
    with pytest.raises(UsageError, match=r"not empty and holds no run \(no moewright-run\.json\)"):
        train(config)
    assert content(Path(config.out)) == before


def test_what_a_killed_start_leaves_is_cleared(tmp_path: Path) -> None:
    config = make_run(tmp_path, steps=1)
    (Path(config.out) / run_folder.CACHE / "sub").mkdir(parents=True)
    train(config)
    assert not (Path(config.out) / run_folder.CACHE).exists()


@pytest.mark.parametrize("out", ["text.jsonl/run", "/proc/run", "n" * 300])
def test_a_folder_that_cannot_be_made_is_a_usage_error(tmp_path: Path, out: str) -> None:
    with pytest.raises(UsageError, match="cannot be written"):
        train(make_run(tmp_path, out=out))


def test_two_processes_do_not_share_a_folder(tmp_path: Path) -> None:
    config = make_run(tmp_path, steps=1)
    (tmp_path / "run.toml").write_text(to_toml(config))
    (tmp_path / "link").symlink_to("run")
    with open_run(Path(config.out)):
        (Path(config.out) / run_folder.CACHE).mkdir()
        for out in (config.out, str(tmp_path / "link")):
            with pytest.raises(UsageError, match="is in use by another process"):
                train(replace(config, out=out))
        command = [sys.executable, "-m", "moewright", "train", str(tmp_path / "run.toml")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert [path.name for path in Path(config.out).iterdir()] == [run_folder.CACHE]
    assert train(config).steps == 1


def test_a_file_system_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(descriptor: int, operation: int) -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with pytest.warns(UserWarning, match="no locks on this file system"), open_run(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()
    assert not (tmp_path / "run").exists()


def test_a_cache_that_cannot_be_removed_fails_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_run(tmp_path, steps=1)
    rmdir = os.rmdir

    def busy(path: Any, **options: Any) -> None:
        if str(path).endswith(run_folder.CACHE):
            raise OSError(errno.ENOTEMPTY, "Directory not empty")
        rmdir(path, **options)

    monkeypatch.setattr(os, "rmdir", busy)
    assert train(config).steps == 1
    assert (Path(config.out) / run_folder.CACHE).exists()


# What is refused before the work


def test_cheap_mistakes_are_told_before_the_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_run(tmp_path)
    text = str(tmp_path / "text.jsonl")
    (tmp_path / "link.jsonl").symlink_to(text)

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the model is loaded")

    monkeypatch.setattr(start, "fill", never)
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"files": ("no.txt",)}, DataError, "no such file"),
        ({"eval_files": (text,)}, UsageError, r"text\.jsonl is in data\.files and in data\.eval_files"),
        ({"eval_files": (str(tmp_path / "link.*"),)}, UsageError, r"text\.jsonl is in data\.files and in"),
        ({"sequence_length": 129}, UsageError, "sequence_length = 129, but the model has 128 positions"),
    ]
    for changes, error, message in cases:
        with pytest.raises(error, match=message):
            train(replace(config, data=replace(config.data, **changes)))
    with pytest.raises(AssertionError, match="the model is loaded"):
        train(replace(config, data=replace(config.data, sequence_length=128)))
    assert not Path(config.out).exists()


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    config = make_run(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"word{n}" for n in range(10)])
    tokenizer.save_pretrained(config.model)
    with pytest.raises(ModelError, match="the tokenizer has 267 tokens, but the model's embedding has 264 rows"):
        train(config)


def test_settings_without_effect_are_warned_of(tmp_path: Path) -> None:
    config = make_run(tmp_path, steps=1, warmup_steps=0, schedule="constant", min_learning_rate_ratio=0.2)
    with pytest.warns(UserWarning, match=r"min_learning_rate_ratio = 0\.2 is ignored: train\.schedule is constant"):
        train(config)
    config = make_run(tmp_path, out="other", steps=1)
    with pytest.warns(UserWarning, match=r"moe\.z_loss = 0\.5 is ignored: the model has no mixture"):
        train(replace(config, moe=replace(config.moe, z_loss=0.5)))


def test_a_disk_without_room_for_the_result_is_told_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage(NamedTuple):
        free: int = 50_000

    config = make_run(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage())
    size = (Path(config.model) / "model.safetensors").stat().st_size
    with pytest.raises(ResourceError, match=r"(\d+) bytes are needed, 50000 are free") as caught:
        train(config)
    assert size - 5000 < int(str(caught.value).split(": ")[1].split()[0]) < size
    assert not Path(config.out).exists()


# What is left when something breaks


def test_a_result_that_cannot_be_written_costs_no_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, full = make_run(tmp_path, out="whole"), make_run(tmp_path, out="full")
    train(whole)

    def no_room(*args: Any, **kwargs: Any) -> None:
        raise ResourceError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_model", no_room)
        with pytest.raises(ResourceError, match="no room"):
            train(full)
    at_step(monkeypatch, 6, crash)  # a step that is made again would not pass
    train(full)
    assert metrics(whole) == metrics(full)
    name = "final/model.safetensors"
    assert (Path(whole.out) / name).read_bytes() == (Path(full.out) / name).read_bytes()


def test_a_finished_run_is_only_that_of_its_model_and_text(tmp_path: Path) -> None:
    (tmp_path / "held.txt").write_text(" ".join(LINES))
    config = make_run(tmp_path, steps=2, data={"eval_files": (str(tmp_path / "held.txt"),)})
    result = train(config)
    before = content(Path(config.out))
    other = write_dense(tmp_path / "other", seed=1)
    (tmp_path / "more.txt").write_text("more text")
    more = str(tmp_path / "more.txt")
    for changed, name in [
        (replace(config, model=str(other)), "model"),
        (replace(config, data=replace(config.data, files=(*config.data.files, more))), r"data\.files"),
        (replace(config, data=replace(config.data, eval_files=(more,))), r"data\.eval_files"),
        (replace(config, data=replace(config.data, eval_files=())), r"data\.eval_files"),
    ]:
        with pytest.raises(CheckpointError, match=rf"final belongs .* settings: {name} \(other content\); restore"):
            train(changed)
    moved = Path(config.model).rename(tmp_path / "moved")
    assert train(replace(config, model=str(moved))) == result
    assert content(Path(config.out)) == before


@pytest.mark.parametrize(("name", "message"), [("metrics.jsonl", "has no step"), ("moewright-run.json", "damaged")])
def test_a_finished_run_that_lost_a_file_says_which(tmp_path: Path, name: str, message: str) -> None:
    config = make_run(tmp_path, steps=1)
    train(config)
    (Path(config.out) / name).write_text("" if name == "metrics.jsonl" else "{}")
    with pytest.raises(CheckpointError, match=rf"{name}.* {message}"):
        train(config)


def crashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    config = make_run(tmp_path, out="crashed")
    with monkeypatch.context() as patch:
        at_step(patch, 3, crash)
        with pytest.raises(KeyError):
            train(config)
    assert [line["step"] for line in metrics(config)] == [1, 2]
    return config


def test_a_run_without_checkpoint_begins_again_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, whole = crashed(tmp_path, monkeypatch), make_run(tmp_path, out="whole")
    train(whole)
    (Path(config.out) / "evaluations.jsonl").write_text('{"step": 0, "loss": 1.0, "tokens": 1}\n')
    with pytest.warns(UserWarning, match="2 steps were made and no checkpoint was saved: beginning at step 0 again"):
        train(config)
    assert metrics(config) == metrics(whole)
    assert evaluations(config) == evaluations(whole)


def test_history_of_other_settings_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = crashed(tmp_path, monkeypatch)
    before = content(Path(config.out))
    for changed, message in [
        (
            replace(config, train=replace(config.train, steps=7)),
            r"train\.steps \(6 then, 7 now\).* or delete the run's",
        ),
        (replace(config, model=str(write_dense(tmp_path / "other", seed=1))), r"model \(other content\)"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            train(changed)
    assert content(Path(config.out)) == before


@pytest.mark.parametrize("damage", [b"\0" * 20 + b"\n", b'{"step": 3\n', b"[]\n", b"\xff\n", b'{"step": "3"}\n'])
def test_lines_after_a_damaged_one_are_dropped(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + damage + b'{"step": 4}\n')
    assert read_json_lines(path) == [{"step": 1}, {"step": 2}]
    with JsonLines(path, after=9) as lines:
        lines.write({"step": 3})
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n{"step": 3}\n'


def test_a_line_is_on_the_disk_when_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync, seen = os.fsync, []
    with JsonLines(tmp_path / "lines.jsonl", after=0) as lines:
        monkeypatch.setattr(os, "fsync", lambda fd: seen.append(os.fstat(fd).st_size) or fsync(fd))
        lines.write({"step": 1})
    assert seen == [len('{"step": 1}\n')]


# Stopping and resuming


def test_a_signal_ends_an_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, stopped = make_run(tmp_path, out="whole"), make_run(tmp_path, out="stopped")
    train(whole)
    original, calls = CausalLanguageModel.loss, []

    def loss(objective: CausalLanguageModel, model: Any, batch: Batch) -> torch.Tensor:
        calls.append(model.training)
        if len(calls) == 1:
            signal.raise_signal(signal.SIGTERM)
        return original(objective, model, batch)

    with monkeypatch.context() as patch:
        patch.setattr(CausalLanguageModel, "loss", loss)
        with pytest.raises(loop.Preempted, match="stopped and saved after step 0 of 6"):
            train(stopped)
    assert calls == [False]
    assert evaluations(stopped) == []
    train(stopped)
    assert (evaluations(stopped), metrics(stopped)) == (evaluations(whole), metrics(whole))


def test_a_step_is_saved_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_run(tmp_path, checkpoint_every=1)
    saved, original = [], saving.write_rank
    monkeypatch.setattr(
        saving, "write_rank", lambda path, **k: saved.append(int(path.name[5:13])) or original(path, **k)
    )
    with monkeypatch.context() as patch:
        at_step(patch, 3, send(signal.SIGTERM))
        with pytest.raises(loop.Preempted):
            train(config)
    train(config)
    assert saved == [1, 2, 3, 4, 5, 6]


def test_resuming_holds_no_tensor_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_run(tmp_path, checkpoint_every=3)
    with monkeypatch.context() as patch:
        at_step(patch, 4, crash)
        with pytest.raises(KeyError):
            train(config)
    weights: list[weakref.ref[torch.Tensor]] = []
    moments: list[weakref.ref[torch.Tensor]] = []
    read, filled = SavedState.read, resume.set_moments

    def spy(self: SavedState, name: str, *args: Any) -> torch.Tensor:
        assert sum(weight() is not None for weight in weights) == 0, "a second weight is held"
        assert sum(moment() is not None for moment in moments) == 0, "a second moment is held"
        tensor = read(self, name, *args)
        held = {"model": weights, "optimizer": moments}.get(name.partition(".")[0], [])
        held.append(weakref.ref(tensor))
        return tensor

    def set_moments(model: Any, optimizer: Any, tensors: Any) -> None:
        assert not any(weight() is not None for weight in weights), "a weight is held beside the model's"
        filled(model, optimizer, tensors)

    monkeypatch.setattr(SavedState, "read", spy)
    monkeypatch.setattr(resume, "set_moments", set_moments)
    train(config)
    assert len(weights) > 10
    assert len(moments) > 20


def test_another_number_of_threads_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, before = make_run(tmp_path), torch.get_num_threads()
    at_step(monkeypatch, 2, send(signal.SIGTERM))
    with pytest.raises(loop.Preempted):
        train(config)
    shown = StringIO()
    try:
        torch.set_num_threads(before + 1)
        train(config, console=Console(file=shown, width=500))
    finally:
        torch.set_num_threads(before)
    assert f"torch has {before + 1} threads and had {before} when" in shown.getvalue()


def test_settings_of_another_version_have_their_defaults(tmp_path: Path) -> None:
    now = {"train.steps": 3, "train.clip_norm": 1.0, "data.eval_files": "", "upcycle": None}
    resume.require_same_run({"train.steps": 3, "data.eval_files": ""}, now, where=tmp_path)
    resume.require_same_run(now, {"train.steps": 3, "data.eval_files": ""}, where=tmp_path)
    with pytest.raises(CheckpointError, match=r"settings: train\.clip_norm \(1\.0 then, 2\.0 now\);"):
        resume.require_same_run({"train.steps": 3}, {"train.steps": 3, "train.clip_norm": 2.0}, where=tmp_path)
    with pytest.raises(CheckpointError, match=r"settings: train\.steps \(None then, 3 now\);"):
        resume.require_same_run({}, {"train.steps": 3}, where=tmp_path)
