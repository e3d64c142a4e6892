"""New model folders: exact, deterministic, and there wholly or not at all, whatever happens meanwhile."""

import dataclasses
import errno
import fcntl
import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from moewright.checkpoint.check import LEAVES_A_TASK, tree_hash
from moewright.checkpoint.files import LARGE_BYTES
from moewright.checkpoint.read import ModelFolder
from moewright.checkpoint.tensorfile import LazyTensor, write_tensor_file
from moewright.checkpoint.tree import Leaf, TreeHasher, root
from moewright.checkpoint.vocabulary import token_count
from moewright.checkpoint.write import FolderWriter, plan_shards
from moewright.errors import ModelError, ResourceError
from tests.full_disk import largest_file
from tests.kill import kill_everywhere
from tests.models import tiny_model, tiny_tokenizer

CONFIG = {"model_type": "llama"}


def lazily(tensors: dict[str, Tensor]) -> dict[str, LazyTensor]:
    return {name: LazyTensor(tuple(t.shape), t.dtype, lambda t=t: t) for name, t in tensors.items()}


def tensors_of(value: float) -> dict[str, Tensor]:
    return {f"layer.{i}": torch.full((4, 8), value + i) for i in range(16)}


def write(target: Path, value: float = 0.0, *, max_shard_bytes: int = 1100, **options: Any) -> Path:
    """A folder with sixteen tensors, by default in two shards."""
    with FolderWriter(target, **options) as writer:
        writer.write_json("config.json", CONFIG | {"value": value})
        writer.write_tensors(lazily(tensors_of(value)), max_shard_bytes=max_shard_bytes)
        return writer.commit({"recipe": "test"})


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def value_of(folder: Path) -> float:
    """Which ``write`` a folder comes from; fails unless it is whole."""
    model = ModelFolder(folder)
    model.verify_checksums()
    value: float = model.config["value"]
    for name, expected in tensors_of(value).items():
        assert torch.equal(model.read(name), expected)
    return value


# What is written


def test_round_trip_through_our_reader_and_the_library(tmp_path: Path) -> None:
    tensors = {
        "odd": torch.tensor([True, False, True]),
        "matrix": torch.randn(3, 5),
        "half": torch.randn(7).to(torch.bfloat16),
        "turned": torch.randn(4, 6).T,
        "parameter": torch.randn(3, requires_grad=True),
        "step": torch.tensor(7),
        "none": torch.empty(0, 4),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "größe": torch.randn(1, dtype=torch.float64),
    }
    with FolderWriter(tmp_path / "out") as writer:
        writer.write_json("config.json", CONFIG)
        writer.write_tensors(lazily(tensors))
        assert writer.commit({}) == tmp_path / "out"
    model = ModelFolder(tmp_path / "out")
    assert model.tensors.keys() == tensors.keys()
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        for name, tensor in tensors.items():
            for found in (model.read(name), file.get_tensor(name)):
                assert found.dtype == tensor.dtype
                assert torch.equal(found, tensor)
    for info in model.tensors.values():
        assert info.start % info.dtype.itemsize == 0


def test_the_same_tensors_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a"), write(tmp_path / "b")
    assert content(first) == content(second)
    write(second, 5.0, overwrite=True)
    assert content(first) != content(second)
    write(second, 0.0, overwrite=True)
    assert content(first) == content(second)


