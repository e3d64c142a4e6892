"""Bad input and failing disks, cases 6-24 of the fault suite, as one meets them: through the command line.

One function a case. Of each refusal it is checked that it is one line with the right words and exit code, and that
nothing on the disk has changed: the source, what was at the target before, and no file or folder more. How the library
refuses each kind of damage is tested at length in test_checkpoint_read.py and test_checkpoint_write.py.
"""

import contextlib
import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from moewright import cli
from moewright.checkpoint import files, write
from moewright.checkpoint.read import ModelFolder
from moewright.errors import ModelError
from moewright.upcycle.scale import Factors
from tests.full_disk import largest_file
from tests.kill import kill_everywhere
from tests.models import tiny_tokenizer, write_dense
from tests.raw_files import entry, write_raw

ROOT = Path(__file__).parents[1]
WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
UP = "model.layers.1.mlp.up_proj.weight"
OPTIONS = ("--experts", "4", "--top-k", "2")
SMALL = ("--experts", "2", "--top-k", "2")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dense(tmp_path_factory.mktemp("faults") / "dense")


@pytest.fixture
def source(template: Path, tmp_path: Path) -> Path:
    """A dense folder of one weight file, to be damaged."""
    shutil.copytree(template, tmp_path / "dense")
    return tmp_path / "dense"


@pytest.fixture
def sharded(source: Path) -> Path:
    """The same in two shards, one.safetensors (the first layer) and two.safetensors, and an index."""
    tensors = load_file(source / WEIGHTS)
    first = {name: tensor for name, tensor in tensors.items() if ".layers.0." in name}
    rest = {name: tensor for name, tensor in tensors.items() if name not in first}
    save_file(first, source / "one.safetensors")
    save_file(rest, source / "two.safetensors")
    (source / WEIGHTS).unlink()
    write_index(source, dict.fromkeys(first, "one.safetensors") | dict.fromkeys(rest, "two.safetensors"))
    return source


def write_index(folder: Path, places: dict[str, str]) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def read_index(folder: Path) -> dict[str, str]:
    places: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
    return places


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def everything(folder: Path) -> dict[str, bytes | str | None]:
    """Each path below a folder: a file's bytes, where a link leads, None for a folder."""
    return {
        str(path.relative_to(folder)): str(path.readlink())
        if path.is_symlink()
        else None
        if path.is_dir()
        else path.read_bytes()
        for path in folder.rglob("*")
    }


