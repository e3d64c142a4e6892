"""The run file: TOML, dotted overrides, what is refused, and the way back to TOML."""

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moewright.data.config import DataConfig
from moewright.errors import UsageError
from moewright.moe.config import MoESettings
from moewright.train.config import RunConfig, TrainConfig, ignored_settings
from moewright.train.run_file import build, load_run, to_toml
from moewright.train.tree import defaults, flatten
from moewright.upcycle.config import UpcycleConfig

MINIMAL = """
model = "model"
out = "run"
[data]
files = ["a.txt"]
sequence_length = 8
[train]
steps = 4
batch_size = 2
"""

ISSUE = """
model = "SmolLM2-135M"            # a dense or sparse folder
out = "runs/first"
[upcycle]                         # optional: upcycle in memory at start
experts = 16
granularity = 4
top_k = 4
[data]
files = ["corpus/*.py"]
sequence_length = 512
[train]
steps = 200
batch_size = 16
micro_batch_size = 2
learning_rate = 1e-4
schedule = "cosine"
warmup_steps = 20
dtype = "bfloat16"
seed = 0
eval_every = 50
checkpoint_every = 100
"""


def load(tmp_path: Path, *overrides: str, text: str = MINIMAL) -> RunConfig:
    (tmp_path / "run.toml").write_text(text, encoding="utf-8")
    return load_run(tmp_path / "run.toml", overrides)


def test_the_documented_run_file_is_read(tmp_path: Path) -> None:
    assert load(tmp_path, text=ISSUE) == RunConfig(
        model="SmolLM2-135M",
        out="runs/first",
        upcycle=UpcycleConfig(experts=16, granularity=4, top_k=4),
        data=DataConfig(files=("corpus/*.py",), sequence_length=512),
        moe=MoESettings(),
        train=TrainConfig(
            steps=200,
            batch_size=16,
            micro_batch_size=2,
            learning_rate=1e-4,
            schedule="cosine",
            warmup_steps=20,
            dtype="bfloat16",
            seed=0,
            eval_every=50,
            checkpoint_every=100,
        ),
    )


def test_overrides_win_in_every_spelling(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        *("--out", "runs/second", "--train.steps=9", "--train.learning-rate", "3e-4", "--data.files", "b.txt"),
        *("--train.gradient_checkpointing", "true", "--data.eval_files", '["c.txt", "d.txt"]', "--model=2024"),
    )
    assert config.out == "runs/second"
    assert config.model == "2024"
    assert config.train.steps == 9
    assert config.train.learning_rate == 3e-4
    assert config.train.gradient_checkpointing is True
    assert config.data.files == ("b.txt",)
    assert config.data.eval_files == ("c.txt", "d.txt")


def test_an_optional_table_can_be_overridden_whether_or_not_the_file_has_it(tmp_path: Path) -> None:
    flags = ("--upcycle.experts", "4", "--upcycle.top_k", "2", "--upcycle.layers", "0,1")
    assert load(tmp_path, *flags).upcycle == UpcycleConfig(experts=4, top_k=2, layers="0,1")
    both = load(tmp_path, "--upcycle.experts", "8", "--upcycle.layers", "1", text=ISSUE)
    assert both.upcycle == UpcycleConfig(experts=8, granularity=4, top_k=4, layers="1")


