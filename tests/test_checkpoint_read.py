"""Model folders that others wrote: what is read, and what is refused with which words."""

import contextlib
import errno
import hashlib
import json
import math
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from moewright.checkpoint.ahead import hash_ahead
from moewright.checkpoint.read import GRAIN, ModelFolder
from moewright.checkpoint.tensorfile import DTYPES, LazyTensor, read_header, read_tensor
from moewright.checkpoint.untrusted import MAX_JSON_BYTES
from moewright.checkpoint.write import FolderWriter
from moewright.errors import ModelError
from tests.models import tiny_model
from tests.raw_files import entry, write_raw

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def write_config(folder: Path, **changes: Any) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"} | changes))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder ``model`` with the tensors a (2, 3) and b (4,) in one file."""
    path = tmp_path / "model"
    path.mkdir()
    write_config(path)
    save_file({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4)}, path / WEIGHTS)
    return path


@pytest.fixture
def sharded(folder: Path) -> Path:
    """The same tensors in two shards with an index."""
    (folder / WEIGHTS).unlink()
    save_file({"a": torch.arange(6.0).view(2, 3)}, folder / "one.safetensors")
    save_file({"b": torch.ones(4)}, folder / "two.safetensors")
    write_index(folder, {"a": "one.safetensors", "b": "two.safetensors"})
    return folder


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def refused(folder: Path, *words: str) -> None:
    """Opening fails with a message of one line that holds all words and names the folder."""
    with pytest.raises(ModelError) as caught:
        ModelFolder(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    for word in words:
        assert word in message


# What is read


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_reads_as_the_library_reads_it(tmp_path: Path, name: str) -> None:
    values = torch.randint(0, 2, (3, 5)).to(DTYPES[name])
    tensors = {"matrix": values, "scalar": values[0, 0].clone(), "empty": values[:0].clone()}
    save_file(tensors, tmp_path / WEIGHTS)
    expected = load_file(tmp_path / WEIGHTS)
    for key, info in read_header(tmp_path / WEIGHTS).items():
        found = read_tensor(info)
        assert (found.dtype, found.shape) == (expected[key].dtype, expected[key].shape)
        raw, expected_raw = (t.reshape(-1).view(torch.uint8) for t in (found, expected[key]))
        assert torch.equal(raw, expected_raw)


@st.composite
def parts(draw: st.DrawFn) -> tuple[list[int], tuple[slice, ...]]:
    """A shape, and a slice for its first dims: short, empty, from the end, or beyond it."""
    shape = draw(st.lists(st.integers(0, 5), max_size=4))
    ends = st.none() | st.integers(-6, 6)
    index = draw(st.lists(st.builds(slice, ends, ends), max_size=len(shape)))
    return shape, tuple(index)


@given(parts(), st.sampled_from([torch.bfloat16, torch.float64]))
def test_a_part_of_a_tensor_is_its_slice(
    tmp_path_factory: pytest.TempPathFactory, part: tuple[list[int], tuple[slice, ...]], dtype: torch.dtype
) -> None:
    shape, index = part
    whole = torch.arange(math.prod(shape), dtype=dtype).view(shape)
    path = tmp_path_factory.getbasetemp() / "part.safetensors"
    save_file({"before": torch.ones(3), "whole": whole, "after": torch.ones(3)}, path)
    found = read_tensor(read_header(path)["whole"], index)
    assert found.dtype == dtype
    assert found.is_contiguous()
    assert torch.equal(found, whole[index])


def bytes_read() -> int:
    """Bytes that this process has had from the system's read calls."""
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.mark.skipif(sys.platform != "linux", reason="counted by Linux")
@pytest.mark.parametrize(
    "index",
    [
        (),
        (slice(3, 5),),
        (slice(None), slice(40, 80)),
        (slice(2, 8), slice(None), slice(100, 101)),
        (slice(0, 0),),
    ],
)
def test_no_byte_is_read_outside_the_part(folder: Path, index: tuple[slice, ...]) -> None:
    save_file({"a": torch.ones(8, 100, 200), "b": torch.ones(4)}, folder / WEIGHTS)
    model = ModelFolder(folder)
    start = bytes_read()
    counting = bytes_read() - start
    tensor = model.read("a", index)
    # The counter itself is a file that is read; its length may change by a few digits.
    assert abs(bytes_read() - start - 2 * counting - tensor.nbytes) < 20


def test_a_part_is_checked_for_itself(folder: Path) -> None:
    tensor = torch.ones(4, 3)
    tensor[2, 1] = torch.nan
    save_file({"a": tensor}, folder / WEIGHTS)
    model = ModelFolder(folder)
    assert torch.equal(model.read("a", (slice(None), slice(2, 3))), torch.ones(4, 1))
    with pytest.raises(ModelError, match="tensor a holds NaN or Inf"):
        model.read("a", (slice(2, 3),))
    with pytest.raises(AssertionError, match="has a step"):
        model.read("a", (slice(0, 4, 2),))
    os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size - 8)
    with pytest.raises(ModelError, match="truncated: tensor a needs 16 bytes, 12 were found"):
        model.read("a", (slice(None), slice(2, 3)))


