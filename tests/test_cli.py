"""Options, output, errors and exit codes; the library behind the verbs is replaced, so nothing heavy is imported."""

import dataclasses
import errno
import json
import os
import subprocess
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moewright import __version__, cli
from moewright.errors import DataError, Preempted
from moewright.grow.config import GrowConfig
from moewright.upcycle.config import UpcycleConfig

Library = Callable[..., types.ModuleType]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    """Put a module in place of one of ours: ``library("train.loop", train=function)``."""

    def put(module: str, **names: Any) -> types.ModuleType:
        stand_in = types.ModuleType(f"moewright.{module}")
        vars(stand_in).update(names)
        monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
        return stand_in

    return put


@dataclasses.dataclass(frozen=True)
class Result:
    steps: int
    out: Path

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def test_inspect_prints_one_json_object(library: Library, capsys: pytest.CaptureFixture[str]) -> None:
    def inspect_folder(folder: Path, *, checksums: bool) -> dict[str, Any]:
        sys.stdout.write("a library talks\n")
        return {"folder": folder, "loss": float("nan"), "layers": [{"experts": 2}]}

    library("backbone.inspect", inspect_folder=inspect_folder)
    assert cli.main(["inspect", "some/folder", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"folder": "some/folder", "loss": None, "layers": [{"experts": 2}]}
    assert out.count("\n") == 1
    assert err == "a library talks\n"


def test_inspect_prints_lines_and_tables(library: Library, capsys: pytest.CaptureFixture[str]) -> None:
    facts = {
        "architecture": "[llama]",
        "parameters": {"total": 134515008, "share": 0.12345678},
        "layers": [{"layer": 0, "sparse": True}, {"layer": 1, "sparse": False}],
        "note": None,
        "problems": [],
    }
    library("backbone.inspect", inspect_folder=lambda folder, checksums: facts)
    assert cli.main(["inspect", "folder"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert max(map(len, shown)) < 60, "no line is filled up to the width of the terminal"
    assert [line.strip() for line in shown if line.strip("─ ")] == [
        "architecture  [llama]",
        "parameters:",
        "total  134,515,008",
        "share  0.1235",
        "layers:",
        "layer   sparse",
        "0   yes",
        "1   no",
        "note      -",
        "problems  none",
    ]


def test_upcycle_hands_every_option_to_the_library(library: Library) -> None:
    import torch

    calls: list[tuple[Any, ...]] = []

    def upcycle_folder(source: Path, target: Path, config: UpcycleConfig, **options: Any) -> Result:
        assert callable(options.pop("track"))
        assert (options.pop("hashes") is None) == options["dry_run"]
        calls.append((source, target, config, options))
        return Result(steps=0, out=target)

    library("upcycle.apply", upcycle_folder=upcycle_folder)
    long = (
        "--experts 24 --top-k 4 --granularity 4 --router-order softmax-topk --scale calibrated --layers every:2"
        " --dtype bfloat16 --format mixtral --seed 7 --calibration-text c.txt --verify-text v.txt --dry-run --overwrite"
        " --allow-nonfinite --neurons clustered --permute --noise 0.1 --redraw 0.5 --redraw-sets separate"
        " --router-start prompts --router-logit-std 0.2 --prompts p.json --shared-size 8 --shared-mode gated"
        " --shared-neurons important --siblings c d --router-std 0.5"
    )
    assert cli.main(["upcycle", "a", "b", *long.split()]) == 0
    assert cli.main(["upcycle", "--experts", "8", "a", "b", "--top-k", "2"]) == 0
    options = {"dtype": None, "format": None, "verify_text": None}
    options |= dict.fromkeys(("dry_run", "overwrite", "allow_nonfinite"), False)
    assert calls == [
        (
            Path("a"),
            Path("b"),
            UpcycleConfig(
                experts=24,
                top_k=4,
                granularity=4,
                router_order="softmax-topk",
                scale="calibrated",
                layers="every:2",
                seed=7,
                calibration_text="c.txt",
                neurons="clustered",
                permute=True,
                noise=0.1,
                redraw=0.5,
                redraw_sets="separate",
                router_start="prompts",
                router_std=0.5,
                router_logit_std=0.2,
                prompts="p.json",
                shared_size=8,
                shared_mode="gated",
                shared_neurons="important",
                siblings=("c", "d"),
            ),
            {
                "dtype": torch.bfloat16,
                "format": "mixtral",
                "verify_text": Path("v.txt"),
                "dry_run": True,
                "overwrite": True,
                "allow_nonfinite": True,
            },
        ),
        (Path("a"), Path("b"), UpcycleConfig(experts=8, top_k=2), options),
    ]


def test_grow_hands_every_option_to_the_library(library: Library) -> None:
    import torch

    calls: list[tuple[Any, ...]] = []

    def grow_folder(source: Path, target: Path, config: GrowConfig, **options: Any) -> Result:
        assert callable(options.pop("track"))
        calls.append((source, target, config, options))
        return Result(steps=0, out=target)

    library("upcycle.grow", grow_folder=grow_folder)
    long = (
        "--hidden-size 64 --intermediate-size 96 --layers 5 --width aki --depth stack --seed 3 --dtype float16"
        " --verify-text v.txt --dry-run --overwrite"
    )
    assert cli.main(["grow", "a", "b", *long.split()]) == 0
    assert cli.main(["grow", "a", "b", "--layers", "6"]) == 0
    options = {"dtype": None, "verify_text": None, "dry_run": False, "overwrite": False}
    config = GrowConfig(hidden_size=64, intermediate_size=96, layers=5, width="aki", depth="stack", seed=3)
    chosen = {"dtype": torch.float16, "verify_text": Path("v.txt"), "dry_run": True, "overwrite": True}
    assert calls == [
        (Path("a"), Path("b"), config, chosen),
        (Path("a"), Path("b"), GrowConfig(layers=6), options),
    ]


def test_train_passes_overrides_through(library: Library, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[Any] = []
    library("train.run_file", load_run=lambda path, overrides: (path, overrides))
    loop = library("train.loop", train=lambda run, console: seen.append(run) or Result(steps=3, out=Path("runs/x")))
    library("train", loop=loop)
    overrides = ["--train.steps", "3", "--data.files", "a b", "--out=runs/x", "--train.learning_rate", "-1"]
    assert cli.main(["train", "run.toml", *overrides, "--json"]) == 0
    assert seen == [(Path("run.toml"), overrides)]
    assert json.loads(capsys.readouterr().out) == {"steps": 3, "out": "runs/x"}


def test_evaluate_and_demo(library: Library, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[Any] = []
    library("evaluate.perplexity", evaluate_files=lambda folder, files, track: {"folder": folder, "files": files})
    library("demo.story", run_demo=lambda out, console: seen.append(out))
    assert cli.main(["evaluate", "perplexity", "m", "a.txt", "b.txt", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"folder": "m", "files": ["a.txt", "b.txt"]}
    assert cli.main(["demo"]) == 0
    assert cli.main(["demo", "--out", "there"]) == 0
    assert seen == [Path("runs/demo"), Path("there")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "the following arguments are required: VERB; see `moewright --help`"),
        ("upcicle", "argument VERB: invalid choice: 'upcicle'"),
        (
            "upcycle a b --experts two --top-k 1",
            "argument --experts: invalid int value: 'two'; see `moewright upcycle --",
        ),
        ("upcycle a b --experts 2", "the following arguments are required: --top-k"),
        ("upcycle a b --experts 2 --top-k 1 --scale exakt", "argument --scale: invalid choice: 'exakt' (choose from"),
        ("upcycle a b --experts 2 --top-k 1 --overwrit", "unknown argument '--overwrit' (did you mean --overwrite?)"),
        ("upcycle a b c --experts 2 --top-k 1", "unknown argument 'c'; see"),
        (
            "upcycle a b --expert 2 --top-k 1",
            "unknown argument '--expert' (did you mean --experts?); see `moewright up",
        ),
        ("upcycle a b --top_k=2 --experts=4", "unknown argument '--top_k=2' (did you mean --top-k?)"),
        ("evaluate perplexity --jsn", "unknown argument '--jsn' (did you mean --json?)"),
        ("train --train.steps=3", "the following arguments are required: RUN.toml"),
        ("inspect", "the following arguments are required: DIR"),
        ("evaluate perplexity m", "the following arguments are required: TEXT"),
        ("evaluate speed m", "argument MEASURE: invalid choice: 'speed'"),
    ],
)
def test_a_bad_option_is_one_line(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(line.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith(f"moewright: error: {message}")


@pytest.mark.parametrize(
    ("error", "exit_code", "message"),
    [
        (DataError("text.txt is missing"), 3, "text.txt is missing"),
        (DataError("two\nlines"), 3, "two lines"),
        (Preempted("stopped and saved"), 75, "stopped and saved"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError("no room"), 5, "out of memory: no room"),
        (
            RuntimeError("[enforce] DefaultCPUAllocator: not enough memory: you tried to allocate 4 bytes"),
            5,
            "out of mem",
        ),
        (RuntimeError("std::bad_alloc"), 5, "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"), 5, "out of memory"),
        (OSError(errno.ENOSPC, "No space left on device"), 5, "out of disk space: [Errno 28] No space left"),
        (
            OSError(errno.EIO, "bad disk"),
            70,
            "internal error (a bug of ours) OSError: [Errno 5] bad disk; run it again",
        ),
        (ZeroDivisionError("x"), 70, "internal error (a bug of ours) ZeroDivisionError: x; run it again with --debug"),
    ],
)
def test_an_error_is_one_line_and_its_exit_code(
    error: BaseException,
    exit_code: int,
    message: str,
    library: Library,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def inspect_folder(folder: Path, *, checksums: bool) -> dict[str, Any]:
        raise error

    library("backbone.inspect", inspect_folder=inspect_folder)
    assert cli.main(["inspect", "m"]) == exit_code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith(f"moewright: error: {message}")


@pytest.mark.parametrize("asked_by", ["option", "environment"])
def test_debug_shows_the_traceback(
    asked_by: str,
    library: Library,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def inspect_folder(folder: Path, *, checksums: bool) -> dict[str, Any]:
        raise DataError("text.txt is missing")

    library("backbone.inspect", inspect_folder=inspect_folder)
    if asked_by == "environment":
        monkeypatch.setenv("MOEWRIGHT_DEBUG", "1")
    assert cli.main(["inspect", "m", *(["--debug"] if asked_by == "option" else [])]) == 3
    err = capsys.readouterr().err
    assert err.startswith("Traceback (most recent call last):")
    assert err.endswith("\nmoewright: error: text.txt is missing\n")


def test_a_warning_is_one_line(library: Library, capsys: pytest.CaptureFixture[str]) -> None:
    def inspect_folder(folder: Path, *, checksums: bool) -> dict[str, Any]:
        warnings.warn("dtype is\nmixed", stacklevel=1)
        return {}

    library("backbone.inspect", inspect_folder=inspect_folder)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert cli.main(["inspect", "m", "--json"]) == 0
    assert capsys.readouterr() == ("{}\n", "moewright: warning: dtype is mixed\n")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"moewright {__version__}\n"


@pytest.mark.parametrize("verb", ["", "inspect", "upcycle", "grow", "train", "evaluate", "evaluate perplexity", "demo"])
def test_help_imports_nothing_heavy(verb: str) -> None:
    code = (
        "import sys\n"
        "from moewright.cli import main\n"
        "try:\n"
        f"    main({[*verb.split(), '--help']})\n"
        "except SystemExit as stop:\n"
        "    assert stop.code == 0\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'tyro', 'rich', 'numpy'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"usage: moewright {verb}".rstrip())
    assert done.stdout.endswith("\n[]\n")


def test_help_of_train_names_keys_and_where_all_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["train", "--help"])
    out = capsys.readouterr().out
    assert all(name in out for name in ("docs/training.md", "sequence_length", "[train]", "--train.steps 100"))


def test_a_reader_that_leaves_early_is_no_error() -> None:
    code = (
        "import sys, types\n"
        "stand_in = types.ModuleType('x')\n"
        "stand_in.inspect_folder = lambda folder, checksums: {'x': 'y' * 10_000_000}\n"
        "sys.modules['moewright.backbone.inspect'] = stand_in\n"
        "from moewright.cli import main\n"
        "sys.exit(main(['inspect', 'm', '--json']))\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_nothing_is_fetched_from_a_hub(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    library("backbone.inspect", inspect_folder=lambda folder, checksums: {"offline": os.environ["HF_HUB_OFFLINE"]})
    assert cli.main(["inspect", "m"]) == 0
    assert os.environ["HF_HUB_OFFLINE"] == "1"
