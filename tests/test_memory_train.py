"""Runs that keep things elsewhere, in less, or compute them again: the same training, and no file is ever needed."""

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moewright.checkpoint.read import ModelFolder
from moewright.errors import Preempted, ResourceError, UsageError
from moewright.optim.blockwise import BLOCK, Blockwise
from moewright.parallel import memory
from moewright.parallel.config import ParallelConfig
from moewright.train.config import RunConfig
from moewright.train.loop import train
from moewright.train.run_file import to_toml
from moewright.upcycle.config import UpcycleConfig
from tests.imports import ROOT
from tests.runs import at_step, evaluations, make_run, metrics, send

SPARSE = UpcycleConfig(experts=4, top_k=2, router_std=0.5)


def make(folder: Path, parallel: ParallelConfig | None = None, **settings: Any) -> RunConfig:
    return replace(make_run(folder, **{"upcycle": SPARSE, "steps": 4} | settings), parallel=parallel)


def on_disk(folder: Path, what: str, **others: Any) -> ParallelConfig:
    return ParallelConfig(offload=what, offload_to="disk", offload_folder=str(folder / "fast disk"), **others)


def weights(config: RunConfig) -> bytes:
    return (Path(config.out) / "final" / "model.safetensors").read_bytes()


def stop_after(config: RunConfig, step: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, step, send(signal.SIGTERM))
        with pytest.raises(Preempted):
            train(config)


def test_one_process_trains_to_the_bit_whatever_lies_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "SMALLEST", 1)
    expected = make(tmp_path, out="expected")
    train(expected)
    variants: list[Callable[[], ParallelConfig]] = [
        lambda: on_disk(tmp_path, "optimizer"),
        lambda: on_disk(tmp_path, "experts", recompute="block"),
        lambda: on_disk(tmp_path, "all", recompute="experts"),
        lambda: ParallelConfig(recompute="experts"),
    ]
    for number, variant in enumerate(variants):
        config = make(tmp_path, variant(), out=f"run {number}")
        if number == 2:  # and from a state, of another layout
            stop_after(replace(config, parallel=variants[0]()), 2)
        train(config)
        assert metrics(config) == metrics(expected), config.parallel
        assert evaluations(config) == evaluations(expected)
        assert weights(config) == weights(expected)
    assert list((tmp_path / "fast disk").iterdir()) == []


def test_a_run_goes_on_in_another_precision_and_to_the_bit_in_its_own(tmp_path: Path) -> None:
    low = {"dtype": "bfloat16", "param_dtype": "bfloat16"}
    for number, precision in enumerate([low, low | {"masters": "stochastic", "moments": "int8"}]):
        whole, stopped = (make(tmp_path, out=f"{out} {number}", **precision) for out in ("whole", "stopped"))
        train(whole)
        stop_after(stopped, 2)
        train(stopped)
        assert metrics(stopped) == metrics(whole)
        assert weights(stopped) == weights(whole)
        assert ModelFolder(Path(whole.out) / "final").dtype() == torch.bfloat16
    # Recomputing blocks under its older name, and back.
    expected, config = (make(tmp_path, out=out) for out in ("kept", "recomputed"))
    train(expected)
    stop_after(replace(config, parallel=ParallelConfig(recompute="block")), 1)
    stop_after(replace(config, train=replace(config.train, gradient_checkpointing=True)), 3)
    train(config)
    assert metrics(config) == metrics(expected)
    # From float32 to bfloat16 with masters and back: the state holds the masters, so nothing is rounded.
    expected, config = (make(tmp_path, out=out, dtype="bfloat16") for out in ("expected", "config"))
    train(expected)
    stop_after(config, 1)
    stop_after(replace(config, train=replace(config.train, param_dtype="bfloat16")), 3)
    train(config)
    for ours, right in zip(metrics(config), metrics(expected), strict=True):
        assert ours["loss"] == pytest.approx(right["loss"], rel=0.01)


LOW = {"dtype": "bfloat16", "param_dtype": "bfloat16"}


@pytest.mark.parametrize("what", ["optimizer", "experts", "all"])
@pytest.mark.parametrize(
    "precision",
    [{"moments": "int8"}, LOW, LOW | {"moments": "int8"}, LOW | {"masters": "stochastic", "moments": "bfloat16"}],
    ids=lambda p: "-".join(p.values()),
)
def test_the_room_that_is_asked_for_is_that_of_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, precision: dict[str, Any]
) -> None:
    monkeypatch.setattr(memory, "SMALLEST", 1)
    empty, made, asked = memory.MappedFiles.empty, list[int](), list[int]()

    def spy(self: memory.MappedFiles, *args: Any) -> torch.Tensor:
        tensor = empty(self, *args)
        made.append(tensor.nbytes)
        return tensor

    monkeypatch.setattr(memory.MappedFiles, "empty", spy)
    monkeypatch.setattr(memory.MappedFiles, "require_space", lambda self, needed: asked.append(needed))
    config = make(tmp_path, on_disk(tmp_path, what), steps=1, data={"eval_fraction": 0.0}, **precision)
    (tmp_path / "fast disk").mkdir()
    train(config)
    assert asked == [sum(made)]


