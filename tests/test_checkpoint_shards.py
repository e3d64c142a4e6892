"""Tensors in several files: any box read from any cut, and every index that lies refused."""

import itertools
import json
import math
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moewright.checkpoint import shards, state
from moewright.checkpoint.files import json_bytes, record_of
from moewright.checkpoint.shards import Piece, read_index
from moewright.checkpoint.state import NewState, load_state, newest_state, open_state, save_state, write_rank
from moewright.checkpoint.tensorfile import LazyTensor
from moewright.errors import CheckpointError, Preempted
from moewright.moe.config import MoESettings
from moewright.train.loop import train
from moewright.upcycle.config import UpcycleConfig
from tests.runs import at_step, make_run, metrics, send

EXPERTS = torch.arange(4 * 6 * 5, dtype=torch.float32).reshape(4, 6, 5)
DENSE = torch.arange(7, dtype=torch.bfloat16)
TENSORS = {"experts": EXPERTS, "dense": DENSE, "step": torch.tensor(3.0), "none": torch.empty(0, 2)}
Cut = dict[str, list[tuple[int, tuple[slice, ...]]]]


def cut_of(dice: random.Random, ranks: int) -> Cut:
    """Each tensor in boxes, cut at places of each dim, and the rank that has each box."""
    cut: Cut = {}
    for name, tensor in TENSORS.items():
        dims = []
        for size in tensor.shape:
            places = sorted(dice.sample(range(1, size), dice.randint(0, min(2, size - 1)))) if size > 1 else []
            dims.append([slice(a, b) for a, b in itertools.pairwise((0, *places, size))])
        cut[name] = [(dice.randrange(ranks), box) for box in itertools.product(*dims)]
    return cut


def save_cut(root: Path, cut: Cut, *, step: int = 1, ranks: int = 3, keep: int = 2) -> Path:
    with NewState(root, step=step, nbytes=0) as new:
        records = [
            write_rank(
                new.path,
                rank=rank,
                pieces=[
                    Piece(name, tuple(s.start for s in box), lazy(TENSORS[name][box] + (step - 1)))
                    for name, boxes in cut.items()
                    for owner, box in boxes
                    if owner == rank
                ],
            )
            for rank in range(ranks)
        ]
        shapes = {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}
        return new.commit(records, shapes=shapes, facts={"step": step}, keep=keep)


def lazy(tensor: Tensor) -> LazyTensor:
    return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def test_any_box_is_read_from_any_cut_and_only_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dice, read_bytes, read = random.Random(0), [0], shards.read_tensor

    def spy(*args: Any) -> Tensor:
        part = read(*args)
        read_bytes[0] += part.numel() * part.element_size()
        return part

    monkeypatch.setattr(shards, "read_tensor", spy)
    for trial in range(20):
        path = save_cut(tmp_path / str(trial), cut_of(dice, 3))
        assert newest_state(tmp_path / str(trial)) == (path, [])
        assert sorted(file.name for file in path.iterdir())[2:] == [
            "index.json",
            *(f"rank-{n:05}.safetensors" for n in range(3)),
        ]
        whole, _ = load_state(path)
        assert whole.keys() == TENSORS.keys()
        opened = open_state(path)
        for name, tensor in TENSORS.items():
            assert torch.equal(whole[name], tensor)
            assert (whole[name].dtype, opened.tensors[name].shape) == (tensor.dtype, tensor.shape)
            bounds = [sorted(dice.choices(range(size + 1), k=2)) for size in tensor.shape]
            index = tuple(slice(*pair) for pair in bounds)[: dice.randint(0, tensor.dim())]
            read_bytes[0] = 0
            part = opened.read(name, index)
            assert torch.equal(part, tensor[index])
            assert read_bytes[0] == part.numel() * part.element_size()


def test_keys_name_boxes_and_not_ranks(tmp_path: Path) -> None:
    half = [slice(0, 2), slice(2, 4)]
    cut: Cut = {name: [(0, tuple(slice(0, n) for n in t.shape))] for name, t in TENSORS.items()}
    cut["experts"] = [(1 - n, (rows, slice(0, 6), slice(0, 5))) for n, rows in enumerate(half)]
    path = save_cut(tmp_path, cut, ranks=2)
    assert load_file(path / "rank-00001.safetensors").keys() == {"experts[0:2,0:6,0:5]"}
    assert "experts[2:4,0:6,0:5]" in load_file(path / "rank-00000.safetensors")


