"""Options, output, errors and exit codes; the library behind the verbs is replaced by stand-ins of its signature."""

import errno
import importlib
import inspect
import json
import os
import subprocess
import sys
import typing
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal
from unittest.mock import Mock, create_autospec

import pytest
import torch

from moewright import __version__, cli
from moewright.backbone.save import save_model
from moewright.distil.config import DistilConfig
from moewright.errors import DataError, ModelError, Preempted, UsageError
from moewright.grow.config import GrowConfig
from moewright.options.parser import Metavar, Positional, Verb, parse, sentences
from moewright.options.verbs import VERBS
from moewright.upcycle.config import UpcycleConfig
from tests.sparse import model_of

Library = Callable[..., Mock]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    """Put a stand-in in place of one of our functions: it takes what the function takes, and returns its result."""

    def put(name: str, result: Any = None, *, side_effect: Any = None) -> Mock:
        module, function = name.rsplit(".", 1)
        home = importlib.import_module(f"moewright.{module}")
        stand_in = create_autospec(getattr(home, function), return_value=result, side_effect=side_effect)
        monkeypatch.setattr(home, function, stand_in)
        return stand_in

    return put


def report_of(name: str, facts: dict[str, Any]) -> Mock:
    """What `upcycle_folder` and its like return: `facts`, as the function's own report hands them out."""
    module, function = name.rsplit(".", 1)
    kind = typing.get_type_hints(getattr(importlib.import_module(f"moewright.{module}"), function))["return"]
    report = create_autospec(kind, instance=True)
    report.as_dict.return_value = facts
    return report


def arguments(stand_in: Mock) -> dict[str, Any]:
    """The arguments of the only call, by name, but for `track`, which must take a total and give a function."""
    stand_in.assert_called_once()
    call = stand_in.call_args
    bound = dict(inspect.signature(stand_in).bind(*call.args, **call.kwargs).arguments)
    if track := bound.pop("track", None):
        track(2)(1)
    return bound


