"""States that several ranks write: from any layout to any other, and never lost to a kill, a full disk or a bad bit."""

import itertools
import os
import shutil
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from moewright.checkpoint import commit, files
from moewright.checkpoint.state import load_state, newest_state, open_state
from moewright.errors import CheckpointError, MoewrightError, Preempted, ResourceError
from moewright.moe.config import MoESettings
from moewright.optim.adamw import make_optimizer, moments, update
from moewright.parallel.apply import Parallel
from moewright.parallel.config import Degrees, ParallelConfig
from moewright.parallel.experts import local_part
from moewright.parallel.ranks import Ranks
from moewright.train import generators, saving
from moewright.train.config import RunConfig
from moewright.train.loop import train
from moewright.train.resume import Position, model_tensors
from moewright.train.saving import Saver
from moewright.upcycle.config import UpcycleConfig
from tests import forks
from tests.forks import on_forks, together
from tests.full_disk import largest_file
from tests.ranks import expected_part
from tests.runs import at_step, make_run, metrics, send

# Any layout to any other

LAYOUTS: dict[str, tuple[int, ParallelConfig | None]] = {
    "alone": (1, None),
    "E, 2": (2, ParallelConfig(layout="E")),
    "E+D, 2": (2, ParallelConfig(layout="E+D", ep=1)),
    "E+Z 1, 2": (2, ParallelConfig(layout="E+Z", zero=1)),
    "E+D+Z 3, 2": (2, ParallelConfig(layout="E+D+Z", ep=1, zero=3)),
    "E, 4": (4, ParallelConfig(layout="E")),
    "E+D, 4": (4, ParallelConfig(layout="E+D", ep=2)),
    "E+D+Z 1, 4": (4, ParallelConfig(layout="E+D+Z", ep=1, zero=1)),
    "E+D+Z 3, 4": (4, ParallelConfig(layout="E+D+Z", ep=2, zero=3)),
    "E+D+Z 2 in 2 copies, 4": (4, ParallelConfig(ep=2, zero=2, dp_replicate=2)),
}
"""Number of ranks and layout: add a line, and the product below has it."""
ROUND = ["alone", "E+D+Z 3, 2", "E+D+Z 2 in 2 copies, 4", "E, 2", "alone"]
STEPS, SAVED = 4, 2


def config_of(folder: Path, name: str, **settings: Any) -> RunConfig:
    # No balance loss, which is one of micro-batches: four ranks have smaller ones.
    moe = MoESettings(balance_loss=0.0, z_loss=0.01)
    upcycle = UpcycleConfig(experts=4, top_k=2, router_std=0.5)
    config = make_run(folder, out=name, steps=STEPS, moe=moe, upcycle=upcycle, checkpoint_every=SAVED, **settings)
    return replace(config, parallel=LAYOUTS[name.split(" to ")[-1]][1])


def goes_on_exactly(rank: int, *, config: RunConfig) -> None:
    """Train to the end; what a resume has read must be what is stored, of every tensor and on every rank."""
    restore = saving.restore

    def checked(path: Path, **rest: Any) -> Position:
        position = restore(path, **rest)
        state = open_state(path)
        here = {f"model.{name}": tensor for name, tensor in model_tensors(rest["model"]).items()}
        here |= {f"optimizer.{name}": tensor for name, tensor in moments(rest["model"], rest["optimizer"]).items()}
        assert here.keys() == {name for name in state.tensors if not name.startswith("random.")}
        for name, tensor in here.items():
            assert isinstance(tensor, Tensor)
            whole = state.read(name)
            assert torch.equal(local_part(tensor.detach()), expected_part(tensor, whole) if whole.dim() else whole), (
                name
            )
        return position

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "restore", checked)
        train(config)