@pytest.mark.parametrize(
    ("boxes", "words"),
    [
        ([(0, 0, 2), (1, 3, 4)], r"30 of the 120 elements of experts are in no file"),
        ([], r"120 of the 120 elements of experts are in no file"),
        (
            [(0, 0, 3), (1, 2, 4)],
            r"experts\[0:3,.*\] of file 0 and experts\[2:4,.*\] of file 1 have elements in common",
        ),
        ([(0, 0, 4), (1, 0, 4)], "have elements in common"),
        ([(0, 0, 2), (1, 2, 5)], r"experts\[2:5,.*\] does not lie in a tensor of shape \[4, 6, 5\]"),
    ],
)
def test_a_lost_or_doubled_expert_is_neither_committed_nor_read(
    tmp_path: Path, boxes: list[tuple[int, int, int]], words: str
) -> None:
    whole = {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}
    pieces = [
        [Piece("experts", (a, 0, 0), lazy(torch.ones(b - a, 6, 5))) for n, a, b in boxes if n == r] for r in (0, 1)
    ]
    with NewState(tmp_path / "a", step=1, nbytes=0) as new:
        records = [write_rank(new.path, rank=rank, pieces=pieces[rank]) for rank in (0, 1)]
        with pytest.raises(CheckpointError, match=words):
            new.commit(records, shapes={"experts": whole["experts"]}, facts={}, keep=1)
    assert list((tmp_path / "a").iterdir()) == []
    # The same in the index of a state whose hashes are right.
    path = save_state(tmp_path / "b", step=1, tensors=TENSORS, facts={})
    index = json.loads((path / "index.json").read_text())
    index["layouts"][index["tensors"]["experts"][2]] = [[0, [a, 0, 0], [b, 6, 5]] for n, a, b in boxes]
    rewrite(path, "index.json", json.dumps(index).encode())
    with pytest.raises(CheckpointError, match=f"no state verifies.*{words.replace('file 1', 'file 0')}"):
        newest_state(tmp_path / "b")