class Shell:
    """Runs the command line in this process, where ``place`` is all that it may change."""

    def __init__(self, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.place, self.capsys = place, capsys

    def run(self, *words: object) -> tuple[int, str]:
        """Exit code and standard error; nothing but JSON goes to standard output."""
        self.capsys.readouterr()
        code = cli.main([*map(str, words), "--json"])
        out, err = self.capsys.readouterr()
        assert (out == "") == (code != 0)
        return code, err

    def refuses(self, *words: object, say: tuple[object, ...], code: int = 2) -> None:
        """One line on standard error that holds all of ``say``, this exit code, and nothing changed."""
        before = everything(self.place)
        found, err = self.run(*words)
        assert found == code, err
        assert err.startswith("moewright: error: ")
        assert err.count("\n") == 1
        for word in say:
            assert str(word) in err
        assert everything(self.place) == before

    def refuses_source(self, folder: Path, *say: object) -> None:
        """``inspect`` and ``upcycle`` both refuse a folder."""
        self.refuses("inspect", folder, say=say)
        self.refuses("upcycle", folder, self.place / "moe", *OPTIONS, say=say)


@pytest.fixture
def shell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(tmp_path, capsys)


# The source


@pytest.mark.parametrize("cut", [1, 5000, -4, -100])
def test_case_06_truncated_weights(shell: Shell, source: Path, cut: int) -> None:
    """Cut off by `cut` bytes at the end, or (negative) after as many bytes: in the header's length, in the header."""
    size = (source / WEIGHTS).stat().st_size
    left = size - cut if cut > 0 else -cut
    os.truncate(source / WEIGHTS, left)
    expected = size if cut > 0 else "expected at least"
    shell.refuses_source(source, source / WEIGHTS, expected, f"found {left}")


@pytest.mark.parametrize(
    ("header", "length", "words"),
    [
        ({}, 2**60, f"claims {2**60} bytes"),
        ({}, 2**63 + 1, f"claims {2**63 + 1} bytes"),
        (b"not JSON", None, "not valid JSON"),
        ({"x": entry([4], 0, 16), "y": entry([4], 8, 24)}, None, "tensor y starts at byte"),
        ({"x": entry([2**40, 2**40], 0, 24)}, None, "needs"),
    ],
)
def test_case_07_a_header_that_lies(
    shell: Shell, source: Path, header: Any, length: int | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_raw(source / WEIGHTS, header, bytes(24), length)
    monkeypatch.delattr(torch, "empty")  # nothing is allocated for what such a header says
    monkeypatch.setattr("mmap.mmap", None)
    shell.refuses_source(source, source / WEIGHTS, words)


def test_case_08_shards_without_an_index(shell: Shell, sharded: Path) -> None:
    (sharded / INDEX).unlink()
    shell.refuses_source(sharded, "one.safetensors, two.safetensors", f"no {INDEX}")


def test_case_09_a_shard_that_is_absent(shell: Shell, sharded: Path) -> None:
    (sharded / "two.safetensors").unlink()
    shell.refuses_source(sharded, "two.safetensors", "no such file")


@pytest.mark.parametrize("fault", ["lacks", "extra"])
def test_case_10_an_index_that_is_not_the_shards(shell: Shell, sharded: Path, fault: str) -> None:
    places = read_index(sharded)
    if fault == "lacks":
        wrong = sorted(name for name in places if "layers.1" in name)[:7]
        for name in wrong:
            del places[name]
    else:
        wrong = [f"extra.{i}" for i in range(7)]
        places |= dict.fromkeys(wrong, "one.safetensors")
    write_index(sharded, places)
    before = everything(shell.place)
    shell.refuses_source(sharded, INDEX, "lacks" if fault == "lacks" else "shards lack", "and 2 more")
    _, err = shell.run("inspect", sharded)
    assert sum(name in err for name in wrong) == 5
    assert everything(shell.place) == before


@pytest.mark.parametrize("place", ["../out.safetensors", "absolute", "link", "config link"])
def test_case_11_a_file_outside_the_folder(shell: Shell, sharded: Path, place: str) -> None:
    outside = shell.place / "out.safetensors"
    (sharded / "one.safetensors").rename(outside)
    if place == "config link":
        outside.rename(sharded / "one.safetensors")
        (sharded / CONFIG).rename(shell.place / CONFIG)
        (sharded / CONFIG).symlink_to(f"../{CONFIG}")
        shell.refuses_source(sharded, CONFIG, "leads out of the folder")
    elif place == "link":
        (sharded / "one.safetensors").symlink_to(outside)
        shell.refuses_source(sharded, "one.safetensors", "leads out of the folder")
    else:
        named = str(outside) if place == "absolute" else place
        places = read_index(sharded).items()
        write_index(sharded, {name: named if shard == "one.safetensors" else shard for name, shard in places})
        shell.refuses_source(sharded, repr(named), "not a plain file name")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "last.ckpt"])
def test_case_12_pickles_alone(shell: Shell, source: Path, name: str) -> None:
    (source / WEIGHTS).unlink()
    (source / name).write_bytes(b"\x80\x04cos\nsystem\n(S'touch ran'\ntR.")
    shell.refuses_source(source, name, "can run code", "save_pretrained")
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    ("changes", "shapes"),
    [
        ({"intermediate_size": 96}, ("[64, 32]", "[96, 32]")),
        ({"vocab_size": 300}, ("[264, 32]", "[300, 32]")),
        ({"hidden_size": 48}, ("[264, 32]", "[264, 48]")),
        ({"num_hidden_layers": 3}, ("model.layers.2", "num_hidden_layers=3")),
    ],
)
def test_case_13_shapes_that_disagree_with_the_config(
    shell: Shell, source: Path, changes: dict[str, int], shapes: tuple[str, ...]
) -> None:
    change_json(source / CONFIG, **changes)
    shell.refuses_source(source, source, *shapes)


@pytest.mark.parametrize("experts", [2, 5])
def test_case_13_a_number_of_experts_that_disagrees(shell: Shell, source: Path, experts: int) -> None:
    assert shell.run("upcycle", source, shell.place / "moe", *OPTIONS)[0] == 0
    change_json(shell.place / "moe" / CONFIG, num_local_experts=experts)
    text = shell.place / "text"
    text.write_text("some text")
    for verb in (("inspect", shell.place / "moe"), ("evaluate", "perplexity", shell.place / "moe", text)):
        shell.refuses(*verb, say=(shell.place / "moe", "gate.weight"))


