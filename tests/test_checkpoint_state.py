"""Training state: exact, verified before use, and never lost to a kill, a full disk or a flipped bit."""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moewright.checkpoint.state import load_state, newest_state, save_state
from moewright.checkpoint.tensorfile import DTYPES
from moewright.errors import CheckpointError, ResourceError
from tests.full_disk import largest_file
from tests.kill import kill_everywhere


def save(root: Path, step: int, **options: Any) -> Path:
    return save_state(root, step=step, tensors=tensors_of(step), facts={"seen": step * 100}, **options)


def tensors_of(step: int) -> dict[str, Tensor]:
    return {"model.w": torch.full((3, 5), float(step)), "optim.step": torch.tensor(step), "rng": torch.arange(9).byte()}


def step_of(path: Path | None) -> int:
    """The step of a state; fails unless it loads and is whole."""
    assert path is not None
    tensors, facts = load_state(path)
    step: int = facts["seen"] // 100
    assert tensors.keys() == tensors_of(step).keys()
    assert all(torch.equal(tensors[name], expected) for name, expected in tensors_of(step).items())
    return step


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_round_trip(tmp_path: Path) -> None:
    tensors = {name: torch.randint(0, 2, (3, 4)).to(dtype) for name, dtype in DTYPES.items()}
    tensors["parameter"] = torch.randn(2, 3, requires_grad=True)
    tensors["turned"] = torch.randn(4, 6).T
    tensors["scalar"] = torch.tensor(3)
    tensors["none"] = torch.empty(0, 7)
    facts = {"step": 3, "nested": {"list": [1, 0.1, None, "ü"], "big": 2**63, "tiny": 5e-324}}
    path = save_state(tmp_path / "run", step=3, tensors=tensors, facts=facts)
    assert path == tmp_path / "run" / "step-00000003"
    assert newest_state(tmp_path / "run") == (path, [])
    found, found_facts = load_state(path)
    assert found_facts == facts
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        raw, expected = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (found[name], tensor))
        assert torch.equal(raw, expected)


def test_no_tensors_at_all(tmp_path: Path) -> None:
    assert load_state(save_state(tmp_path, step=0, tensors={}, facts={})) == ({}, {})


def test_the_same_state_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = save(tmp_path / "a", 1), save(tmp_path / "b", 1)
    assert names(first) == ["COMMITTED.json", "facts.json", "index.json", "rank-00000.safetensors"]
    for name in names(first):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_nothing_was_ever_saved(tmp_path: Path) -> None:
    assert newest_state(tmp_path / "nowhere") == (None, [])
    assert newest_state(tmp_path) == (None, [])


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    for step in (9, 10, 99_999_999, 100_000_000):
        save(tmp_path, step, keep=9)
        assert step_of(newest_state(tmp_path)[0]) == step


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in range(5):
        save(tmp_path, step)
    assert names(tmp_path) == ["step-00000003", "step-00000004"]
    save(tmp_path, 5, keep=1)
    assert names(tmp_path) == ["step-00000005"]


def flip(file: Path, position: int = -1) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