def test_the_record_and_the_index(tmp_path: Path) -> None:
    out = write(tmp_path / "out")
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    names = ["config.json", *shards, "model.safetensors.index.json"]
    assert sorted(content(out)) == sorted([*names, "moewright.json"])
    record = json.loads((out / "moewright.json").read_text())
    assert record["recipe"] == "test"
    assert sorted(record["files"]) == sorted(names)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 16 * 128}
    assert index["weight_map"] == {f"layer.{i}": shards[i // 8] for i in range(16)}
    assert list(tmp_path.iterdir()) == [out]


def slow_tree_hash(tensors: dict[str, Tensor], header: bytes) -> str:
    """As `checkpoint/tree.py` says it, by numpy's bytes."""
    leaves = [header]
    for tensor in tensors.values():
        stack = list(tensor) if tensor.dim() > 2 else [tensor]
        leaves += [one.numpy().tobytes() for one in stack if one.numel()]
    return hashlib.sha256(b"".join(hashlib.sha256(leaf).digest() for leaf in leaves)).hexdigest()


def test_the_hash_of_weights(tmp_path: Path) -> None:
    """Stacks, vectors, scalars and what is empty; leaves that a key says are equal give the same."""
    draws = torch.Generator().manual_seed(0)
    shapes = {"stack": (3, 4, 5), "deep": (2, 3, 2, 2), "matrix": (40, 5), "vector": (7,), "one": (), "none": (0, 3)}
    tensors = {name: torch.randn(shape, generator=draws) for name, shape in shapes.items()}
    tensors |= {"copy": tensors["matrix"].clone(), "copies": torch.stack([tensors["stack"][0]] * 2)}
    keys = {"stack": (("a",), None, None), "copies": (("a",), ("a",)), "matrix": ("b",), "copy": ("b",)}
    lazy = {name: dataclasses.replace(each, keys=keys.get(name, ())) for name, each in lazily(tensors).items()}
    found = write_tensor_file(tmp_path / "with", lazy)
    assert found == write_tensor_file(tmp_path / "without", lazily(tensors))
    data = (tmp_path / "with").read_bytes()
    header = data[: 8 + int.from_bytes(data[:8], "little")]
    assert found == {"bytes": len(data), "sha256_tree": slow_tree_hash(tensors, header)}
    assert tree_hash(tmp_path / "with") == found["sha256_tree"]


def test_a_file_of_many_leaves_is_checked_in_tasks(tmp_path: Path) -> None:
    count = 3 * LEAVES_A_TASK + 5
    lazy = lazily({"many": torch.arange(count * 2, dtype=torch.int16).view(count, 1, 2)})
    found = write_tensor_file(tmp_path / "file", lazy)
    assert tree_hash(tmp_path / "file") == found["sha256_tree"]


@given(
    st.lists(st.tuples(st.integers(1, 9), st.sampled_from([None, "a", "b"])), min_size=1),
    st.lists(st.integers(1, 20), min_size=1),
)
def test_the_tree_takes_bytes_in_any_portions(leaves: list[tuple[int, str | None]], portions: list[int]) -> None:
    """Keys say what is equal, and do not change the hash; bytes may come in portions that cross leaves."""
    texts = [bytes([ord(key) if key else at % 256]) * size for at, (size, key) in enumerate(leaves)]
    with_keys = [Leaf(size, key and (key, size)) for size, key in leaves]
    data = b"".join(texts)
    hasher = TreeHasher(with_keys, {})
    for portion in itertools.cycle(portions):
        if not data:
            break
        hasher.update(data[:portion])
        data = data[portion:]
    assert hasher.hexdigest() == root(hashlib.sha256(text).digest() for text in texts)


def test_a_known_leaf_is_not_hashed_again() -> None:
    hasher = TreeHasher([Leaf(3, "a"), Leaf(3, "a")], {})
    hasher.update(b"abcxyz")  # a key that lies is believed, so `tree_hash`, which reads, tells
    assert hasher.hexdigest() == root([hashlib.sha256(b"abc").digest()] * 2)


@pytest.mark.parametrize("damage", ["flip", "header", "link", "shorter", "missing", "unlisted"])
def test_damage_is_found_by_the_checksums(tmp_path: Path, damage: str) -> None:
    out = write(tmp_path / "out")
    ModelFolder(out).verify_checksums()
    file = out / "model-00002-of-00002.safetensors"
    if damage == "flip":
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    elif damage == "header":
        data = bytearray(file.read_bytes())
        data[20] ^= 1
        before = ModelFolder(out)
        file.write_bytes(data)
        with pytest.raises(ModelError, match="another SHA-256"):
            before.verify_checksums()
        return
    elif damage == "link":
        before = ModelFolder(out)  # linked after it was opened, or a file that is listed and not opened
        (out / "config.json").rename(tmp_path / "config.json")
        (out / "config.json").symlink_to(tmp_path / "config.json")
        with pytest.raises(ModelError, match="a link that leads out of the folder"):
            before.verify_checksums()
        return
    elif damage == "shorter":
        (out / "config.json").write_text("{}")
    elif damage == "missing":
        with FolderWriter(tmp_path / "more") as writer:
            writer.write_json("config.json", CONFIG)
            writer.write_json("generation_config.json", {})
            writer.write_tensors(lazily(tensors_of(0.0)))
            out = writer.commit({})
        (out / "generation_config.json").unlink()
    else:
        record = json.loads((out / "moewright.json").read_text())
        del record["files"][file.name]
        (out / "moewright.json").write_text(json.dumps(record))
    with pytest.raises(
        ModelError, match=r"another SHA-256|has 2 bytes|generation_config.json is missing|does not list"
    ):
        ModelFolder(out).verify_checksums()


@given(st.lists(st.integers(0, 20)).filter(bool), st.integers(1, 40))
def test_shards_keep_the_order_and_the_limit(sizes: list[int], limit: int) -> None:
    tensors = {str(i): LazyTensor((size,), torch.uint8, torch.Tensor) for i, size in enumerate(sizes)}
    shards = plan_shards(tensors, limit)
    assert [name for shard in shards for name in shard] == list(tensors)
    totals = [sum(tensors[name].nbytes for name in shard) for shard in shards]
    assert all(total <= limit or len(shard) == 1 for shard, total in zip(shards, totals, strict=True))
    # Closed only when the next tensor did not fit.
    for total, after in zip(totals, shards[1:], strict=False):
        assert total + tensors[after[0]].nbytes > limit


@pytest.mark.parametrize("max_shard_bytes", [20_000, 10**9])
def test_plain_transformers_loads_the_folder(tmp_path: Path, max_shard_bytes: int) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = tiny_model("qwen3")
    model.save_pretrained(tmp_path / "source")
    tiny_tokenizer().save_pretrained(tmp_path / "source")
    with FolderWriter(tmp_path / "out", sources=[tmp_path / "source"]) as writer:
        writer.write_json("config.json", ModelFolder(tmp_path / "source").config)
        writer.write_tensors(lazily(dict(model.state_dict())), max_shard_bytes=max_shard_bytes)
        names = writer.copy_companions(tmp_path / "source")
        out = writer.commit({})
    assert "tokenizer.json" in names
    assert "generation_config.json" in names
    ids = torch.arange(10)[None]
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert AutoTokenizer.from_pretrained(out)("abc")["input_ids"] == tiny_tokenizer()("abc")["input_ids"]


def test_one_tensor_is_alive_at_a_time(tmp_path: Path) -> None:
    alive: list[weakref.ref[Tensor]] = []
    done: list[tuple[str, int]] = []

    def make() -> Tensor:
        assert [ref for ref in alive if ref() is not None] == []
        tensor = torch.ones(1000, 10, dtype=torch.float16)
        alive.append(weakref.ref(tensor))
        return tensor

    lazy = {str(i): LazyTensor((1000, 10), torch.float16, make) for i in range(6)}
    with FolderWriter(tmp_path / "out") as writer:
        writer.write_tensors(lazy, max_shard_bytes=45_000, on_tensor=lambda name, size: done.append((name, size)))
    assert len(alive) == 6
    assert done == [(str(i), 20_000) for i in range(6)]


def test_two_large_pieces_are_alive_at_a_time(tmp_path: Path) -> None:
    """One on its way to the disk, the next being made."""
    alive: list[weakref.ref[Tensor]] = []

    def pieces() -> Iterator[Tensor]:
        for number in range(3):
            assert len([ref for ref in alive if ref() is not None]) <= 1
            tensor = torch.full((LARGE_BYTES,), number, dtype=torch.uint8)
            alive.append(weakref.ref(tensor))
            yield tensor
            del tensor

    lazy = {str(i): LazyTensor((3, LARGE_BYTES), torch.uint8, pieces) for i in range(3)}
    with FolderWriter(tmp_path / "out") as writer:
        writer.write_json("config.json", CONFIG)
        writer.write_tensors(lazy)
        out = writer.commit({})
    assert len(alive) == 9
    assert torch.equal(ModelFolder(out).read("1"), torch.arange(3, dtype=torch.uint8)[:, None].expand(3, LARGE_BYTES))
    ModelFolder(out).verify_checksums()


@pytest.mark.parametrize("count", [1, 3])
def test_an_error_on_its_way_to_the_disk_is_raised(tmp_path: Path, count: int) -> None:
    """Large pieces are written by another thread; the error of the last one is raised as well."""
    lazy = lazily({str(i): torch.zeros(LARGE_BYTES, dtype=torch.uint8) for i in range(count)})
    full = pytest.raises(ResourceError, match="make room")
    with largest_file(LARGE_BYTES // 2), full, FolderWriter(tmp_path / "out") as writer:
        writer.write_tensors(lazy)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("made", [torch.ones(3, 2), torch.ones(2, 3, dtype=torch.float64)])
def test_a_tensor_that_is_not_as_announced(tmp_path: Path, made: Tensor) -> None:
    with pytest.raises(AssertionError, match="announced"), FolderWriter(tmp_path / "out") as writer:
        writer.write_tensors({"a": LazyTensor((2, 3), torch.float32, lambda: made)})
    assert list(tmp_path.iterdir()) == []


def test_the_folder_can_be_read_before_the_commit(tmp_path: Path) -> None:
    with FolderWriter(tmp_path / "out") as writer:
        writer.write_json("config.json", CONFIG)
        writer.write_tensors(lazily(tensors_of(0.0)))
        assert ModelFolder(writer.path).read("layer.3").mean() == 3
        (writer.path / "tokenizer.json").write_text("{}")  # as another library would
        writer.commit({})
    assert "tokenizer.json" in (ModelFolder(tmp_path / "out").record or {})["files"]
    ModelFolder(tmp_path / "out").verify_checksums()


# Companions


def test_companions_are_an_allow_list(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    tokenizer = {"z": 1, "auto_map": {"AutoTokenizer": "evil.py"}, "_private": 1, "a": "ü"}
    (source / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (source / "LICENSE").write_text("Apache")
    (source / "merges.txt").write_bytes(b"#version\r\n")
    for name in ("modeling_evil.py", "pytorch_model.bin", "README.md", "training_args.bin", "config.json"):
        (source / name).write_text("not copied")
    with FolderWriter(tmp_path / "out") as writer:
        assert writer.copy_companions(source) == ["tokenizer_config.json", "merges.txt", "LICENSE"]
        found = content(writer.path)
    assert sorted(found) == ["LICENSE", "merges.txt", "tokenizer_config.json"]
    assert found["merges.txt"] == b"#version\r\n"
    assert json.loads(found["tokenizer_config.json"]) == {"z": 1, "a": "ü"}


def test_a_harmless_tokenizer_config_is_copied_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "tokenizer_config.json").write_bytes(b'{ "z":1,"a":2 }')
    with FolderWriter(tmp_path / "out") as writer:
        writer.copy_companions(tmp_path / "source")
        assert content(writer.path) == {"tokenizer_config.json": b'{ "z":1,"a":2 }'}


def test_a_companion_that_leads_out_is_refused(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "source" / "merges.txt").symlink_to("../secret")
    with pytest.raises(ModelError, match="leads out"), FolderWriter(tmp_path / "out") as writer:
        writer.copy_companions(tmp_path / "source")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("names", "count"),
    [
        ({"tokenizer.json": {"model": {"vocab": {"a": 0, "b": 7}}, "added_tokens": [{"id": 9}, {"id": 8}]}}, 10),
        ({"tokenizer.json": {"model": {"vocab": [["a", 0.0], ["b", -1.0]]}, "added_tokens": [{"id": 1}]}}, 2),
        ({"tokenizer.json": {"model": {"vocab": {"a": 3}}}, "vocab.json": {"a": 99}}, 4),
        ({"vocab.json": {"a": 0, "b": 1}, "added_tokens.json": {"c": 2}}, 3),
        ({"tokenizer.json": {"model": 3, "added_tokens": 4}}, 0),
        ({}, 0),
    ],
)
def test_tokens_are_counted_by_their_ids(tmp_path: Path, names: dict[str, Any], count: int) -> None:
    for name, value in names.items():
        (tmp_path / name).write_text(json.dumps(value))
    assert token_count(tmp_path) == count


# Targets


def test_a_target_that_exists_is_refused(tmp_path: Path) -> None:
    out = write(tmp_path / "out")
    before = content(out)
    with pytest.raises(ModelError, match="exists and is not empty"):
        FolderWriter(out)
    assert content(out) == before
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="a file is in the way"):
        FolderWriter(tmp_path / "file", overwrite=True)
    with pytest.raises(ModelError, match="root of the file system"):
        FolderWriter("/", overwrite=True)


def test_an_empty_target_is_fine(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert value_of(write(tmp_path / "out", 3.0)) == 3.0


def test_only_a_model_folder_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.jpg").write_text("dear")
    with pytest.raises(ModelError, match="no model folder"):
        FolderWriter(tmp_path / "photos", overwrite=True)


def test_the_old_model_stays_until_the_commit(tmp_path: Path) -> None:
    out = write(tmp_path / "out", 1.0)
    with FolderWriter(out, overwrite=True) as writer:
        writer.write_json("config.json", CONFIG | {"value": 2.0})
        writer.write_tensors(lazily(tensors_of(2.0)))
        assert value_of(out) == 1.0
        writer.commit({})
        assert value_of(out) == 2.0
    assert list(tmp_path.iterdir()) == [out]
    assert not (out / "model.safetensors.index.json").exists()


def test_target_and_source_are_kept_apart(tmp_path: Path) -> None:
    source = write(tmp_path / "a" / "source")
    (tmp_path / "link").symlink_to(source)
    before = content(source)
    for target in (source, source / "inside", tmp_path / "a", tmp_path / "link", source / ".." / "source"):
        with pytest.raises(ModelError, match="source"):
            FolderWriter(target, overwrite=True, sources=[source])
    assert content(source) == before
    write(tmp_path / "a" / "source2", sources=[source])


def test_a_link_to_the_target_is_followed(tmp_path: Path) -> None:
    write(tmp_path / "disk" / "out", 1.0)
    (tmp_path / "link").symlink_to("disk/out")
    assert write(tmp_path / "link", 2.0, overwrite=True) == tmp_path / "link"
    assert (tmp_path / "link").is_symlink()
    assert value_of(tmp_path / "disk" / "out") == 2.0


class Boom(Exception):
    pass


def write_and_fail(target: Path, **options: Any) -> None:
    with FolderWriter(target, **options) as writer:
        writer.write_json("config.json", CONFIG)
        writer.write_tensors(lazily(tensors_of(0.0)))
        raise Boom


def test_an_exception_leaves_nothing(tmp_path: Path) -> None:
    out = write(tmp_path / "out", 1.0)
    before = content(out)
    for target, options in ((tmp_path / "new" / "deep", {}), (out, {"overwrite": True})):
        with pytest.raises(Boom):
            write_and_fail(target, **options)
    assert list(tmp_path.iterdir()) == [out]
    assert content(out) == before


def test_leaving_without_commit_leaves_nothing(tmp_path: Path) -> None:
    with FolderWriter(tmp_path / "out") as writer:
        writer.write_json("config.json", CONFIG)
    assert list(tmp_path.iterdir()) == []


# Two writers, and dead ones


def test_two_writers(tmp_path: Path) -> None:
    with FolderWriter(tmp_path / "out") as first:
        first.write_json("config.json", CONFIG | {"value": 1.0})
        with pytest.raises(ModelError, match="another process is writing"), FolderWriter(tmp_path / "out"):
            pass
        first.write_tensors(lazily(tensors_of(1.0)))
        first.commit({})
    assert value_of(tmp_path / "out") == 1.0


def test_a_stale_folder_is_cleared(tmp_path: Path) -> None:
    stale = tmp_path / ".out.moewright-tmp"
    (stale / "folder").mkdir(parents=True)
    (stale / "model.safetensors").write_text("half")
    (stale / "link").symlink_to(tmp_path)
    assert value_of(write(tmp_path / "out")) == 0.0
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_folder_that_its_owner_removes_while_we_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between opening and locking, the other writer ends: what we have locked is then no longer at the path."""
    flock, calls = fcntl.flock, []

    def slow(descriptor: int, operation: int) -> None:
        calls.append(descriptor)
        if len(calls) == 1:
            (tmp_path / ".out.moewright-tmp").rmdir()
        elif len(calls) == 2:
            (tmp_path / ".out.moewright-tmp").rename(tmp_path / "elsewhere")
            (tmp_path / ".out.moewright-tmp").mkdir()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", slow)
    assert value_of(write(tmp_path / "out", 4.0)) == 4.0
    assert len(calls) == 3
    assert content(tmp_path / "elsewhere") == {}


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(descriptor: int, operation: int) -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with pytest.warns(UserWarning, match="no locks"):
        assert value_of(write(tmp_path / "out", 1.0)) == 1.0
    (tmp_path / ".new.moewright-tmp").mkdir()
    with pytest.raises(ModelError, match="left by another process"):
        write(tmp_path / "new")
    assert (tmp_path / ".new.moewright-tmp").is_dir()


def test_something_in_the_place_of_a_model_that_was_moved_aside(tmp_path: Path) -> None:
    write(tmp_path / "out", 1.0).rename(tmp_path / ".out.moewright-old")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="something else took the place"):
        write(tmp_path / "out", 2.0, overwrite=True)
    assert value_of(tmp_path / ".out.moewright-old") == 1.0
    (tmp_path / "out" / "config.json").unlink()
    with pytest.warns(UserWarning, match="interrupted"), pytest.raises(ModelError, match="exists and is not empty"):
        write(tmp_path / "out", 2.0)
    assert value_of(tmp_path / "out") == 1.0


def test_a_failing_rename_puts_the_old_model_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = write(tmp_path / "out", 1.0)
    rename = os.rename

    def failing(source: Any, target: Any) -> None:
        if str(source).endswith(".moewright-tmp"):
            raise OSError(errno.EIO, "Input/output error", str(source))
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(ModelError, match="Input/output error"):
        write(out, 2.0, overwrite=True)
    assert value_of(out) == 1.0
    assert list(tmp_path.iterdir()) == [out]


def kill_fresh(folder: Path, arm: Callable[[], None]) -> None:
    arm()
    write(folder / "out", 2.0)


def kill_overwrite(folder: Path, arm: Callable[[], None]) -> None:
    write(folder / "out", 1.0)
    arm()
    write(folder / "out", 2.0, overwrite=True)


def test_killed_anywhere_there_is_nothing_or_all(tmp_path: Path) -> None:
    expected = content(write(tmp_path / "expected", 2.0))
    folders = kill_everywhere(kill_fresh, tmp_path / "kill")
    assert len(folders) > 30
    whole = []
    for folder in folders:
        if (folder / "out").exists():
            whole.append(value_of(folder / "out"))
        else:
            write(folder / "out", 2.0)  # the same command again
        assert content(folder / "out") == expected
        assert list(folder.iterdir()) == [folder / "out"]
    # After the rename there are the parent's fsync, a look for an old model to delete, and the end.
    assert whole == [2.0] * 3


@pytest.mark.filterwarnings("ignore:.*an overwrite had been interrupted")
def test_killed_while_overwriting_there_is_the_old_or_the_new(tmp_path: Path) -> None:
    expected = content(write(tmp_path / "expected", 2.0))
    folders = kill_everywhere(kill_overwrite, tmp_path / "kill")
    seen = []
    for folder in folders:
        if (folder / "out").exists():
            seen.append(value_of(folder / "out"))
        else:  # between the two renames
            seen.append(None)
            assert value_of(folder / ".out.moewright-old") == 1.0
            with pytest.raises(ModelError, match="interrupted"):
                ModelFolder(folder / "out")
        write(folder / "out", 2.0, overwrite=True)
        assert content(folder / "out") == expected
        assert list(folder.iterdir()) == [folder / "out"]
    first_new = seen.index(2.0)
    assert seen[:first_new] == [1.0] * (first_new - 1) + [None]
    assert set(seen[first_new:]) == {2.0}
    assert min(first_new, len(seen) - first_new) > 5


# Into a folder that holds other things


def test_into_a_folder_nothing_of_the_users_is_lost(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "checkpoint-5").mkdir(parents=True)
    others = {"optimizer.pt": b"state", "tokenizer.json": b"{}", "notes.md": b"mine", "adapter_model.safetensors": b"a"}
    for name, data in others.items():
        (out / name).write_bytes(data)
    write(out, 1.0, into=True)
    with FolderWriter(out, into=True) as writer:  # one file where there were two and an index
        writer.write_json("config.json", CONFIG | {"value": 2.0})
        writer.write_tensors(lazily(tensors_of(2.0)))
        writer.commit({})
    assert value_of(out) == 2.0
    whole = {"config.json", "model.safetensors", "moewright.json"}
    assert {file.name for file in out.iterdir()} == whole | others.keys() | {"checkpoint-5"}
    write(out, 3.0, into=True)
    assert value_of(out) == 3.0
    assert {name: (out / name).read_bytes() for name in others} == others
    assert list(tmp_path.iterdir()) == [out]


def test_into_a_folder_that_does_not_exist_or_that_cannot_be(tmp_path: Path) -> None:
    assert value_of(write(tmp_path / "new", 1.0, into=True)) == 1.0
    (tmp_path / "file").write_text("x")
    with pytest.raises(ModelError, match="a file is in the way"):
        write(tmp_path / "file", into=True)
    (tmp_path / "new" / "model-00001-of-00002.safetensors").unlink()
    (tmp_path / "new" / "model-00001-of-00002.safetensors").mkdir()
    for shard_bytes in (1100, 10**6):  # as a file that comes, and as one that goes
        with pytest.raises(ModelError, match=r"a folder model-00001-of-00002.* is in the way"):
            write(tmp_path / "new", into=True, max_shard_bytes=shard_bytes)
    assert (tmp_path / "new" / "config.json").exists()
    assert not (tmp_path / "new" / ".moewright-tmp").exists()


def interrupted_before(out: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of a model of 1, into which one of 2 was being moved when the file of this name could not be."""
    write(out, 1.0)
    rename = os.rename

    def failing(source: Any, target: Any) -> None:
        if str(target).endswith(suffix):
            raise OSError(errno.EIO, "Input/output error", str(source))
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", failing)
        with pytest.raises(ModelError, match="Input/output error"):
            write(out, 2.0, into=True)
    return out


def test_a_move_that_fails_is_finished_by_the_next_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = interrupted_before(tmp_path / "out", "00002-of-00002.safetensors", monkeypatch)
    with pytest.raises(ModelError, match="a save into it was interrupted; save into it again"):
        ModelFolder(out)
    with FolderWriter(out, into=True):
        pass
    assert value_of(out) == 2.0


def leave(folder: Path, files: dict[str, Any]) -> Path:
    """A temporary folder in `folder`, as a killed save could have left it, or somebody who means no good."""
    work = folder / ".moewright-tmp"
    work.mkdir(parents=True)
    for name, value in files.items():
        (work / name).write_text(json.dumps(value))
    return work


@pytest.mark.parametrize("record", [{"files": {"../../precious": {"bytes": 4, "sha256": "x"}}}, {}, {"files": 3}])
def test_a_leftover_that_we_did_not_leave_moves_nothing(tmp_path: Path, record: dict[str, Any]) -> None:
    out = tmp_path / "a" / "out"
    leave(out, {"config.json": CONFIG, "moewright.json": record})
    (tmp_path / "a" / "precious").write_text("new")
    (tmp_path / "precious").write_text("old")
    with pytest.raises(ModelError, match="we did not leave it like that"):
        write(out, into=True)
    assert (tmp_path / "precious").read_text() == "old"
    assert (tmp_path / "a" / "precious").read_text() == "new"


def test_a_leftover_link_is_not_moved(tmp_path: Path) -> None:
    out = tmp_path / "out"
    record = {"bytes": 1, "sha256": "x"}
    work = leave(out, {"moewright.json": {"files": {"config.json": record}}})
    (work / "config.json").symlink_to("/etc/hostname")
    with pytest.raises(ModelError, match=r"config\.json is a link"):
        write(out, into=True)


def test_half_a_model_is_not_taken_for_one_that_was_to_be_moved(tmp_path: Path) -> None:
    """An old record in the target says nothing of the new files; its config, if it is the same, comes back."""
    out = write(tmp_path / "out", 1.0)
    good = content(out)
    (out / "config.json").unlink()  # by hand, say
    work = leave(out, {"config.json": CONFIG | {"value": 2.0}})
    (work / "model-00001-of-00002.safetensors").write_bytes(b"half")
    with pytest.raises(RuntimeError, match="fails, too"), FolderWriter(out, into=True):
        raise RuntimeError("fails, too")
    assert content(out) == {name: data for name, data in good.items() if name != "config.json"}
    (leave(out, {}) / "config.json").write_bytes(good["config.json"])
    with pytest.raises(RuntimeError, match="fails, too"), FolderWriter(out, into=True):
        raise RuntimeError("fails, too")
    assert content(out) == good


def test_a_save_that_fails_after_a_mend_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = interrupted_before(tmp_path / "out", "config.json", monkeypatch)
    with pytest.raises(RuntimeError, match="fails, too"), FolderWriter(out, into=True):
        raise RuntimeError("fails, too")
    assert value_of(out) == 2.0
    assert not (out / ".moewright-tmp").exists()


def kill_into(folder: Path, arm: Callable[[], None]) -> None:
    write(folder / "out", 1.0)
    (folder / "out" / "optimizer.pt").write_bytes(b"state")
    arm()
    write(folder / "out", 2.0, into=True)


def test_killed_on_the_way_into_a_folder_it_holds_the_old_the_new_or_is_refused(tmp_path: Path) -> None:
    expected = content(write(tmp_path / "expected", 2.0)) | {"optimizer.pt": b"state"}
    folders = kill_everywhere(kill_into, tmp_path / "kill")
    seen = []
    for folder in folders:
        out = folder / "out"
        if (out / "config.json").exists():
            seen.append(value_of(out))
        else:
            seen.append(None)
            with pytest.raises(ModelError, match="interrupted"):
                ModelFolder(out)
            with FolderWriter(out, into=True):
                pass
            assert value_of(out) == 2.0
        write(out, 2.0, into=True)
        assert content(out) == expected
    first, last = seen.index(None), len(seen) - seen[::-1].index(None)
    assert seen == [1.0] * first + [None] * (last - first) + [2.0] * (len(seen) - last)
    assert min(first, last - first) > 4


# No room, no right


def test_no_room_is_said_before_anything_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage(NamedTuple):
        free: int = 1000

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage())

    def never() -> Tensor:
        raise AssertionError("nothing is made")

    with pytest.raises(ResourceError, match=r"\d+ bytes are needed, 1000 are free"), FolderWriter(tmp_path / "o") as w:
        w.write_tensors({"a": LazyTensor((2000,), torch.float32, never)})
    assert list(tmp_path.iterdir()) == []


def write_big(target: Path) -> None:
    with FolderWriter(target, overwrite=True) as writer:
        writer.write_json("config.json", {"text": "x" * 200})
        writer.write_tensors(lazily({"a" * 400: torch.ones(100, 100)}))
        writer.commit({})


@pytest.mark.parametrize("limit", [100, 300, 20_000])
def test_a_full_disk_leaves_the_old_model(tmp_path: Path, limit: int) -> None:
    """A limit on file sizes stands for the disk: the write fails half-way (in the config, a header, a tensor)."""
    out = write(tmp_path / "out", 1.0)
    before = content(out)
    with largest_file(limit), pytest.raises(ResourceError, match=r"bytes free\); make room"):
        write_big(out)
    assert content(out) == before
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_is_full_at_the_very_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def full(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError):
        write(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def read_only() -> Iterator[Path]:
    """A folder in which an ordinary user can make nothing."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o555)
    yield path
    path.chmod(0o755)
    shutil.rmtree(path)


def test_a_read_only_parent_is_refused(read_only: Path) -> None:
    script = """
        import os, sys
        from moewright.checkpoint.write import FolderWriter
        from moewright.errors import ModelError
        if os.geteuid() == 0:
            os.seteuid(65534)  # root may write everywhere
        try:
            with FolderWriter(sys.argv[1]):
                pass
        except ModelError as error:
            sys.exit(str(error))
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(read_only / "new" / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent, check=False)
    assert done.returncode == 1
    assert "cannot be written" in done.stderr
    assert "Permission denied" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert list(read_only.iterdir()) == []