@pytest.mark.filterwarnings("always")
def test_case_14_mixed_dtypes_are_widened_and_named(shell: Shell, source: Path) -> None:
    change_weights(source, lambda tensors: tensors.update({UP: tensors[UP].bfloat16()}))
    before = everything(source)
    code, err = shell.run("upcycle", source, shell.place / "moe", *OPTIONS)
    assert code == 0
    assert err.startswith("moewright: warning: ")
    assert err.count("\n") == 1
    assert "mixed dtypes bfloat16 and float32; float32 is used for all" in err
    written = load_file(shell.place / "moe" / WEIGHTS)
    assert {tensor.dtype for tensor in written.values()} == {torch.float32}
    assert everything(source) == before


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_case_15_weights_that_are_not_finite(shell: Shell, source: Path, value: float) -> None:
    change_weights(source, lambda tensors: tensors[UP].__setitem__((3, 4), value))
    shell.refuses(
        "upcycle", source, shell.place / "moe", *OPTIONS, say=(source / WEIGHTS, f"tensor {UP}", "NaN or Inf")
    )
    before = everything(source)
    assert shell.run("upcycle", source, shell.place / "moe", *OPTIONS, "--allow-nonfinite") == (0, "")
    written = load_file(shell.place / "moe" / WEIGHTS)
    wrong = [name for name, tensor in written.items() if not tensor.isfinite().all()]
    assert wrong == [f"model.layers.1.block_sparse_moe.experts.{expert}.w3.weight" for expert in range(4)]
    assert everything(source) == before


@pytest.mark.parametrize("fault", ["absent", "not JSON", "a list", "empty"])
def test_case_16_a_config_that_is_none(shell: Shell, source: Path, fault: str) -> None:
    config = source / CONFIG
    config.unlink()
    if fault != "absent":
        config.write_text({"not JSON": "{'a': 1}", "a list": "[1]", "empty": ""}[fault])
    words = {"absent": "no such file", "a list": "a JSON list"}.get(fault, "not valid JSON")
    shell.refuses_source(source, config, words)