@pytest.mark.parametrize("count", [4, 2**20])
def test_a_tensor_is_memory_of_its_own(folder: Path, count: int) -> None:
    save_file({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(count)}, folder / WEIGHTS)
    tensor = ModelFolder(folder).read("b")
    before = (folder / WEIGHTS).read_bytes()
    tensor.mul_(2)
    assert (folder / WEIGHTS).read_bytes() == before
    with (folder / WEIGHTS).open("r+b") as file:
        file.write(b"\0" * len(before))
    assert torch.equal(tensor, torch.full((count,), 2.0))


def test_a_tensor_that_does_not_fit_is_a_matter_of_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    save_file({"a": torch.ones(2**19)}, folder / WEIGHTS)
    monkeypatch.setattr("mmap.mmap", full)
    with pytest.raises(MemoryError, match=f"{2**21} bytes"):
        ModelFolder(folder).read("a")


def test_a_folder_of_transformers_reads_back(tmp_path: Path) -> None:
    model = tiny_model("qwen2")
    model.save_pretrained(tmp_path / "m", max_shard_size="20KB")
    folder = ModelFolder(tmp_path / "m")
    expected = model.state_dict()
    assert len({info.file for info in folder.tensors.values()}) > 1
    folder.check({name: tuple(tensor.shape) for name, tensor in expected.items()})
    assert folder.dtype() == torch.float32
    for name, tensor in expected.items():
        assert torch.equal(folder.read(name), tensor)
    assert folder.config["hidden_size"] == 32
    assert folder.record is None


def test_opening_allocates_no_tensor(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch, "empty")
    assert list(ModelFolder(sharded).tensors) == ["a", "b"]


def test_a_link_that_stays_inside_is_followed(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "data")
    (folder / WEIGHTS).symlink_to("data")
    assert ModelFolder(folder).read("b").tolist() == [1.0] * 4


def test_a_folder_reached_through_a_link_is_read(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder, target_is_directory=True)
    assert ModelFolder(tmp_path / "link").read("b").tolist() == [1.0] * 4


# Folders