def test_the_later_override_wins(tmp_path: Path) -> None:
    assert load(tmp_path, "--train.steps", "5", "--train.steps", "6").train.steps == 6


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--train.step", "3"], "unknown key train.step on the command line: did you mean train.steps?"),
        (["--trian.steps", "3"], "unknown key trian on the command line: did you mean train?"),
        (["--xyzzy", "3"], "unknown key xyzzy on the command line: known here: model, out"),
        (["--train.steps", "many"], "--train.steps many: a whole number is expected"),
        (["--train.steps", "1.5"], "--train.steps 1.5: a whole number is expected"),
        (["--train.steps=true"], "--train.steps true: a whole number is expected"),
        (["--train.tensorboard", "1"], "--train.tensorboard 1: true or false is expected"),
        (["--train.learning_rate", "x"], "--train.learning_rate x: a number is expected"),
        (["--train.learning_rate", "nan"], "--train.learning_rate nan: it must be a finite number, 0 or more"),
        (["--train.schedule", "linear"], "--train.schedule linear: choose one of cosine, constant, wsd"),
        (["--train", "3"], "--train 3: a table is expected"),
        (["--out.x", "3"], "--out.x: out is a value, not a table"),
        (["--train.steps"], "--train.steps has no value"),
        (["--train.steps", "--out", "x"], "--train.steps has no value"),
        (["steps", "3"], "unexpected argument 'steps'"),
        (["--upcycle.experts", "4"], "upcycle.top_k is missing"),
        (["--upcycle.experts", "4", "--upcycle.top-k", "5"], "--upcycle.top_k 5 > --upcycle.experts 4: a token"),
        (["--data.files", "[]"], "--data.files []: name at least one file or pattern"),
        (["--data.files", "[1]"], "--data.files [1]: text is expected"),
        (
            ["--train.batch_tokens", "16", "--train.batch_size", "2"],
            "--train.batch_size 2 with --train.batch_tokens 16",
        ),
        (["--train.micro_batch_size", "3"], "--train.micro_batch_size 3 does not divide the batch of 2"),
        (["--train.warmup_steps", "5"], "--train.warmup_steps 5 and train.decay_steps = 0 together > train.steps = 4"),
        (["--train.schedule", "wsd"], "--train.schedule wsd with train.decay_steps = 0: it has a decay"),
        (["--train.decay_steps", "1"], "--train.decay_steps 1 with train.schedule = cosine: only wsd has a decay"),
        (["--train.steps", "0"], "--train.steps 0: it must be at least 1"),
        (["--train.learning_rate", "0"], "--train.learning_rate 0: it must be more than 0"),
        (["--train.beta1", "1"], "--train.beta1 1.0: it must be 0 or more and less than 1"),
        (["--train.seed", "-1"], "--train.seed -1"),
        (["--moe.z_loss", "-1"], "--moe.z_loss -1.0: it must be a finite number, 0 or more"),
        (["--out", "./model"], "--out ./model is, holds or lies in the model's folder model"),
        (["--out", "model/run"], "--out model/run is, holds or lies in"),
        (["--out", "."], "--out . is, holds or lies in"),
        (["--out", ""], "--out '': name a folder"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        load(tmp_path, *overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("found", "written", "message"),
    [
        ("steps = 4", "steps = 4.5", "train.steps = 4.5: a whole number is expected"),
        ("steps = 4", 'steps = "4"', 'train.steps = "4": a whole number is expected'),
        ("steps = 4", "steps = 2000-01-01", 'train.steps = "2000-01-01": a whole number is expected'),
        ("steps = 4", "steps = 4\ntensorboard = 1", "train.tensorboard = 1: true or false is expected"),
        ("steps = 4", "steps = 4\nlearning_rate = nan", "train.learning_rate = nan: it must be a finite number"),
        ("steps = 4", "steps = 4\nschedule = 'é'", 'train.schedule = "é": choose one of cosine, constant, wsd'),
        ("steps = 4", "steps = 4\nlearning_rate = true", "train.learning_rate = true: a number is expected"),
        ('["a.txt"]', '"a.txt"', 'data.files = "a.txt": a list is expected'),
        ('["a.txt"]', '["a.txt", 3]', 'data.files = ["a.txt", 3]: text is expected'),
        ("length = 8", "length = 1", "data.sequence_length = 1: it must be at least 2"),
        ("[data]", "moe.z_loss = -1\n[data]", "moe.z_loss = -1.0: it must be a finite number, 0 or more"),
        ("[data]", "moe = 2000-01-01\n[data]", "unknown key moe.date"),
        ("[data]", "upcycle = {experts = 4, top_k = 9}\n[data]", "upcycle.top_k = 9 > upcycle.experts = 4"),
        ("[data]", "upcycle = 3\n[data]", "upcycle = 3: a table is expected"),
        ("batch_size = 2", "", "train.batch_size = None with train.batch_tokens = None: set one of the two"),
        (
            "batch_size = 2",
            "batch_tokens = 12",
            "train.batch_tokens = 12 is not a multiple of data.sequence_length =",
        ),
        ('"run"', '"model"', "out = model is, holds or lies in the model's folder"),
    ],
)
def test_what_is_wrong_in_the_file_is_named_as_it_stands_there(
    tmp_path: Path, found: str, written: str, message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        load(tmp_path, text=MINIMAL.replace(found, written))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_misspelt_key_is_not_called_missing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"unknown key train\.step in .*: did you mean train\.steps\?"):
        load(tmp_path, text=MINIMAL.replace("steps", "step"))


def test_a_flag_may_be_wrong_beside_a_file_that_is(tmp_path: Path) -> None:
    text = MINIMAL.replace("steps = 4", "steps = 4\nwarmup_steps = 5")
    with pytest.raises(UsageError, match=r"train\.warmup_steps = 5 .* together > --train\.steps 3"):
        load(tmp_path, "--train.steps", "3", text=text)


def test_unknown_keys_and_missing_ones_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"unknown key data\.file in .*run\.toml: did you mean data\.files\?"):
        load(tmp_path, text=MINIMAL.replace("files", "file"))
    with pytest.raises(UsageError, match=r"run\.toml: train is missing"):
        load(tmp_path, text=MINIMAL[: MINIMAL.index("[train]")])


def test_an_override_of_the_batch_displaces_the_files(tmp_path: Path) -> None:
    assert load(tmp_path, "--train.batch_tokens", "24").batch_rows == 3
    text = MINIMAL.replace("batch_size = 2", "batch_tokens = 24")
    assert load(tmp_path, "--train.batch_size=5", text=text).batch_rows == 5
    with pytest.raises(UsageError, match=r"train\.batch_size = 2 with train\.batch_tokens = 24: set one"):
        load(tmp_path, text=text + "batch_size = 2")