def test_inspect_prints_one_json_object(library: Library, capsys: pytest.CaptureFixture[str]) -> None:
    def talk(folder: Path, *, checksums: bool) -> dict[str, Any]:
        sys.stdout.write("a library talks\n")
        return {"folder": folder, "checksums": checksums, "loss": float("nan"), "layers": [{"experts": 2}]}

    library("backbone.inspect.inspect_folder", side_effect=talk)
    assert cli.main(["inspect", "some/folder", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"folder": "some/folder", "checksums": False, "loss": None, "layers": [{"experts": 2}]}
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
    library("backbone.inspect.inspect_folder", facts)
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


def test_upcycle_hands_every_option_to_the_library(library: Library, capsys: pytest.CaptureFixture[str]) -> None:
    name = "upcycle.apply.upcycle_folder"
    upcycle_folder = library(name, report_of(name, {"written": True}))
    long = (
        "--experts 24 --top-k 4 --granularity 4 --router-order softmax-topk --scale calibrated --layers every:2"
        " --dtype bfloat16 --format mixtral --seed 7 --calibration-text c.txt --verify-text v.txt --dry-run --overwrite"
        " --allow-nonfinite --neurons clustered --permute --noise 0.1 --redraw 0.5 --redraw-sets separate"
        " --router-start prompts --router-logit-std 0.2 --prompts p.json --shared-size 8 --shared-mode gated"
        " --shared-neurons important --siblings c d --router-std 0.5"
    )
    assert cli.main(["upcycle", "a", "b", *long.split(), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"written": True}
    config = UpcycleConfig(
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
    )
    assert arguments(upcycle_folder) == {
        "source": Path("a"),
        "target": Path("b"),
        "config": config,
        "dtype": torch.bfloat16,
        "format": "mixtral",
        "verify_text": Path("v.txt"),
        "dry_run": True,
        "overwrite": True,
        "allow_nonfinite": True,
        "hashes": None,
    }
    upcycle_folder.reset_mock()
    assert cli.main(["upcycle", "--experts", "8", "a", "b", "--top-k", "2"]) == 0
    given = arguments(upcycle_folder)
    assert given.pop("hashes") is not None, "the source is hashed while torch is imported"
    assert given == {"source": Path("a"), "target": Path("b"), "config": UpcycleConfig(experts=8, top_k=2)} | {
        **dict.fromkeys(("dtype", "format", "verify_text")),
        **dict.fromkeys(("dry_run", "overwrite", "allow_nonfinite"), False),
    }


def test_grow_hands_every_option_to_the_library(library: Library) -> None:
    name = "grow.apply.grow_folder"
    grow_folder = library(name, report_of(name, {}))
    long = (
        "--hidden-size 64 --intermediate-size 96 --layers 5 --width aki --depth stack --seed 3 --dtype float16"
        " --verify-text v.txt --dry-run --overwrite"
    )
    assert cli.main(["grow", "a", "b", *long.split()]) == 0
    assert arguments(grow_folder) == {
        "source": Path("a"),
        "target": Path("b"),
        "config": GrowConfig(hidden_size=64, intermediate_size=96, layers=5, width="aki", depth="stack", seed=3),
        "dtype": torch.float16,
        "verify_text": Path("v.txt"),
        "dry_run": True,
        "overwrite": True,
    }
    grow_folder.reset_mock()
    assert cli.main(["grow", "a", "b", "--layers", "6"]) == 0
    given = arguments(grow_folder)
    assert given["config"] == GrowConfig(layers=6)
    assert not any(given[name] for name in ("dtype", "verify_text", "dry_run", "overwrite"))


def test_export_hands_every_option_to_the_library(library: Library) -> None:
    name = "export.folder.export_folder"
    export_folder = library(name, report_of(name, {}))
    assert cli.main(["export", "a", "b", "--to", "nllb-moe", "--overwrite", "--accept-runtime-fault"]) == 0
    switches = {"overwrite": True, "accept_runtime_fault": True}
    assert arguments(export_folder) == {"source": Path("a"), "target": Path("b"), "to": "nllb-moe"} | switches


def test_distil_hands_every_option_to_the_library(library: Library) -> None:
    row = {"layer": 3} | {key: [1.0] for key in ("top_ks", "errors_before", "errors_after")}
    distil_folder = library("distil.apply.distil_folder", side_effect=lambda *_, **__: {"layers": [dict(row)]})
    long = (
        "--tolerance 0.2 --tokens 50000 --held-out-tokens 99 --top-k 3 --layers-at-once 2 --batch-size 5"
        " --sequence-length 64 --learning-rate 0.1 --router-learning-rate-ratio 0.2 --balance-loss 0.3 --z-loss 0.4"
        " --dtype bfloat16 --seed 7 --device cpu --overwrite --verify-text f.txt --text d.txt e.txt"
    )
    assert cli.main(["distil", "a", "b", "c", *long.split()]) == 0
    every = DistilConfig(
        tolerance=0.2,
        tokens=50000,
        held_out_tokens=99,
        top_k=3,
        layers_at_once=2,
        batch_size=5,
        sequence_length=64,
        learning_rate=0.1,
        router_learning_rate_ratio=0.2,
        balance_loss=0.3,
        z_loss=0.4,
        dtype="bfloat16",
        seed=7,
        device="cpu",
    )
    unchanged = {field.name for field in fields(DistilConfig) if getattr(every, field.name) == field.default}
    assert not unchanged, "each option is given here"
    folders = {"dense": Path("a"), "sparse": Path("b"), "target": Path("c")}
    texts = {"text": ("d.txt", "e.txt"), "verify_text": ("f.txt",)}
    assert arguments(distil_folder) == folders | texts | {"config": every, "overwrite": True}
    distil_folder.reset_mock()
    assert cli.main(["distil", "a", "b", "c", "--text", "d.txt", "--tolerance", "0.1"]) == 0
    texts = {"text": ("d.txt",), "verify_text": ()}
    assert arguments(distil_folder) == folders | texts | {"config": DistilConfig(tolerance=0.1), "overwrite": False}


def test_train_passes_overrides_through(library: Library, capsys: pytest.CaptureFixture[str]) -> None:
    from moewright.train.loop import TrainResult

    result = TrainResult(
        steps=3,
        tokens=6,
        losses=[2.5],
        evaluations=[],
        tokens_per_second=1.0,
        peak_memory_bytes=1,
        final=Path("runs/x/final"),
    )
    load_run, train = library("train.run_file.load_run", "the run"), library("train.loop.train", result)
    overrides = ["--train.steps", "3", "--data.files", "a b", "--out=runs/x", "--train.learning_rate", "-1"]
    assert cli.main(["train", "run.toml", *overrides, "--json"]) == 0
    load_run.assert_called_once_with(Path("run.toml"), tuple(overrides))
    assert arguments(train)["config"] == "the run"
    assert json.loads(capsys.readouterr().out)["final"] == "runs/x/final"


def test_evaluate_and_demo(library: Library, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate_files = library("evaluate.perplexity.evaluate_files", {"perplexity": 2.0, "windows": [1]})
    run_demo = library("demo.story.run_demo")
    assert cli.main(["evaluate", "perplexity", "m", "a.txt", "b.txt", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"perplexity": 2.0, "windows": [1]}
    assert arguments(evaluate_files) == {"folder": Path("m"), "files": (Path("a.txt"), Path("b.txt"))}
    assert cli.main(["demo"]) == 0
    assert arguments(run_demo)["out"].parent == Path("runs")
    run_demo.reset_mock()
    assert cli.main(["demo", "--out", "there"]) == 0
    assert arguments(run_demo)["out"] == Path("there")


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
    library("backbone.inspect.inspect_folder", side_effect=error)
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
    library("backbone.inspect.inspect_folder", side_effect=DataError("text.txt is missing"))
    if asked_by == "environment":
        monkeypatch.setenv("MOEWRIGHT_DEBUG", "1")
    assert cli.main(["inspect", "m", *(["--debug"] if asked_by == "option" else [])]) == 3
    err = capsys.readouterr().err
    assert err.startswith("Traceback (most recent call last):")
    assert err.endswith("\nmoewright: error: text.txt is missing\n")


def test_a_warning_is_one_line(library: Library, capsys: pytest.CaptureFixture[str]) -> None:
    def warn(folder: Path, *, checksums: bool) -> dict[str, Any]:
        warnings.warn("dtype is\nmixed", stacklevel=1)
        return {}

    library("backbone.inspect.inspect_folder", side_effect=warn)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert cli.main(["inspect", "m", "--json"]) == 0
    assert capsys.readouterr() == ("{}\n", "moewright: warning: dtype is mixed\n")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("upcycle a b --experts 4 --top-k 9", "--top-k 9 > --experts 4: a token cannot choose more experts than there"),
        ("grow a b", "nothing grows: give at least one of --hidden-size, --intermediate-size, --layers"),
        ("export {own} b --to nonsense", "--to 'nonsense': choose one of mixtral, "),
        ("distil a b c --text t --tolerance 2", "--tolerance 2.0: it is a share of the dense output's variance, above"),
    ],
)
def test_an_error_names_the_flags(line: str, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    if "{own}" in line:
        save_model(model_of("moewright"), tmp_path / "own")
    assert cli.main(line.format(own=tmp_path / "own").split()) == 2
    assert capsys.readouterr().err.startswith(f"moewright: error: {message}")


def test_the_library_speaks_of_flags_and_files(library: Library, capsys: pytest.CaptureFixture[str]) -> None:
    def warn(*_: Any, **__: Any) -> None:
        warnings.warn("shared_mode=gated is ignored: shared_size is 0", stacklevel=1)
        raise UsageError("scale=exact with router_order=softmax-topk: set `split`")

    upcycle_folder = library("upcycle.apply.upcycle_folder", side_effect=warn)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert cli.main("upcycle a b --experts 4 --top-k 2 --dry-run".split()) == 2
    assert capsys.readouterr().err.splitlines() == [
        "moewright: warning: --shared-mode gated is ignored: --shared-size is 0",
        "moewright: error: --scale exact with --router-order softmax-topk: set --split",
    ]
    upcycle_folder.side_effect = ModelError("config.json: top_k=9")
    assert cli.main("upcycle a b --experts 4 --top-k 2 --dry-run".split()) == 2
    assert capsys.readouterr().err == "moewright: error: config.json: top_k=9\n"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"moewright {__version__}\n"


@pytest.mark.parametrize("verb", ["", "evaluate", *(verb.name for verb in VERBS)])
def test_help_imports_nothing_heavy(verb: str) -> None:
    code = (
        "import sys\n"
        "from moewright.cli import main\n"
        "try:\n"
        f"    main({[*verb.split(), '--help']})\n"
        "except SystemExit as stop:\n"
        "    assert stop.code == 0\n"
        "heavy = {'torch', 'transformers', 'datasets', 'pydantic', 'rich', 'numpy', 'jinja2'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
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
        "import sys, moewright.backbone.inspect as home\n"
        "home.inspect_folder = lambda folder, *, checksums: {'x': 'y' * 10_000_000}\n"
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
    library("backbone.inspect.inspect_folder", side_effect=lambda *_, **__: {"offline": os.environ["HF_HUB_OFFLINE"]})
    assert cli.main(["inspect", "m"]) == 0
    assert os.environ["HF_HUB_OFFLINE"] == "1"


# The table


@dataclass(frozen=True, kw_only=True)
class Colours:
    colour: Literal["red", "blue"] = "red"
    """Colour of
    100% of it."""


@dataclass(frozen=True, kw_only=True)
class Paint:
    thing: Annotated[Path, Positional("THING")]
    """The thing."""
    coats: Annotated[int | None, Metavar("COATS")] = None
    """How many coats."""
    gloss: bool = False
    """Whether it shines."""
    names: tuple[str, ...]
    """Its names."""
    colours: Colours
    """The colours."""


PAINT = Verb("do paint", print, Paint, "put colour on a thing")


def painted(line: str) -> tuple[Verb[Any], Any]:
    verb, values = parse(line.split(), description="", verbs=[PAINT], groups={"do": ("do a thing", "deed")})
    return verb, verb.read(values)


def test_options_are_the_fields_of_a_dataclass() -> None:
    verb, options = painted("do paint x --names a b --coats 2 --gloss")
    assert verb is PAINT
    assert options == Paint(thing=Path("x"), coats=2, gloss=True, names=("a", "b"), colours=Colours())
    assert painted("do paint x --names a --colour blue")[1].colours == Colours(colour="blue")
    assert PAINT.settings() == ["coats", "gloss", "names", "colour"]
    with pytest.raises(UsageError, match=r"^argument --colour: invalid choice: 'green' \(choose from 'red', 'blue'\)"):
        painted("do paint x --names a --colour green")


def test_help_is_made_of_the_fields(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        painted("do paint --help")
    out = " ".join(capsys.readouterr().out.split())
    assert "[--coats COATS] [--gloss] --names DIR [DIR ...] [--colour {red,blue}] THING" in out
    assert "The colours: --colour {red,blue} Colour of 100% of it. (default red)" in out


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.name)
def test_every_verb_has_a_sentence_for_each_option(verb: Verb[Any]) -> None:
    below = sentences(verb.options)
    assert set(below) >= set(inspect.signature(verb.options).parameters)
    assert all(sentence[0].isupper() and " " in sentence for name, sentence in below.items() if name != "settings")