def test_missing_empty_and_file(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "no such folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "empty", "config.json")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "not a folder")


def test_an_interrupted_overwrite_is_named(folder: Path) -> None:
    folder.rename(folder.with_name(".model.moewright-old"))
    refused(folder, "interrupted", ".model.moewright-old")


def test_only_pickles(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    refused(folder, "pytorch_model.bin", "save_pretrained")


def test_no_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    refused(folder, WEIGHTS, INDEX)


def test_shards_without_index(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    refused(sharded, "one.safetensors, two.safetensors", f"no {INDEX}")


def test_one_file_and_an_index(sharded: Path) -> None:
    shutil.copy(sharded / "one.safetensors", sharded / WEIGHTS)
    refused(sharded, "both")


@pytest.mark.timeout(20)
def test_a_pipe_in_place_of_weights_does_not_hang(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)
    refused(folder, "not a regular one")


# Safetensors files


@pytest.mark.parametrize("cut", [1, 16, 40, 100, 160])
def test_truncated(folder: Path, cut: int) -> None:
    file = folder / WEIGHTS
    size = file.stat().st_size
    os.truncate(file, size - cut)
    refused(folder, WEIGHTS, f"found {size - cut}", "expected")
    if cut <= 40:
        refused(folder, f"truncated: expected {size} bytes, found {size - cut}")


@pytest.mark.parametrize("size", [0, 7])
def test_shorter_than_a_header_length(folder: Path, size: int) -> None:
    os.truncate(folder / WEIGHTS, size)
    refused(folder, f"expected at least 8 bytes, found {size}")


def test_too_long(folder: Path) -> None:
    file = folder / WEIGHTS
    size = file.stat().st_size
    os.truncate(file, size + 4)
    refused(folder, f"too long: expected {size} bytes, found {size + 4}")


def test_a_header_of_two_to_the_sixty(folder: Path) -> None:
    write_raw(folder / WEIGHTS, {}, b"", length=2**60)
    refused(folder, str(2**60), "at most 100000000")


@pytest.mark.parametrize("header", [b"{", b"\xff\xfe", b"[" * 100_000, b"[]", b"1" * 10_000, b"null"])
def test_headers_that_are_not_json_objects(folder: Path, header: bytes) -> None:
    write_raw(folder / WEIGHTS, header, b"")
    refused(folder, "JSON")


def test_no_tensors(folder: Path) -> None:
    write_raw(folder / WEIGHTS, {"__metadata__": {"format": "pt"}}, b"")
    refused(folder, "holds no tensors")


@pytest.mark.parametrize(
    ("header", "word"),
    [
        ({"x": entry([2], 0, 8), "y": entry([2], 4, 12), "z": entry([1], 12, 16)}, "tensor y starts at byte"),
        ({"x": entry([2], 0, 8), "y": entry([1], 12, 16)}, "tensor y starts at byte"),
        ({"x": entry([2], 8, 16)}, "tensor x starts at byte"),
        ({"x": entry([3], 0, 16)}, "needs 12 bytes, it has 16"),
        ({"x": entry([2**40, 2**40], 0, 16)}, "it has 16"),
        ({"x": entry([4], 16, 0)}, "it has -16"),
        ({"x": entry([-4], 0, 16)}, "malformed shape"),
        ({"x": entry([4.0], 0, 16)}, "malformed shape"),
        ({"x": entry([True, 4], 0, 16)}, "malformed shape"),
        ({"x": entry([2**70, 0], 0, 16)}, "malformed shape"),
        ({"x": entry([1] * 1000, 0, 4)}, "malformed shape"),
        ({"x": entry("4", 0, 16)}, "malformed shape"),
        ({"x": entry([4], -16, 0)}, "malformed offsets"),
        ({"x": entry([4], 0, "16")}, "malformed offsets"),
        ({"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8, 16]}}, "malformed offsets"),
        ({"x": {"dtype": "F32", "shape": [4]}}, "malformed offsets"),
        ({"x": entry([4], 0, 16, "F4")}, "'F4'"),
        ({"x": entry([4], 0, 16, ["F32"])}, "dtype"),
        ({"x": [4]}, "no description"),
        (
            b'{"x":' + json.dumps(entry([2], 0, 8)).encode() + b',"x":' + json.dumps(entry([2], 8, 16)).encode() + b"}",
            "x",
        ),
    ],
)
def test_headers_that_lie(folder: Path, header: Any, word: str) -> None:
    write_raw(folder / WEIGHTS, header, bytes(16))
    refused(folder, WEIGHTS, word)


def test_random_damage_is_refused_or_harmless(folder: Path) -> None:
    """Whatever happens to a header, opening gives a ModelError or tensors that can be read."""
    whole = (folder / WEIGHTS).read_bytes()
    end = 8 + struct.unpack("<Q", whole[:8])[0]
    rng = random.Random(0)
    opened = 0
    for _ in range(500):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(end)] = rng.choice(b'0123456789{}[]",:xF\0\xff')
        (folder / WEIGHTS).write_bytes(damaged)
        try:
            model = ModelFolder(folder, allow_nonfinite=True)
        except ModelError:
            continue
        opened += 1
        for name in model.tensors:
            model.read(name)
    assert 0 < opened < 250  # a changed name or a changed space is harmless; most damage is not


def test_a_file_that_shrinks_after_opening(folder: Path) -> None:
    model = ModelFolder(folder)
    os.truncate(folder / WEIGHTS, 100)
    with pytest.raises(ModelError, match="truncated: tensor b needs 16 bytes"):
        model.read("b")


# Index


@pytest.mark.parametrize(
    "name", ["../out.safetensors", "/etc/out.safetensors", "sub/out.safetensors", "..\\x.safetensors", ".safetensors"]
)
def test_index_entries_that_are_not_plain_names(sharded: Path, name: str) -> None:
    (sharded / "sub").mkdir()
    for place in (sharded.parent / "out.safetensors", sharded / "sub/out.safetensors"):
        shutil.copy(sharded / "one.safetensors", place)
    write_index(sharded, {"a": name, "b": "two.safetensors"})
    refused(sharded, "not a plain file name", repr(name))


@pytest.mark.parametrize("place", [None, 3, ["one.safetensors"], "config.json", "a\0.bin"])
def test_index_entries_that_are_no_weight_files(sharded: Path, place: Any) -> None:
    write_index(sharded, {"a": place, "b": "two.safetensors"})
    refused(sharded, "not the name of a safetensors file")


@pytest.mark.parametrize("weight_map", [None, [], {}, "one.safetensors"])
def test_index_without_map(sharded: Path, weight_map: Any) -> None:
    write_index(sharded, weight_map)
    refused(sharded, INDEX, "no weight_map")


@pytest.mark.parametrize("name", ["config.json", WEIGHTS])
def test_a_link_that_leads_out(folder: Path, name: str) -> None:
    (folder / name).rename(folder.parent / "outside")
    (folder / name).symlink_to("../outside")
    refused(folder, name, "leads out")


def test_a_shard_that_is_a_link_leading_out(sharded: Path) -> None:
    (sharded / "one.safetensors").rename(sharded.parent / "one.safetensors")
    (sharded / "one.safetensors").symlink_to("../one.safetensors")
    refused(sharded, "one.safetensors", "leads out")


def test_a_missing_shard(sharded: Path) -> None:
    (sharded / "two.safetensors").unlink()
    refused(sharded, "two.safetensors", "no such file")


def test_index_lacks_tensors(sharded: Path) -> None:
    save_file({f"c{i}": torch.ones(1) for i in range(8)}, sharded / "two.safetensors")
    write_index(sharded, {"a": "one.safetensors", "c0": "two.safetensors"})
    refused(sharded, "it lacks: c1, c2, c3, c4, c5 and 2 more")


def test_index_names_tensors_that_are_not_there(sharded: Path) -> None:
    extra = {f"d{i}": "one.safetensors" for i in range(6)}
    write_index(sharded, {"a": "one.safetensors", "b": "two.safetensors"} | extra)
    refused(sharded, "its shards lack: d0, d1, d2, d3, d4 and 1 more")


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    save_file({"a": torch.ones(1), "b": torch.ones(4)}, sharded / "two.safetensors")
    refused(sharded, "it lacks: a")


# Config


def test_config_missing_or_malformed(folder: Path) -> None:
    config = folder / "config.json"
    for text, words in [
        ("{", "not valid JSON"),
        ("[]", "JSON list"),
        ("[" * 100_000, "not valid JSON"),
        ("", "not valid"),
    ]:
        config.write_text(text)
        refused(folder, "config.json", words)
    config.write_bytes(b"\xff")
    refused(folder, "not valid JSON")
    with config.open("wb") as file:
        file.truncate(MAX_JSON_BYTES + 1)
    refused(folder, str(MAX_JSON_BYTES + 1), f"at most {MAX_JSON_BYTES}")
    config.unlink()
    refused(folder, "config.json", "no such file")


def test_config_nested_so_deep_that_cleaning_it_fails(folder: Path) -> None:
    for depth in range(200, 1200, 50):  # the parser's own limit differs between versions of Python
        (folder / "config.json").write_text('{"a":' * depth + "1" + "}" * depth)
        with contextlib.suppress(ModelError):  # any other exception fails
            ModelFolder(folder)


def test_code_named_in_a_config_is_dropped(folder: Path) -> None:
    nested = {"_attn_implementation": "evil/kernel", "attn_implementation": "evil/kernel", "kept": 1}
    write_config(folder, auto_map={"AutoModel": "evil.py"}, _private=1, text_config=nested, parts=[nested], plain=2)
    with pytest.warns(UserWarning, match="auto_map"):
        model = ModelFolder(folder)
    assert model.config == {"model_type": "llama", "text_config": {"kept": 1}, "parts": [{"kept": 1}], "plain": 2}


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_quantised_by_config(folder: Path, key: str) -> None:
    write_config(folder, **{key: {"quant_method": "gptq"}})
    refused(folder, "quantised weights", key)
    write_config(folder, **{key: None})
    ModelFolder(folder)


def test_quantised_by_dtype(folder: Path) -> None:
    save_file({"a": torch.ones(4).to(torch.float8_e4m3fn)}, folder / WEIGHTS)
    refused(folder, "quantised weights", "float8", "a")


# Names, shapes, values


def test_check(folder: Path) -> None:
    model = ModelFolder(folder)
    model.check({"a": (2, 3), "b": (4,)})
    model.check({"a": (2, 3), "c": (1,)}, optional={"b", "c"})
    with pytest.raises(ModelError, match=r"missing .*: c0, c1, c2, c3, c4 and 2 more$"):
        model.check({"a": (2, 3), "b": (4,)} | {f"c{i}": (1,) for i in range(7)})
    with pytest.raises(ModelError, match=r"no place for: b$"):
        model.check({"a": (2, 3)})
    with pytest.raises(ModelError, match=re.escape("a is [2, 3], not [3, 2]")):
        model.check({"a": (3, 2), "b": (4,)})
    with pytest.raises(ModelError, match=re.escape("b is [4], not [5]")):
        model.check({"a": (2, 3), "b": (5,)}, optional={"b"})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_values_that_are_not_finite(folder: Path, value: float, dtype: torch.dtype) -> None:
    tensor = torch.zeros(3, 100, dtype=dtype)
    tensor[1, 7] = value
    save_file({"w": tensor, "v": tensor[:1].clone(), "n": torch.tensor([2**62])}, folder / WEIGHTS)
    model = ModelFolder(folder)
    with pytest.raises(ModelError, match="tensor w holds NaN or Inf"):
        model.read("w")
    assert ModelFolder(folder, allow_nonfinite=True).read("w")[1, 7].isfinite().logical_not()
    assert model.read("v").count_nonzero() == 0
    assert model.read("n").item() == 2**62


def test_dtype(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ModelFolder(folder).dtype() == torch.float32
    save_file({"n": torch.ones(4, dtype=torch.int64)}, folder / WEIGHTS)
    with pytest.raises(ModelError, match="no floating-point weights"):
        ModelFolder(folder).dtype()


@pytest.mark.parametrize(
    ("one", "two", "widest"),
    [
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16, torch.float32),
        (torch.float64, torch.float16, torch.float64),
    ],
)
def test_mixed_dtypes_warn_once(folder: Path, one: torch.dtype, two: torch.dtype, widest: torch.dtype) -> None:
    save_file({"a": torch.ones(1, dtype=one), "b": torch.ones(1, dtype=two)}, folder / WEIGHTS)
    model = ModelFolder(folder)
    with pytest.warns(UserWarning, match="mixed dtypes") as caught:
        found = [model.dtype(), model.dtype()]
    assert found == [widest, widest]
    assert len(caught) == 1
    assert all(str(dtype).removeprefix("torch.") in str(caught[0].message) for dtype in (one, two, widest))
    assert caught[0].filename == __file__


def test_fingerprint(folder: Path, tmp_path: Path) -> None:
    before = ModelFolder(folder).fingerprint()
    # As `sha256sum config.json model*.safetensors | sha256sum` has it.
    lines = [
        f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in ("config.json", WEIGHTS)
    ]
    assert before == hashlib.sha256("".join(lines).encode()).hexdigest()
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "README.md").write_text("no part of it")
    assert ModelFolder(tmp_path / "copy").fingerprint() == before
    write_config(folder, changed=1)
    assert ModelFolder(folder).fingerprint() != before
    write_config(folder)
    assert ModelFolder(folder).fingerprint() == before
    save_file({"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(4)}, folder / WEIGHTS)
    assert ModelFolder(folder).fingerprint() != before


def test_a_fingerprint_begun_early(folder: Path) -> None:
    late, whole = ModelFolder(folder).fingerprint(), (folder / WEIGHTS).read_bytes()
    model = ModelFolder(folder, hashes=hash_ahead(folder))
    assert model.fingerprint() == model.fingerprint() == late
    # What changes after it was hashed is hashed again.
    hashes = hash_ahead(folder)
    hashes.record_of(folder / WEIGHTS)
    changed = bytearray(whole)
    changed[-1] ^= 1
    (folder / WEIGHTS).write_bytes(changed)
    assert ModelFolder(folder, hashes=hashes).fingerprint() == ModelFolder(folder).fingerprint() != late
    damaged = ModelFolder(folder, hashes=hash_ahead(folder))
    (folder / WEIGHTS).unlink()
    with pytest.raises(ModelError, match="cannot be read"):
        damaged.fingerprint()
    (folder / WEIGHTS).write_bytes(whole)
    assert damaged.fingerprint() == late


def test_hashing_ahead_needs_no_torch() -> None:
    code = "import sys, moewright.checkpoint.ahead; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"files": []},
        {"files": {"../x": {"bytes": 1, "sha256": ""}}},
        {"files": {"config.json": {"bytes": "1", "sha256": ""}}},
        {"files": {"config.json": 3}},
        {"files": {}},
    ],
)
def test_records_that_are_malformed(folder: Path, record: Any) -> None:
    (folder / "moewright.json").write_text(json.dumps(record))
    with pytest.raises(ModelError, match=r"moewright\.json"):
        ModelFolder(folder).verify_checksums()


def test_an_unreadable_file_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", denied)
    refused(folder, "cannot be read", "Permission denied")


def test_reading_leaves_torchs_threads_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other threads of the program see the number, and what is NaN is found wherever it stands."""
    monkeypatch.setattr(torch, "set_num_threads", None)
    folder = tmp_path / "model"
    for place in (0, GRAIN - 1, GRAIN, 3 * GRAIN + 1):
        tensor = torch.zeros(3 * GRAIN + 2)
        tensor[place] = torch.nan
        with FolderWriter(folder, overwrite=True) as writer:
            writer.write_json("config.json", {"model_type": "llama"})
            writer.write_tensors({"a": LazyTensor(tuple(tensor.shape), tensor.dtype, lambda tensor=tensor: tensor)})
            writer.commit({})
        with pytest.raises(ModelError, match="holds NaN or Inf"):
            ModelFolder(folder).read("a")
        assert ModelFolder(folder, allow_nonfinite=True).read("a")[place].isnan()