def edit_marker(path: Path, **changes: Any) -> None:
    marker = json.loads((path / "COMMITTED.json").read_text())
    (path / "COMMITTED.json").write_text(json.dumps(marker | changes))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "bit in a tensor": (lambda p: flip(p / "rank-00000.safetensors"), "rank-00000.safetensors has another SHA-256"),
    "bit in the facts": (lambda p: flip(p / "facts.json"), "facts.json has another SHA-256"),
    "truncated": (lambda p: os.truncate(p / "rank-00000.safetensors", 100), "rank-00000.safetensors has 100 bytes"),
    "longer": (lambda p: os.truncate(p / "facts.json", 100), "facts.json has 100 bytes"),
    "no tensors": (lambda p: (p / "rank-00000.safetensors").unlink(), "rank-00000.safetensors is missing"),
    "no facts": (lambda p: (p / "facts.json").unlink(), "facts.json is missing"),
    "no marker": (lambda p: (p / "COMMITTED.json").unlink(), "COMMITTED.json is missing"),
    "empty marker": (lambda p: os.truncate(p / "COMMITTED.json", 0), "COMMITTED.json is damaged"),
    "marker is no object": (lambda p: (p / "COMMITTED.json").write_text("[]"), "COMMITTED.json is damaged"),
    "marker without files": (lambda p: edit_marker(p, files=None), "COMMITTED.json is damaged"),
    "marker of no files": (lambda p: edit_marker(p, files={}), "belongs to another state"),
    "marker of another step": (lambda p: edit_marker(p, step=3), "belongs to another state"),
    "marker of another version": (lambda p: edit_marker(p, schema=3), "schema 3"),
    "empty folder": (lambda p: (shutil.rmtree(p), p.mkdir()), "COMMITTED.json is missing"),
    "a file": (lambda p: (shutil.rmtree(p), p.write_text("")), "COMMITTED.json is missing"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_falls_back_with_the_reason(tmp_path: Path, kind: str) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    damage, words = DAMAGE[kind]
    damage(tmp_path / "step-00000002")
    path, reasons = newest_state(tmp_path)
    assert step_of(path) == 1
    assert len(reasons) == 1
    assert reasons[0].startswith("step-00000002: ")
    assert words in reasons[0]
    save(tmp_path, 2)
    assert newest_state(tmp_path) == (tmp_path / "step-00000002", [])
    damage(tmp_path / "step-00000001")
    damage(tmp_path / "step-00000002")
    with pytest.raises(CheckpointError, match="no state verifies") as caught:
        newest_state(tmp_path)
    assert all(name in str(caught.value) for name in ("step-00000001: ", "step-00000002: ", words))
    assert "\n" not in str(caught.value)


def test_a_flipped_bit_in_any_byte_is_found_or_harmless(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    harmless = 0
    for name in names(path):
        whole = (path / name).read_bytes()
        for position in range(len(whole)):
            flip(path / name, position)
            try:
                found, _ = newest_state(tmp_path)
            except CheckpointError:
                pass
            else:
                assert name == "COMMITTED.json"  # its note of torch's version, and the space in it
                assert step_of(found) == 1
                harmless += 1
            (path / name).write_bytes(whole)
    assert harmless < 60


def test_an_unreadable_state_falls_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    opened = Path.open

    def broken(path: Path, *args: Any, **kwargs: Any) -> Any:
        if "step-00000002" in str(path):
            raise OSError(5, "Input/output error", str(path))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", broken)
    path, reasons = newest_state(tmp_path)
    assert step_of(path) == 1
    assert "Input/output error" in reasons[0]


def test_a_damaged_later_state_never_costs_a_good_one(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, keep=3)
    flip(tmp_path / "step-00000003" / "rank-00000.safetensors")
    save(tmp_path, 2, keep=1)
    assert names(tmp_path) == ["step-00000002", "step-00000003"]
    assert step_of(newest_state(tmp_path)[0]) == 2
    save(tmp_path, 3, keep=1)
    assert newest_state(tmp_path) == (tmp_path / "step-00000003", [])
    assert names(tmp_path) == ["step-00000003"]


def test_leftovers_are_named_ignored_and_removed(tmp_path: Path) -> None:
    leftover = f"step-00000007.tmp-{'0' * 32}"
    shutil.copytree(save(tmp_path / "other", 7), tmp_path / "run" / leftover)
    assert newest_state(tmp_path / "run") == (None, [f"{leftover}: an interrupted save, ignored"])
    save(tmp_path / "run", 1)
    assert names(tmp_path / "run") == ["step-00000001"]


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    for name in ("notes.txt", "step-1", "step-00000001.bak", "step-00000001.tmp"):
        (tmp_path / name).mkdir()
    save(tmp_path, 1, keep=1)
    save(tmp_path, 2, keep=1)
    assert names(tmp_path) == ["notes.txt", "step-00000001.bak", "step-00000001.tmp", "step-00000002", "step-1"]
    assert newest_state(tmp_path) == (tmp_path / "step-00000002", [])


def test_a_file_system_without_locks_is_no_news_at_each_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who opens the run's folder has been warned; no other process shares the name of a state's temporary folder."""

    def unsupported(descriptor: int, operation: int) -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    for step in (1, 2):
        save(tmp_path, step)
    assert step_of(newest_state(tmp_path)[0]) == 2


def test_facts_that_are_not_json_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        save_state(tmp_path, step=1, tensors={}, facts={"loss": float("nan")})
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_state(tmp_path, step=1, tensors={}, facts={"x": torch.ones(1)})
    assert names(tmp_path) == []


def test_a_full_disk_leaves_the_earlier_state(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with largest_file(20_000), pytest.raises(ResourceError, match="make room"):
        save_state(tmp_path, step=2, tensors={"w": torch.ones(100, 100)}, facts={})
    assert names(tmp_path) == ["step-00000001"]
    assert newest_state(tmp_path) == (tmp_path / "step-00000001", [])


def test_a_failing_rename_leaves_the_state_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    rename = os.rename

    def failing(source: Any, target: Any) -> None:
        if ".tmp-" in str(source):
            raise OSError(errno.EIO, "Input/output error", str(source))
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(CheckpointError, match="Input/output error"):
        save(tmp_path, 1)
    assert names(tmp_path) == ["step-00000001"]
    assert newest_state(tmp_path) == (tmp_path / "step-00000001", [])


def test_no_room_is_said_before_anything_is_written(tmp_path: Path) -> None:
    far_too_big = torch.ones(1).expand(2**50)
    with pytest.raises(ResourceError, match="bytes are needed"):
        save_state(tmp_path, step=1, tensors={"w": far_too_big}, facts={})
    assert names(tmp_path) == []


def test_a_root_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        save(tmp_path / "file" / "checkpoints", 1)


def test_a_state_that_changes_after_it_was_verified(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    os.truncate(path / "rank-00000.safetensors", 100)
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_state(path)
    shutil.rmtree(path)
    with pytest.raises(CheckpointError, match=r"COMMITTED\.json is missing"):
        load_state(path)


def kill_third_save(folder: Path, arm: Callable[[], None]) -> None:
    save(folder, 1)
    save(folder, 2)
    arm()
    save(folder, 3)


def kill_same_step(folder: Path, arm: Callable[[], None]) -> None:
    save(folder, 2)
    arm()
    save(folder, 2, keep=1)


def test_killed_while_saving_the_last_state_or_the_new_one_is_there(tmp_path: Path) -> None:
    steps = []
    for folder in kill_everywhere(kill_third_save, tmp_path / "kill"):
        path, reasons = newest_state(folder)
        steps.append(step_of(path))
        assert all("an interrupted save, ignored" in reason for reason in reasons)
        save(folder, 3)
        assert names(folder) == ["step-00000002", "step-00000003"]
    assert steps == sorted(steps)
    assert steps.count(2) > 10
    assert steps.count(3) > 4


def test_killed_while_replacing_a_state_it_is_there(tmp_path: Path) -> None:
    folders = kill_everywhere(kill_same_step, tmp_path / "kill")
    assert any(".old-" in name for folder in folders for name in names(folder))
    for folder in folders:
        assert step_of(newest_state(folder)[0]) == 2
        save(folder, 2)
        assert names(folder) == ["step-00000002"]