def all_pairs(folder: Path, pairs: list[tuple[str, str]]) -> None:
    for name in dict.fromkeys(name for pair in pairs for name in pair):
        together(partial(run_of, config=config_of(folder, name)), ranks=LAYOUTS[name][0])
    for before, after in pairs:
        whole, config = config_of(folder, before), config_of(folder, f"{before} to {after}")
        shutil.copytree(whole.out, config.out)
        shutil.rmtree(Path(config.out) / "final")
        shutil.rmtree(Path(config.out) / "checkpoints" / f"step-{STEPS:08}")
        together(partial(goes_on_exactly, config=config), ranks=LAYOUTS[after][0])
        assert_same(config, whole, exact=before == after)


def run_of(rank: int, *, config: RunConfig) -> None:
    train(config)


def assert_same(config: RunConfig, whole: RunConfig, *, exact: bool) -> None:
    ours, right = metrics(config), metrics(whole)
    assert [line["step"] for line in ours] == list(range(1, STEPS + 1))
    if exact:
        assert ours == right
    for line, other in zip(ours, right, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-5), (config.out, line["step"])
    last = [load_state(Path(c.out) / "checkpoints" / f"step-{STEPS:08}")[0] for c in (config, whole)]
    assert {n for n in last[0] if not n.startswith("random.")} == {n for n in last[1] if not n.startswith("random.")}
    for name, tensor in last[0].items():
        if exact:
            assert torch.equal(tensor, last[1][name]), (config.out, name)
        elif name.startswith("model."):
            torch.testing.assert_close(tensor, last[1][name], rtol=1e-3, atol=1e-4)


def a_round(folder: Path) -> None:
    all_pairs(folder, [*itertools.pairwise(ROUND), (ROUND[2], ROUND[2])])


def the_product(folder: Path) -> None:
    all_pairs(folder, [(before, after) for before in LAYOUTS for after in LAYOUTS])