def rewrite(path: Path, name: str, data: bytes) -> None:
    (path / name).write_bytes(data)
    marker = json.loads((path / "COMMITTED.json").read_text())
    marker["files"][name] = record_of(path / name)
    (path / "COMMITTED.json").write_bytes(json_bytes(marker))


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index.pop("layouts"),
        lambda index: index.update(tensors=[]),
        lambda index: index["tensors"]["experts"].__setitem__(0, "F31"),
        lambda index: index["tensors"]["experts"].__setitem__(1, [4, 6, -5]),
        lambda index: index["tensors"]["experts"].__setitem__(2, 99),
        lambda index: index["layouts"][0][0].__setitem__(0, 1),
        lambda index: index["layouts"][0][0].__setitem__(1, ["0", 0, 0]),
        lambda index: index["layouts"][0][0].pop(),
    ],
)
def test_an_index_that_is_none_is_damaged(tmp_path: Path, change: Callable[[Any], object]) -> None:
    path = save_state(tmp_path, step=1, tensors=TENSORS, facts={})
    index = json.loads((path / "index.json").read_text())
    change(index)
    (path / "index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"index\.json is damaged \("):
        read_index(path / "index.json", files=1)


def test_a_file_with_other_pieces_than_the_index_says(tmp_path: Path) -> None:
    path = save_state(tmp_path, step=1, tensors=TENSORS, facts={})
    save_file({"experts[0:4,0:6,0:5]": EXPERTS.double()}, path / "rank-00000.safetensors")
    opened = open_state(path)
    for name in ("experts", "dense"):
        with pytest.raises(CheckpointError, match=rf"rank-00000\.safetensors does not have the piece of {name}"):
            opened.read(name)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (flip, "has another SHA-256"),
        (lambda file: os.truncate(file, file.stat().st_size // 2), "were written"),
        (Path.unlink, "is missing"),
    ],
    ids=["flipped", "truncated", "missing"],
)
def test_each_file_of_a_state_is_verified_by_the_rank_whose_share_it_is(
    tmp_path: Path, damage: Callable[[Path], object], words: str
) -> None:
    cut = cut_of(random.Random(1), 3)
    for step in (1, 2):
        save_cut(tmp_path, cut, step=step)
    for name in ("facts.json", "index.json", *(f"rank-{n:05}.safetensors" for n in range(3))):
        shutil.copytree(tmp_path / "step-00000002", tmp_path / "kept")
        damage(tmp_path / "step-00000002" / name)
        path, (reason,) = newest_state(tmp_path)
        assert path == tmp_path / "step-00000001"
        assert reason.startswith(f"step-00000002: {name}")
        assert words in reason
        faults = [state.fault_of(tmp_path / "step-00000002", rank=rank, ranks=4) for rank in range(4)]
        assert sum(fault is not None for fault in faults) == 1
        shutil.rmtree(tmp_path / "step-00000002")
        (tmp_path / "kept").rename(tmp_path / "step-00000002")


def test_a_file_that_the_committing_process_does_not_see(tmp_path: Path) -> None:
    with NewState(tmp_path, step=1, nbytes=0) as new:
        record = write_rank(new.path, rank=0, pieces=[])
        with pytest.raises(CheckpointError, match="is it one folder for all ranks"):
            new.commit([record, record], shapes={}, facts={}, keep=1)
    assert list(tmp_path.iterdir()) == []


def write_schema_1(path: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """A state as version 0.1 wrote it."""
    path.mkdir(parents=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, path / "tensors.safetensors", {"format": "pt"}
    )
    (path / "facts.json").write_bytes(json_bytes(facts))
    files = {name: record_of(path / name) for name in ("tensors.safetensors", "facts.json")}
    step = int(path.name.removeprefix("step-"))
    marker = {"schema": 1, "step": step, "torch": "2.13.0", "files": files}
    (path / "COMMITTED.json").write_bytes(json_bytes(marker))


def test_a_state_of_version_0_1_is_read(tmp_path: Path) -> None:
    write_schema_1(tmp_path / "step-00000004", TENSORS, {"step": 4})
    path, reasons = newest_state(tmp_path)
    assert (path, reasons) == (tmp_path / "step-00000004", [])
    tensors, facts = load_state(path)
    assert facts == {"step": 4}
    assert all(torch.equal(tensors[name], expected) for name, expected in TENSORS.items())
    assert torch.equal(open_state(path).read("experts", (slice(1, 3), slice(2, 3))), EXPERTS[1:3, 2:3])
    save_state(tmp_path, step=5, tensors=TENSORS, facts={})
    flip(tmp_path / "step-00000005" / "rank-00000.safetensors")
    assert newest_state(tmp_path)[0] == path
    flip(path / "tensors.safetensors")
    with pytest.raises(CheckpointError, match=r"step-00000004: tensors\.safetensors has another SHA-256"):
        newest_state(tmp_path)


def test_a_run_of_version_0_1_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noisy = MoESettings(logit_noise=0.1, balance_loss=0.05)
    settings = {"upcycle": UpcycleConfig(experts=4, top_k=2), "moe": noisy}
    whole, stopped = (make_run(tmp_path, out=out, **settings) for out in ("whole", "stopped"))
    train(whole)
    with monkeypatch.context() as patch:
        at_step(patch, 3, send(signal.SIGTERM))
        with pytest.raises(Preempted):
            train(stopped)
    path = Path(stopped.out) / "checkpoints" / "step-00000003"
    tensors, facts = load_state(path)
    shutil.rmtree(path)
    *words, gauss = tensors.pop("random.python")[0].tolist()
    *key, position, has_gauss, cached = tensors.pop("random.numpy")[0].tolist()
    numpy = {"bit_generator": "MT19937", "state": {"key": list(map(int, key)), "pos": int(position)}}
    facts["random"] = {
        "python": [3, list(map(int, words)), None if math.isinf(gauss) else gauss],
        "numpy": numpy | {"has_gauss": int(has_gauss), "gauss": cached},
    }
    tensors |= {name: tensor[0] for name, tensor in tensors.items() if name.startswith("random.")}
    del facts["layout"]
    write_schema_1(path, tensors, facts)
    train(stopped)
    assert metrics(stopped) == metrics(whole)
    assert [p.name for p in (Path(stopped.out) / "checkpoints").iterdir()] == ["step-00000003"]


def test_states_known_to_be_damaged_do_not_count_among_the_kept(tmp_path: Path) -> None:
    cut = cut_of(random.Random(2), 3)
    for step in (1, 2):
        save_cut(tmp_path, cut, step=step)
    flip(tmp_path / "step-00000002" / "rank-00001.safetensors")
    assert newest_state(tmp_path)[0] == tmp_path / "step-00000001"
    assert state.states_after(tmp_path / "step-00000001") == ["step-00000002"]
    with NewState(tmp_path, step=3, nbytes=0) as new:
        record = write_rank(new.path, rank=0, pieces=[])
        new.commit([record], shapes={}, facts={}, keep=2, damaged=["step-00000002"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]