def test_what_has_no_effect_is_named(tmp_path: Path) -> None:
    assert ignored_settings(load(tmp_path, "--moe.z_loss", "0.1", "--moe.kernel", "loop"), sparse=True) == []
    assert ignored_settings(load(tmp_path), sparse=False) == []
    defaults = ("--train.schedule=constant", "--data.eval_files=b.txt", "--data.eval_fraction=0.05")
    assert ignored_settings(load(tmp_path, *defaults), sparse=False) == []
    flags = ("--moe.z_loss=0.1", "--train.min_learning_rate_ratio=0.2", "--data.eval_fraction=0.1")
    assert ignored_settings(load(tmp_path, *defaults[:2], *flags), sparse=False) == [
        "moe.z_loss = 0.1 is ignored: the model has no mixture-of-experts layers",
        "train.min_learning_rate_ratio = 0.2 is ignored: train.schedule is constant",
        "data.eval_fraction = 0.1 is ignored: data.eval_files is given",
    ]


def test_batch_tokens_are_counted_in_rows(tmp_path: Path) -> None:
    text = MINIMAL.replace("batch_size = 2", "batch_tokens = 24")
    assert load(tmp_path, text=text).batch_rows == 3
    with pytest.raises(UsageError, match=r"train\.batch_tokens = 24 is not a multiple of --data\.sequence_length 7"):
        load(tmp_path, "--data.sequence_length", "7", text=text)


@pytest.mark.parametrize(("content", "message"), [(b"a = ", "not TOML"), (b"a = '\xff'", "not UTF-8 at byte 5")])
def test_a_file_that_is_no_toml_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "run.toml").write_bytes(content)
    with pytest.raises(UsageError, match=message):
        load_run(tmp_path / "run.toml")
    with pytest.raises(UsageError, match="cannot be read"):
        load_run(tmp_path / "missing.toml")


def test_building_leaves_the_mapping_alone() -> None:
    mapping: dict[str, Any] = {"leaf": {"text": "a", "number": 1.0}}
    tree = build(Branch, mapping, source="text", flags={("leaf", "text"): "2"})
    assert tree == Branch(leaf=Leaf(text="2", number=1.0))
    assert mapping == {"leaf": {"text": "a", "number": 1.0}}


def test_a_resolved_config_reads_back_as_itself(tmp_path: Path) -> None:
    for text in (MINIMAL, ISSUE):
        config = load(tmp_path, '--data.text_field="a\\"b\\\\c\\u007f\\n é 😀"', text=text)
        assert load(tmp_path, text=to_toml(config)) == config


@dataclass(frozen=True)
class Leaf:
    text: str
    number: float
    whole: int | None = None
    names: tuple[str, ...] = ()
    flag: bool = False


@dataclass(frozen=True)
class Branch:
    leaf: Leaf
    other: Leaf | None = None


leaves = st.builds(
    Leaf,
    text=st.text(st.characters(exclude_categories=["Cs"])),
    number=st.floats(allow_nan=False, allow_infinity=False),
    whole=st.none() | st.integers(-(2**63), 2**63 - 1),
    names=st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=3).map(tuple),
    flag=st.booleans(),
)


@given(tree=st.builds(Branch, leaf=leaves, other=st.none() | leaves))
def test_any_tree_goes_to_toml_and_back(tree: Branch) -> None:
    assert build(Branch, tomllib.loads(to_toml(tree)), source="text") == tree


def test_flatten_names_every_setting(tmp_path: Path) -> None:
    flat = flatten(load(tmp_path, text=ISSUE))
    assert flat["upcycle.experts"] == 16
    assert flat["data.files"] == ["corpus/*.py"]
    assert flat["train.batch_tokens"] is None


def test_defaults_are_those_of_a_file_that_sets_nothing_else(tmp_path: Path) -> None:
    text = MINIMAL + "[upcycle]\nexperts = 4\ntop_k = 2\n[parallel]"
    required = {"model", "out", "data.files", "data.sequence_length", "train.steps", "train.batch_size"}
    known, flat = defaults(RunConfig), flatten(load(tmp_path, text=text))
    assert known.pop("upcycle") is None
    assert known.pop("parallel") is None
    assert flat.keys() - known.keys() == required - {"train.batch_size"} | {"upcycle.experts", "upcycle.top_k"}
    assert {name: value for name, value in flat.items() if name in known and name not in required} == {
        name: value for name, value in known.items() if name not in required
    }


@pytest.mark.parametrize("name", ["dtype", "param_dtype", "masters", "moments", "device", "schedule"])
def test_names_that_there_are_not_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"^{name}=float8: choose one of "):
        TrainConfig(steps=1, batch_size=1, **{name: "float8"})