@pytest.mark.parametrize("background", [False, True])
def test_moments_of_8_bits_are_saved_piece_by_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: bool
) -> None:
    settings = {"moments": "int8", "async_checkpoints": background, "checkpoint_every": 1}
    expected, config = (make(tmp_path, out=out, **settings) for out in ("expected", "config"))
    monkeypatch.setattr("moewright.optim.blockwise.PIECE", BLOCK)
    monkeypatch.setattr(Blockwise, "whole", None)
    train(expected)
    stop_after(config, 2)
    train(config)
    assert weights(config) == weights(expected)


def test_chunks_of_the_loss_change_nothing_but_rounding(tmp_path: Path) -> None:
    expected, config = (make(tmp_path, out=str(n), loss_chunk_tokens=n) for n in (0, 7))
    train(expected)
    train(config)
    for ours, right in zip(metrics(config), metrics(expected), strict=True):
        assert ours["loss"] == pytest.approx(right["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(right["grad_norm"], rel=1e-5)
    assert evaluations(config) == [(step, pytest.approx(loss, rel=1e-5)) for step, loss in evaluations(expected)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"offload": "all", "offload_to": "disk"}, "offload_to=disk without offload_folder"),
        ({"offload": "all", "offload_folder": "x"}, "offload_folder=x with offload_to=cpu"),
        ({"offload_to": "disk", "offload_folder": "x"}, "offload_to=disk with offload=none: choose one of optimizer"),
        ({"layout": "E+Z-Off+M", "offload": "none"}, "offload=none with layout=E.Z-Off.M: choose one of optimizer"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ParallelConfig(**settings)


def test_what_has_no_effect_is_said(tmp_path: Path) -> None:
    config = make(tmp_path, ParallelConfig(offload="all"), steps=1)
    with pytest.warns(UserWarning, match=r"parallel\.offload = all is ignored: on a CPU the host's memory is"):
        train(config)
    with pytest.raises(UsageError, match="param_dtype=bfloat16 with dtype=float32"):
        make(tmp_path, param_dtype="bfloat16")
    with pytest.raises(UsageError, match=r"gradient_checkpointing=True with parallel\.recompute=experts"):
        make(tmp_path, ParallelConfig(recompute="experts"), gradient_checkpointing=True)


def test_case_39_a_full_disk_is_said_before_any_weight_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make(tmp_path, on_disk(tmp_path, "all"))
    usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: _Usage() if "fast" in str(path) else usage(path))
    monkeypatch.setattr(ModelFolder, "read", None)
    with pytest.raises(ResourceError, match=r"fast disk: \d+ bytes are needed for what is offloaded there, 1000 are"):
        train(config)


class _Usage:
    free = 1000


def test_case_39_a_disk_that_fills_up_is_an_error_and_the_run_goes_on_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = make(tmp_path, out="expected")
    train(expected)
    config = make(tmp_path, on_disk(tmp_path, "all"))
    stop_after(config, 2)
    with monkeypatch.context() as patch:
        patch.setattr(memory, "SMALLEST", 1)
        patch.setattr(os, "posix_fallocate", _full)
        with pytest.raises(ResourceError, match="No space left"):
            train(config)
    train(replace(config, parallel=None))
    assert metrics(config) == metrics(expected)
    assert weights(config) == weights(expected)


def _full(descriptor: int, first: int, size: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("damage", ["killed", "truncated"])
def test_case_39_a_run_never_needs_its_files_again(tmp_path: Path, damage: str) -> None:
    expected = make(tmp_path, out="expected", steps=200, checkpoint_every=1, data={"eval_fraction": 0.0})
    config = replace(expected, out=str(tmp_path / "run"), parallel=on_disk(tmp_path, "all"))
    (tmp_path / "run.toml").write_text(to_toml(config))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    code = (
        "import sys; from moewright.parallel import memory; memory.SMALLEST = 1; from moewright.cli import main; "
        "main(['train', sys.argv[1]])"
    )
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "run.toml")], env=environment, stdout=log, stderr=log
        )
    states, deadline = Path(config.out) / "checkpoints", time.monotonic() + 200
    while not list(states.glob("step-*2")):
        assert process.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert list((tmp_path / "fast disk").iterdir()) == []
    if damage == "killed":
        process.kill()
    else:  # someone who finds the files without names all the same
        for link in Path(f"/proc/{process.pid}/map_files").glob("*"):
            with suppress(FileNotFoundError, ProcessLookupError):  # gone meanwhile
                if ".offload-" in str(link.readlink()):
                    os.truncate(link, 0)
    assert process.wait(timeout=60) == (-signal.SIGKILL if damage == "killed" else -signal.SIGBUS)
    done = max(int(path.name[5:]) for path in states.iterdir() if re.fullmatch(r"step-\d+", path.name))
    stop_after(replace(config, parallel=None), done + 1)
    stop_after(expected, done + 1)
    assert metrics(config) == metrics(expected)