@pytest.mark.filterwarnings("always")
def test_case_16_code_that_a_folder_names_is_not_run(shell: Shell, source: Path) -> None:
    ran = shell.place / "ran"
    (source / "evil.py").write_text(f"open({str(ran)!r}, 'w')\n")
    evil = {name: f"evil.{name}" for name in ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")}
    wishes = {"auto_map": evil, "_attn_implementation": "evil/kernel", "trust_remote_code": True}
    change_json(source / CONFIG, **wishes)
    change_json(source / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.AutoTokenizer", None]})
    text = shell.place / "text"
    text.write_text("x = 1\n" * 20)
    code, err = shell.run("upcycle", source, shell.place / "moe", *OPTIONS, "--verify-text", text)
    assert code == 0
    assert "auto_map in config.json is ignored" in err
    assert all(line.startswith("moewright: warning: ") for line in err.splitlines())
    assert not ran.exists()
    assert not (shell.place / "moe" / "evil.py").exists()
    for file in (shell.place / "moe").glob("*.json"):
        assert b"evil" not in file.read_bytes()


@pytest.mark.parametrize("kind", ["vocabulary", "added"])
@pytest.mark.parametrize("verify", [False, True])
def test_case_17_more_tokens_than_embedding_rows(shell: Shell, template: Path, kind: str, verify: bool) -> None:
    source = write_dense(shell.place / "dense", vocab_size=260)
    tokenizer = tiny_tokenizer()
    if kind == "added":
        tokenizer.add_tokens([f"<{i}>" for i in range(10)])
        tokenizer.save_pretrained(source)
    else:
        content = json.loads((source / "tokenizer.json").read_text())
        content["model"]["vocab"] |= {f"token {i}": 257 + i for i in range(10)}
        (source / "tokenizer.json").write_text(json.dumps(content))
    text = shell.place / "text"
    text.write_text("some text")
    options = ("--verify-text", text) if verify else ()
    shell.refuses("upcycle", source, shell.place / "moe", *OPTIONS, *options, say=(source, "267 tokens", "260 rows"))
    if verify:
        shell.refuses("evaluate", "perplexity", source, text, say=(source, "267 tokens", "260 rows"))


# The target


def test_case_18_a_target_that_exists(shell: Shell, source: Path) -> None:
    moe = shell.place / "moe"
    assert shell.run("upcycle", source, moe, *OPTIONS)[0] == 0
    shell.refuses("upcycle", source, moe, *OPTIONS, say=(moe, "exists and is not empty"))
    shell.refuses("upcycle", source, moe, *OPTIONS, "--dry-run", say=(moe, "exists and is not empty"))
    # With --overwrite the old model outlives a failure.
    damaged = shutil.copytree(source, shell.place / "damaged")
    change_weights(damaged, lambda tensors: tensors[UP].fill_(math.nan))
    shell.refuses("upcycle", damaged, moe, *OPTIONS, "--overwrite", say=("NaN or Inf",))
    shell.refuses("upcycle", source, source.parent, *OPTIONS, "--overwrite", say=("source",))
    old = everything(moe)
    assert shell.run("upcycle", source, moe, *OPTIONS, "--overwrite", "--seed", 1)[0] == 0
    assert everything(moe)[WEIGHTS] != old[WEIGHTS]
    ModelFolder(moe).verify_checksums()


def upcycle_small(source: Path, target: Path, *options: str) -> None:
    assert cli.main(["upcycle", str(source), str(target), *SMALL, *options]) == 0


def kill_fresh(folder: Path, arm: Callable[[], None]) -> None:
    arm()
    upcycle_small(folder.parent.parent / "dense", folder / "moe")


def kill_overwrite(folder: Path, arm: Callable[[], None]) -> None:
    shutil.copytree(folder.parent.parent / "old", folder / "moe")
    arm()
    upcycle_small(folder.parent.parent / "dense", folder / "moe", "--overwrite")


class Killed(NamedTuple):
    source: Path
    old: dict[str, bytes | str | None] | None
    """What stood at the target before; None for nothing."""
    new: dict[str, bytes | str | None]
    """What an uninterrupted run writes."""
    folders: list[Path]
    """One for each process that was killed at another step, and last one that was not."""


@pytest.fixture(scope="module", params=["fresh", "overwrite"])
def killed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Killed:
    place = tmp_path_factory.mktemp("killed")
    source = write_dense(place / "dense", num_hidden_layers=1)
    upcycle_small(source, place / "new")
    upcycle_small(source, place / "old", "--seed", "1")
    work = kill_fresh if request.param == "fresh" else kill_overwrite
    folders = kill_everywhere(work, place / "kill")
    return Killed(
        source, everything(place / "old") if request.param == "overwrite" else None, everything(place / "new"), folders
    )


def test_case_19_killed_at_any_step(killed: Killed) -> None:
    """At the target are the old state, or all of the new one; what lies beside it is no half model either."""
    assert len(killed.folders) > 30
    states = [everything(folder / "moe") if (folder / "moe").exists() else None for folder in killed.folders]
    arrived = states.index(killed.new)
    assert arrived > 25
    assert states[arrived:] == [killed.new] * (len(states) - arrived)
    # While one folder takes the place of the other there is neither, for one step.
    others = [state for state in states[:arrived] if state != killed.old]
    assert others == ([] if killed.old is None else [None])
    for beside in (path for folder in killed.folders for path in folder.iterdir() if path.name != "moe"):
        assert beside.name in (".moe.moewright-tmp", ".moe.moewright-old")
        with contextlib.suppress(ModelError):
            ModelFolder(beside)
            whole = killed.old if beside.name.endswith("old") else killed.new
            assert whole is not None
            assert {name: (beside / name).read_bytes() for name in (CONFIG, WEIGHTS)}.items() <= whole.items()


@pytest.mark.filterwarnings("ignore:.*an overwrite had been interrupted")
def test_case_20_the_same_command_again(killed: Killed, tmp_path: Path) -> None:
    for number, folder in enumerate(killed.folders):
        place = shutil.copytree(folder, tmp_path / str(number))
        options = [] if killed.old is None else ["--overwrite"]
        if killed.old is None and (place / "moe").exists():
            assert cli.main(["upcycle", str(killed.source), str(place / "moe"), *SMALL]) == 2  # it is done
        else:
            upcycle_small(killed.source, place / "moe", *options)
        assert everything(place / "moe") == killed.new
        assert [path.name for path in place.iterdir()] == ["moe"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("size", [100, 2000, 100_000])
def test_case_21_a_disk_that_is_full(shell: Shell, source: Path, size: int, overwrite: bool) -> None:
    """In the config, in the header of the weights, in the weights."""
    moe = shell.place / "moe"
    if overwrite:
        upcycle_small(source, moe)
    with largest_file(size):
        shell.refuses("upcycle", source, moe, *OPTIONS, "--overwrite", code=5, say=(moe, "File too large", "make room"))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", ["write", "fsync", "mkdir"])
def test_case_21_a_system_that_says_so(
    shell: Shell, source: Path, call: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files.HashedFile if call == "write" else os, call, full)
    shell.refuses("upcycle", source, shell.place / "moe", *OPTIONS, code=5, say=(os.strerror(code), "make room"))


def test_case_21_too_little_room_is_said_first(shell: Shell, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage(NamedTuple):
        free: int = 1000

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage())
    monkeypatch.delattr(write, "write_tensor_file")
    say = ("bytes are needed, 1000 are free", "make room")
    shell.refuses("upcycle", source, shell.place / "moe", *OPTIONS, code=5, say=say)
    shell.refuses("upcycle", source, shell.place / "moe", *OPTIONS, "--dry-run", code=5, say=say)


@pytest.mark.parametrize("option", [[], ["--overwrite"]])
def test_case_22_the_source_as_target(shell: Shell, source: Path, option: list[str]) -> None:
    (shell.place / "link").symlink_to(source)
    for target in (source, source / "inside", source.parent, shell.place / "link", source / ".." / "dense"):
        shell.refuses("upcycle", source, target, *OPTIONS, *option, say=(target,))


@pytest.fixture
def open_place(template: Path) -> Iterator[Path]:
    """A folder that any user may enter and read, with the dense model and a read-only folder in it."""
    place = Path(tempfile.mkdtemp())
    shutil.copytree(template, place / "dense")
    (place / "read-only").mkdir()
    for path in (place, *place.rglob("*")):
        path.chmod(0o555 if path.name == "read-only" else 0o755)
    yield place
    (place / "read-only").chmod(0o755)
    shutil.rmtree(place)


@pytest.mark.parametrize("target", ["read-only/moe", "read-only/new/moe", "read-only"])
def test_case_22_a_folder_that_cannot_be_written(open_place: Path, target: str) -> None:
    """In a process of its own, which gives up root's right to write everywhere once its modules are imported."""
    script = """
        import os, sys
        from moewright.cli import main
        source, place, *options = sys.argv[1:]
        assert main(["upcycle", source, place + "/dry", *options, "--dry-run"]) == 0
        if os.geteuid() == 0:
            os.seteuid(65534)
        sys.stderr.write("---")
        sys.exit(main(["upcycle", source, sys.argv[2], *options]))
    """
    before = everything(open_place)
    command = [sys.executable, "-c", textwrap.dedent(script), str(open_place / "dense"), str(open_place / target)]
    done = subprocess.run([*command, *OPTIONS], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 2
    err = done.stderr.partition("---")[2]
    assert err.startswith(f"moewright: error: {open_place / target}: cannot be written")
    assert "Permission denied" in err
    assert err.count("\n") == 1
    assert everything(open_place) == before


def test_case_23_two_at_once(shell: Shell, source: Path) -> None:
    """The first process stops in the middle of the weights; while it is there, the second may not write."""
    moe = shell.place / "moe"
    script = """
        import os, signal, sys
        from moewright.checkpoint.files import HashedFile
        from moewright.cli import main
        write, left = HashedFile.write, 10
        def stop(*arguments):
            global left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGSTOP)
            write(*arguments)
        HashedFile.write = stop
        sys.exit(main(["upcycle", *sys.argv[1:]]))
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(source), str(moe), *OPTIONS, "--json"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as first:
        try:
            assert os.WIFSTOPPED(os.waitpid(first.pid, os.WUNTRACED)[1])
            for option in ([], ["--overwrite"]):
                shell.refuses("upcycle", source, moe, *OPTIONS, *option, say=(moe, "another process is writing it"))
        finally:
            first.send_signal(signal.SIGCONT)
    assert first.returncode == 0
    ModelFolder(moe).verify_checksums()
    assert sorted(path.name for path in shell.place.iterdir()) == ["dense", "moe"]
    assert shell.run("upcycle", source, shell.place / "alone", *OPTIONS)[0] == 0
    assert everything(moe) == everything(shell.place / "alone")


@pytest.mark.parametrize("overwrite", [False, True])
def test_case_24_logits_that_differ(
    shell: Shell, source: Path, overwrite: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    moe, text = shell.place / "moe", shell.place / "text"
    text.write_text("some text, long enough\n" * 20)
    if overwrite:
        upcycle_small(source, moe)
    monkeypatch.setattr("moewright.upcycle.tensors.factors", lambda *_, **__: Factors(up=1.01))
    shell.refuses(
        "upcycle",
        source,
        moe,
        *OPTIONS,
        "--verify-text",
        text,
        "--overwrite",
        say=("logits differ", "nothing was written"),
    )
