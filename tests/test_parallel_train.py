"""Training runs on several ranks: the losses of one process, one state for all layouts, and nobody hangs."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM

from moewright.backbone.load import load_model
from moewright.checkpoint.read import ModelFolder
from moewright.errors import CheckpointError, MoewrightError, Preempted, ResourceError, UsageError
from moewright.moe.config import MoESettings
from moewright.parallel.config import ParallelConfig
from moewright.parallel.experts import local_part
from moewright.parallel.parts import on_first_rank
from moewright.parallel.ranks import LOST, Ranks
from moewright.train.config import RunConfig
from moewright.train.loop import train
from moewright.train.run_file import to_toml
from moewright.train.start import divide, start
from moewright.upcycle.config import UpcycleConfig
from tests.imports import ROOT
from tests.ranks import expected_part, on_ranks
from tests.runs import at_step, evaluations, make_run, metrics, send

SPARSE = UpcycleConfig(experts=4, top_k=2, router_std=0.5)
E_D = ParallelConfig()
E_D_Z = ParallelConfig(layout="E+D+Z", ep=1, zero=3)
E_Z = ParallelConfig(layout="E+Z", zero=1)
E_D_M = ParallelConfig(layout="E+D+M", tp=2)
SLICES = ParallelConfig(layout="E+Z-Off+M", tp=2, etp=2, zero=3)
GLOBAL = MoESettings(capacity_factor=1.0, min_capacity=1, balance_loss=0.05, balance_scope="global")
RANDOM = MoESettings(capacity_factor=1.0, min_capacity=1, drop_policy="random", logit_noise=0.1, balance_loss=0.05)


def make(folder: Path, parallel: ParallelConfig = E_D, **settings: Any) -> RunConfig:
    settings = {"upcycle": SPARSE} | settings
    return replace(make_run(folder, **settings), parallel=parallel)


def run(rank: int, *, configs: list[RunConfig], stop_at: int | None = None, stop_rank: int = 0) -> None:
    """Train each; with `stop_at`, one rank has SIGTERM in that step, and all must stop."""
    for config in configs:
        with pytest.MonkeyPatch.context() as patch:
            if stop_at is None:
                train(config)
                continue
            if rank == stop_rank:
                at_step(patch, stop_at, send(signal.SIGTERM))
            with pytest.raises(Preempted, match=f"SIGTERM: stopped and saved after step {stop_at}") as stopped:
                train(config)
            assert stopped.value.told == (rank > 0)


def train_on(ranks: int, folder: Path, *configs: RunConfig, **stop: int) -> None:
    folder.mkdir()
    on_ranks(partial(run, configs=list(configs), **stop), folder, ranks=ranks)


def assert_same_losses(config: RunConfig, expected: RunConfig) -> None:
    ours, right = metrics(config), metrics(expected)
    assert [line["step"] for line in ours] == [line["step"] for line in right]
    for line, other in zip(ours, right, strict=True):
        for name in ("loss", "grad_norm", *(("z_loss", "router_norm") if "z_loss" in other else ())):
            assert line[name] == pytest.approx(other[name], rel=2e-5), (line["step"], name)
        for name in ("step_tokens", "step_targets", "tokens", "lr"):
            assert line[name] == other[name]
    assert ours[0].get("load") == right[0].get("load"), "counts are those of all ranks, each token once"
    assert evaluations(config) == [(step, pytest.approx(loss, rel=2e-5)) for step, loss in evaluations(expected)]
    trained, right_model = (load_model(Path(c.out) / "final") for c in (config, expected))
    for (name, ours_), (_, right_) in zip(trained.named_parameters(), right_model.named_parameters(), strict=True):
        torch.testing.assert_close(ours_, right_, rtol=1e-3, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


def test_two_ranks_train_as_one_process(tmp_path: Path) -> None:
    cases: dict[str, tuple[ParallelConfig | None, dict[str, Any]]] = {
        "default": (None, {}),
        "uneven": (E_D_Z, {"batch_size": 3, "micro_batch_size": 1, "gradient_checkpointing": True}),
        "fewer micro-batches than ranks": (E_Z, {"batch_size": 1, "micro_batch_size": 1}),
        "dense": (ParallelConfig(zero=3), {"upcycle": None}),
        "the same rows on both": (E_D_M, {"moe": GLOBAL}),  # which one process alone knows of a whole step
        "slices": (SLICES, {}),
    }
    alone = [make(tmp_path, out=f"{name} alone", **settings) for name, (_, settings) in cases.items()]
    several = [make(tmp_path, parallel, out=name, **settings) for name, (parallel, settings) in cases.items()]
    for config in alone:
        train(config)
    train_on(2, tmp_path / "ranks", *several)
    for config, expected in zip(several, alone, strict=True):
        assert_same_losses(config, expected)
        assert sorted(path.name for path in Path(config.out).iterdir()) == sorted(
            path.name for path in Path(expected.out).iterdir()
        )


def test_a_run_goes_on_in_any_layout(tmp_path: Path) -> None:
    expected = make(tmp_path, out="expected", steps=6)
    train(expected)
    config = make(tmp_path, steps=6)
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 1, send(signal.SIGTERM))
        with pytest.raises(Preempted):
            train(config)
    train_on(2, tmp_path / "a", replace(config, parallel=E_D_Z), stop_at=2, stop_rank=1)
    train_on(2, tmp_path / "b", replace(config, parallel=SLICES), stop_at=3, stop_rank=1)
    train_on(2, tmp_path / "c", replace(config, parallel=E_D_M), stop_at=4)
    train_on(2, tmp_path / "d", config, stop_at=5)
    train(config)
    assert_same_losses(config, expected)


@pytest.mark.slow
def test_a_run_goes_on_with_four_ranks_and_with_two(tmp_path: Path) -> None:
    # No balance loss, which is one of micro-batches: four ranks have smaller ones.
    moe = MoESettings(balance_loss=0.0, z_loss=0.01)
    expected = make(tmp_path, out="expected", steps=6, moe=moe)
    train(expected)
    config = make(tmp_path, steps=6, moe=moe)
    sharded = ParallelConfig(layout="E+D+Z", ep=2, zero=3)
    copies = ParallelConfig(ep=2, zero=2, dp_replicate=2)
    slices = ParallelConfig(tp=2, etp=2, ep=1, zero=1)
    train_on(4, tmp_path / "a", replace(config, parallel=sharded), stop_at=1, stop_rank=3)
    train_on(2, tmp_path / "b", replace(config, parallel=E_Z), stop_at=3)
    train_on(4, tmp_path / "c", replace(config, parallel=slices), stop_at=4, stop_rank=2)
    train_on(4, tmp_path / "d", replace(config, parallel=copies), stop_at=5, stop_rank=1)
    train(config)
    assert_same_losses(config, expected)


def test_a_stopped_run_goes_on_to_the_last_bit_in_the_same_layout(tmp_path: Path) -> None:
    whole, stopped = (make(tmp_path, E_Z, out=out, steps=4, moe=RANDOM) for out in ("whole", "stopped"))
    train_on(2, tmp_path / "a", whole)
    train_on(2, tmp_path / "b", stopped, stop_at=2, stop_rank=1)
    train_on(2, tmp_path / "c", stopped)
    assert metrics(stopped) == metrics(whole)
    assert any(line["dropped_share"] > 0 for line in metrics(whole))
    files = [(Path(config.out) / "final" / "model.safetensors").read_bytes() for config in (whole, stopped)]
    assert files[0] == files[1]


def holds_only_its_part(rank: int, *, config: RunConfig) -> None:
    read: dict[str, int] = {}
    original = ModelFolder.read

    def spy(self: ModelFolder, name: str, index: tuple[slice, ...] | None = None) -> torch.Tensor:
        tensor = original(self, name, index)
        read[name] = read.get(name, 0) + tensor.numel()
        return tensor

    ranks = Ranks(rank=rank, size=dist.get_world_size())
    cache = Path(config.out).parent / f"cache-{config.parallel.zero}-{rank}"
    cache.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelFolder, "read", spy)
        prepare = partial(divide, config=config, ranks=ranks, note=lambda text: None)
        model = start(config, cache_dir=cache, prepare=prepare).model
    whole = load_model(config.model)
    expected = dict(whole.named_parameters())
    held = 0
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        assert torch.equal(local_part(parameter), expected_part(parameter, parameter.full_tensor()))
        if name in expected:
            assert torch.equal(parameter.full_tensor(), expected[name]), name
        held += local_part(parameter).numel()
        assert local_part(parameter).shape[0] <= parameter.shape[0] // 2 or ".experts." not in name
    total = sum(parameter.numel() for parameter in model.parameters())
    sharded = config.parallel.zero == 3
    assert held == total // 2 if sharded else total // 2 < held < total
    table = "model.embed_tokens.weight"
    assert read[table] == expected[table].numel() // (2 if sharded else 1)


def test_no_rank_holds_or_reads_the_whole_model(tmp_path: Path) -> None:
    for zero in (0, 3):
        config = make(tmp_path, ParallelConfig(ep=2, zero=zero))
        (tmp_path / f"zero {zero}").mkdir()
        on_ranks(partial(holds_only_its_part, config=config), tmp_path / f"zero {zero}")


def stops_together(rank: int, *, config: RunConfig) -> None:
    def poison(model: nn.Module) -> None:
        if rank == 1:  # the loss of the next step is not a number here, and nowhere else
            model.lm_head.register_forward_hook(lambda module, args, logits: logits * torch.nan)

    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 2, poison)
        with pytest.raises(CheckpointError, match="step 3: loss is nan") as diverged:
            train(config)
    assert diverged.value.told == (rank > 0)


def fails_in_a_step(rank: int, *, config: RunConfig) -> None:
    def fill_the_disk(model: nn.Module) -> None:
        if rank == 1:
            raise ResourceError("the disk is full")

    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 2, fill_the_disk)
        if rank == 0:
            with pytest.raises(RuntimeError) as lost:
                train(config)
            assert LOST.search(str(lost.value))
            return
        with pytest.raises(ResourceError) as alone:
            train(config)
    assert alone.value.told is False, "no other rank knows the reason"


def test_a_loss_that_is_not_finite_on_one_rank_stops_all(tmp_path: Path) -> None:
    on_ranks(partial(stops_together, config=make(tmp_path)), tmp_path)


def test_what_fails_on_one_rank_in_a_step_is_told_by_it(tmp_path: Path) -> None:
    on_ranks(partial(fails_in_a_step, config=make(tmp_path)), tmp_path)


def fails_alone(rank: int, *, config: RunConfig) -> None:
    ranks = Ranks(rank=rank, size=2)

    def fail_on(failing: int, error: Exception) -> Callable[[], None]:
        def work() -> None:
            with ranks.agreeing():
                if rank == failing:
                    raise error

        return work

    with pytest.raises(ResourceError, match="rank 1 has failed" if rank == 0 else "the disk") as stopped:
        fail_on(1, ResourceError("the disk is full"))()
    assert stopped.value.told == (rank == 0)

    def full(bring: Any) -> None:
        bring(parameter, ())
        raise ResourceError("the disk is full")

    model = start(
        config,
        cache_dir=Path(config.out).parent / str(rank),
        prepare=partial(divide, config=config, ranks=ranks, note=lambda text: None),
    ).model
    parameter = next(model.parameters())
    with pytest.raises(ResourceError) as stopped:
        on_first_rank(model.parameters(), full, ranks=ranks)
    assert stopped.value.told == (rank > 0)

    odd = AutoConfig.for_model("llama", hidden_size=24, num_attention_heads=3, num_key_value_heads=3, vocab_size=8)
    notes: list[str] = []
    without = replace(config, parallel=ParallelConfig(layout="E+Z-Off+M"))
    parallel = divide(AutoModelForCausalLM.from_config(odd), without, ranks=ranks, note=notes.append)
    assert (parallel.degrees.tp, parallel.degrees.zero) == (1, 2)
    assert notes[1].startswith("without tensor slicing: nothing but 1 divides 2 ranks, ")
    assert "3 attention heads" in notes[1]

    refused = replace(config, parallel=ParallelConfig(ep=3))
    with pytest.raises(UsageError, match=r"parallel\.ep = 3 with 2 ranks and 4 experts a layer: choose 1 or 2"):
        train(refused)


def test_what_fails_on_one_rank_fails_on_all(tmp_path: Path) -> None:
    config = make(tmp_path, ParallelConfig(ep=2))
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    on_ranks(partial(fails_alone, config=config), tmp_path)
    assert not Path(config.out).exists()


@pytest.mark.parametrize("whom", ["launcher", "rank", "rank killed"])
def test_signals_under_torchrun(tmp_path: Path, whom: str) -> None:
    background = {"checkpoint_every": 1, "async_checkpoints": True} if whom == "launcher" else {}
    config = make(tmp_path, steps=100_000, data={"eval_fraction": 0.0}, **background)
    (tmp_path / "run.toml").write_text(to_toml(config))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    command += ["-m", "moewright", "train", str(tmp_path / "run.toml")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log)
    lines = Path(config.out) / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not (lines.exists() and lines.read_text().count("\n") >= 2):
        assert process.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    began = time.monotonic()
    if whom == "launcher":
        process.terminate()
    else:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[1]), signal.SIGKILL if whom == "rank killed" else signal.SIGTERM)
    assert process.wait(timeout=60) != 0
    assert time.monotonic() - began < 30
    shown = (tmp_path / "log").read_text()
    if whom == "rank killed":
        assert len(re.findall(r"moewright: error: rank 0 has lost another one \(.*goes on from the newest", shown)) == 1
        return
    (step,) = re.findall(r"error: SIGTERM: stopped and saved after step (\d+) of 100000", shown)
    states = sorted(path.name for path in (Path(config.out) / "checkpoints").iterdir())
    assert states[-1] == f"step-{int(step):08}"
    assert len(states) == (2 if background else 1)
    assert not any("tmp" in name for name in states)
    if whom == "rank":  # the launcher says how the rank ended that it saw first
        assert re.search(r"exitcode\s*: 75", shown), shown


def test_degrees_are_refused_before_upcycling_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    upcycle = replace(SPARSE, router_order="softmax-topk", calibration_text=str(tmp_path / "text.jsonl"))
    config = make(tmp_path, ParallelConfig(ep=3), upcycle=upcycle)
    measured: list[Any] = []
    monkeypatch.setattr("moewright.train.start.measure", lambda plan: measured.append(plan))
    ranks = Ranks(size=4)
    prepare = partial(divide, config=config, ranks=ranks, note=lambda text: None)
    with pytest.raises(UsageError, match=r"parallel\.ep = 3 with 4 ranks and 4 experts a layer: choose 2 or 4"):
        start(config, cache_dir=tmp_path, prepare=prepare)
    assert not measured


def takes_the_first_choice(rank: int, *, config: RunConfig, small: RunConfig) -> None:
    train(config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.sysconf", lambda name: 1 if name == "SC_PAGE_SIZE" else 2**27)
        with pytest.raises(MoewrightError, match=r"a process takes 400 MB before the model does|rank 0 has failed"):
            train(small)


def test_without_a_table_the_planner_chooses(tmp_path: Path) -> None:
    expected = make(tmp_path, out="expected", steps=2)
    train(expected)
    config, small = (replace(expected, out=str(tmp_path / out), parallel=None) for out in ("chosen", "small"))
    (tmp_path / "ranks").mkdir()
    on_ranks(partial(takes_the_first_choice, config=config, small=small), tmp_path / "ranks")
    assert_same_losses(config, expected)
    chosen = (Path(config.out) / "config.toml").read_text()
    assert re.search(r"\[parallel\]\n(.*\n)*ep = \d", chosen), chosen
    assert not (tmp_path / "small").exists()