def test_runs_go_on_in_other_layouts(tmp_path: Path) -> None:
    forks.run(a_round, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_runs_go_on_from_any_layout_in_any_other(tmp_path: Path) -> None:
    forks.run(the_product, tmp_path)


# A model of three small parameters on two ranks


class Small(nn.Module):
    """Experts that are divided, a parameter in copies, a buffer on every rank."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        experts, copies = torch.arange(4 * 300.0).view(4, 300), torch.ones(50, 2)
        if ranks > 1:
            mesh = init_device_mesh("cpu", (ranks,))
            part = experts.chunk(ranks)[mesh.get_local_rank()].clone()
            experts = DTensor.from_local(part, mesh, [Shard(0)], run_check=False)
            copies = DTensor.from_local(copies, mesh, [Replicate()], run_check=False)
        self.experts, self.copies = nn.Parameter(experts), nn.Parameter(copies)
        self.register_buffer("counts", torch.zeros(10, dtype=torch.int64))


class Trained:
    """Some steps of such a model, and their states below `root`."""

    def __init__(self, root: Path, rank: int, *, ranks: int = 2, background: bool = False, keep: int = 2) -> None:
        self.model = Small(ranks)
        self.optimizer = make_optimizer(self.model, weight_decay=0.0, betas=(0.9, 0.9))
        self.position = Position()
        self.saver = Saver(
            root,
            model=self.model,
            optimizer=self.optimizer,
            identity={"train.steps": 3},
            parallel=Parallel(ranks=Ranks(rank=rank, size=ranks), degrees=Degrees(ranks=ranks, dp_replicate=ranks)),
            seed=0,
            keep=keep,
            background=background,
        )

    def step(self) -> None:
        self.position.step += 1
        self.position.tokens += 10
        for parameter in self.model.parameters():
            parameter.grad = torch.ones_like(parameter) * self.position.step
        update(self.optimizer, learning_rate=0.1)
        self.model.counts += self.position.step

    def resume(self) -> list[str]:
        """Go on from the newest state, which must hold what these steps make; returns the notes."""
        notes: list[str] = []
        path = self.saver.newest(notes.append)
        if path is None:
            return notes
        expected = Trained(path.parent, self.saver.ranks.rank, ranks=self.saver.ranks.size)
        while expected.position.step < int(path.name[5:]):
            expected.step()
        self.position = self.saver.resume(path, notes.append)
        assert self.position == expected.position
        assert_equal(self.tensors(), expected.tensors())
        return notes

    def tensors(self) -> dict[str, Tensor]:
        return {name: local_part(tensor.detach()).clone() for name, tensor in self.saver._tensors()[0].items()}


def assert_equal(ours: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert ours.keys() == right.keys()
    assert all(torch.equal(ours[name], right[name]) for name in right)


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def kill(*args: Any, **kwargs: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(stage: str) -> None:
    """Have this process killed at a stage of its next save."""
    write, rename = saving.write_rank, os.rename
    if stage == "before it writes":
        saving.write_rank = kill
    elif stage == "while it writes":
        calls = iter([files.HashedFile.write])
        files.HashedFile.write = lambda *args: next(calls, kill)(*args)
    elif stage == "when it has written":
        saving.write_rank = lambda *args, **kwargs: kill(write(*args, **kwargs))
    elif stage == "before the marker":
        commit.replace_text = kill
    else:

        def armed(source: Any, target: Any) -> None:
            if stage == "after the rename":
                rename(source, target)
            kill()

        assert stage in ("before the rename", "after the rename")
        os.rename = armed


STAGES = [(stage, rank) for stage in ("before it writes", "while it writes", "when it has written") for rank in (0, 1)]
STAGES += [(stage, 0) for stage in ("before the marker", "before the rename", "after the rename")]


def is_killed(rank: int, *, root: Path, background: bool, stage: str, victim: int) -> None:
    trained = Trained(root, rank, background=background)
    with trained.saver as saver:
        while trained.position.step < 5:
            trained.step()
            if trained.position.step == 2:
                saver.finish()
                if rank == victim:
                    arm(stage)
            saver.look()
            saver.save(trained.position)
        saver.finish()


def goes_on(rank: int, *, root: Path, background: bool, from_step: int) -> None:
    trained = Trained(root, rank, background=background)
    trained.resume()
    assert trained.position.step == from_step
    with trained.saver as saver:
        while trained.position.step < 4:
            trained.step()
            saver.look()
            saver.save(trained.position)
        saver.finish()


def kill_at_every_stage(folder: Path) -> None:
    for background in (False, True):
        for number, (stage, victim) in enumerate(STAGES):
            root = folder / f"{background}-{number}"
            killed = partial(is_killed, root=root, background=background, stage=stage, victim=victim)
            codes = on_forks(killed, ranks=2)
            assert codes[victim] == -signal.SIGKILL, (stage, victim, codes)
            assert codes[1 - victim] == 1, "the other one has lost it"
            path, reasons = newest_state(root)
            last = 2 if stage == "after the rename" else 1
            assert path == root / f"step-{last:08}", (stage, victim)
            assert all("an interrupted save, ignored" in reason for reason in reasons)
            together(partial(goes_on, root=root, background=background, from_step=last), ranks=2)
            assert names(root) == ["step-00000003", "step-00000004"]


def test_a_rank_is_killed_at_any_stage_of_a_save(tmp_path: Path) -> None:
    forks.run(kill_at_every_stage, tmp_path)


def fills_the_disk(rank: int, trained: Trained, *, root: Path) -> None:
    with trained.saver as saver:
        trained.step()
        saver.save(trained.position)
        saver.finish()
        assert (names(root), saver.saved) == (["step-00000001"], 1)
        trained.step()
        with largest_file(2000 if rank == 1 else 10**9):
            saver.save(trained.position)
            saver._pending.wait()
        assert saver.background, "a save that ranks wait for fails at once"
        trained.step()
        saver.look()


def meets_faults(rank: int, *, root: Path, background: bool) -> None:
    trained = Trained(root, rank, background=background)
    with pytest.raises(ResourceError, match=r"^rank 1: .*File too large") as full:
        fills_the_disk(rank, trained, root=root)
    assert full.value.told == (rank > 0), "all ranks say the same: the first one tells"
    trained.saver.ranks.meet()
    assert names(root) == ["step-00000001"]

    def breaks(*args: Any, **kwargs: Any) -> None:
        raise KeyError("a bug")

    with pytest.MonkeyPatch.context() as patch, trained.saver as saver:
        if rank == 0:
            patch.setattr(saving, "write_rank", breaks)
        with pytest.raises(MoewrightError if rank else KeyError, match="a bug"):
            saver.save(trained.position, now=True)


def ends_in_a_step(trained: Trained) -> None:
    with trained.saver as saver:
        trained.step()
        saver.save(trained.position)
        if saver.ranks.rank == 1:
            raise ResourceError("the disk is full")
        assert saver.ranks.gathered([10]) == [[10], [11]], (
            "a collective of the step, which the other rank must not meet"
        )
        raise KeyError


def fails_alone(rank: int, *, root: Path) -> None:
    trained = Trained(root, rank, background=True)
    with pytest.raises(ResourceError if rank else KeyError):
        ends_in_a_step(trained)
    if rank:
        trained.saver.ranks.gathered([11])
    assert names(root) == [] or rank


def faults(folder: Path) -> None:
    together(partial(fails_alone, root=folder / "alone"), ranks=2)
    for background in (False, True):
        root = folder / str(background)
        together(partial(meets_faults, root=root, background=background), ranks=2)
        together(partial(goes_on, root=root, background=background, from_step=1), ranks=2)
        assert names(root) == ["step-00000003", "step-00000004"]


def test_a_full_disk_or_a_mistake_on_one_rank(tmp_path: Path) -> None:
    forks.run(faults, tmp_path)


def goes_on_noting(rank: int, *, root: Path, words: str) -> None:
    trained = Trained(root, rank)
    notes = trained.resume()
    assert trained.position.step == 3
    assert [words in note for note in notes] == ([True] if rank == 0 else [])
    trained.position.step = 4  # damaged states are no reason to delete one that verified
    with trained.saver as saver:
        saver.save(trained.position)


def finds_none(rank: int, *, root: Path) -> None:
    trained = Trained(root, rank)
    with pytest.raises(CheckpointError, match="no state verifies" if rank == 0 else "rank 0 has failed"):
        trained.saver.newest(lambda note: None)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped": (lambda file: file.write_bytes(file.read_bytes()[:-1] + b"\x7f"), "has another SHA-256"),
    "truncated": (lambda file: os.truncate(file, 100), "has 100 bytes"),
    "missing": (Path.unlink, "is missing"),
}


def damaged_files(folder: Path) -> None:
    together(partial(goes_on, root=folder / "whole", background=False, from_step=0), ranks=2)
    for kind, (damage, words) in DAMAGE.items():
        for name in ("rank-00000.safetensors", "rank-00001.safetensors", "index.json"):
            root = folder / f"{kind} {name}"
            shutil.copytree(folder / "whole", root)
            damage(root / "step-00000004" / name)
            together(partial(goes_on_noting, root=root, words=f"step-00000004: {name} {words}"), ranks=2)
            assert newest_state(root)[0] == root / "step-00000004"
            assert names(root) == ["step-00000003", "step-00000004"]
    for path in (folder / "whole").iterdir():
        (path / "rank-00001.safetensors").unlink()
    together(partial(finds_none, root=folder / "whole"), ranks=2)


def test_ranks_share_the_verification_and_fall_back(tmp_path: Path) -> None:
    forks.run(damaged_files, tmp_path)


# In the background


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Until it is set, no file of a state is written."""
    gate, write = threading.Event(), saving.write_rank

    def slow(*args: Any, **kwargs: Any) -> Any:
        assert gate.wait(60)
        return write(*args, **kwargs)

    monkeypatch.setattr(saving, "write_rank", slow)
    return gate


def test_training_goes_on_while_a_state_is_written(tmp_path: Path, gate: threading.Event) -> None:
    trained = Trained(tmp_path, 0, ranks=1, background=True)
    with trained.saver as saver:
        trained.step()
        then = trained.tensors()
        saver.save(trained.position)
        for _ in range(3):
            trained.step()
            saver.look()
        assert newest_state(tmp_path)[0] is None
        assert saver.saved is None
        gate.set()
        saver.finish()
        assert saver.saved == 1
    tensors, facts = load_state(tmp_path / "step-00000001")
    assert_equal({name: tensors[name] for name in then}, then)
    assert (facts["step"], facts["tokens"]) == (1, 10)


def test_a_save_waits_for_the_one_before_and_so_does_a_stop(tmp_path: Path, gate: threading.Event) -> None:
    trained = Trained(tmp_path, 0, ranks=1, background=True)
    threading.Timer(0.5, gate.set).start()
    with trained.saver as saver:
        for _ in range(2):
            trained.step()
            saver.save(trained.position)
        assert names(tmp_path)[0] == "step-00000001"
        saver.finish()
        trained.step()
        saver.save(trained.position)
        trained.step()
        saver.save(trained.position, now=True)
    assert names(tmp_path) == ["step-00000003", "step-00000004"]


def test_a_stop_keeps_the_state_on_its_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the time to stop is too short for another one."""
    trained = Trained(tmp_path, 0, ranks=1, background=True)
    write, begun = saving.write_rank, threading.Event()

    def slow(folder: Path, **rest: Any) -> Any:
        if "00000002" in folder.name:
            raise KeyboardInterrupt
        assert begun.wait(60)
        return write(folder, **rest)

    monkeypatch.setattr(saving, "write_rank", slow)
    trained.step()
    with pytest.raises(KeyboardInterrupt):
        stops_while_it_writes(trained, begun)
    assert newest_state(tmp_path)[0] == tmp_path / "step-00000001"


def stops_while_it_writes(trained: Trained, begun: threading.Event) -> None:
    with trained.saver as saver:
        saver.save(trained.position)
        trained.step()
        threading.Timer(0.5, begun.set).start()
        saver.save(trained.position, now=True)


def test_a_run_on_a_cpu_leaves_gpus_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("it would take memory there")

    for name in ("get_rng_state", "set_rng_state", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, refuse)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for background in (False, True):
        trained = Trained(tmp_path, 0, ranks=1, background=background)
        trained.step()
        with trained.saver as saver:
            saver.save(trained.position)
            saver.finish()
    generators.restore({"cuda": torch.zeros(16, dtype=torch.uint8)})


def test_an_error_of_the_run_does_not_cost_the_state_on_its_way(tmp_path: Path, gate: threading.Event) -> None:
    trained = Trained(tmp_path, 0, ranks=1, background=True)
    threading.Timer(0.5, gate.set).start()
    for number, error in enumerate((KeyError, KeyboardInterrupt), start=1):
        with pytest.raises(error):
            fails_after_a_save(trained, error)
        assert trained.position.step == number
        assert names(tmp_path) == ["step-00000001"]


def fails_after_a_save(trained: Trained, error: type[BaseException]) -> None:
    with trained.saver as saver:
        trained.step()
        saver.save(trained.position)
        raise error


def test_a_run_in_the_background_is_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make_run(tmp_path, out="whole", checkpoint_every=1)
    train(whole)
    config = make_run(tmp_path, checkpoint_every=1, async_checkpoints=True)
    with monkeypatch.context() as patch:
        at_step(patch, 3, send(signal.SIGTERM))
        with pytest.raises(Preempted):
            train(config)
    assert newest_state(Path(config.out) / "checkpoints")[0].name == "step-00000003"
    train(config)
    assert metrics(config) == metrics(whole)
    last = [load_state(Path(c.out) / "checkpoints" / "step-00000006")[0] for c in (config, whole)]
    assert_equal(*last)


def test_a_failed_write_in_the_background_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_run(tmp_path, checkpoint_every=2, async_checkpoints=True)
    write, made = saving.write_rank, []

    def full(path: Path, **rest: Any) -> Any:
        if path.name.startswith("step-00000004"):
            raise ResourceError("the disk is full")
        return write(path, **rest)

    monkeypatch.setattr(saving, "write_rank", full)
    at_step(monkeypatch, 6, lambda model: made.append(6))
    with pytest.raises(ResourceError, match=r"^the disk is full$"):
        train(config)
    assert [line["step"] for line in metrics(config)][-1] in (4, 5)
    assert not made
    assert names(Path(config.out) / "checkpoints") == ["step-00000002"]
