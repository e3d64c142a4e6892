"""The README's commands run, in their order, with tiny stand-ins for what they name.

A command may name the folder ``SmolLM2-135M`` (a tiny llama here), the files ``corpus/*.py`` and ``held-out.txt``,
whatever an earlier command wrote, and ``run.toml``, which is the README's toml block. ``make`` lines are left out, and
so is ``moewright demo``: it has its own, slow, test.
"""

import json
import os
import re
import shlex
import subprocess
import sysconfig
from pathlib import Path

import pytest

from moewright.options.verbs import VERBS
from tests.models import write_dense

README = Path(__file__).parents[1] / "README.md"
SCRIPTS = Path(sysconfig.get_path("scripts"))

# The sizes of the README's run are hours on a CPU; the tiny model also has no more than 128 positions.
SMALL = {
    "train": "--data.sequence_length 64 --train.steps 2 --train.batch_size 2 --train.micro_batch_size 1"
    " --train.warmup_steps 1 --train.eval_every 1 --train.checkpoint_every 1",
    "plan": "--data.sequence_length 64",
    "distil": "--sequence-length 64 --batch-size 1 --held-out-tokens 256",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands() -> list[list[str]]:
    """The words of each command that runs moewright; a line of a kind that this test does not know fails it."""
    lines = [line for block in blocks("sh") for line in block.replace("\\\n", " ").splitlines()]
    written = [words for line in lines if (words := shlex.split(line, comments=True))]
    kinds = {Path(words[0]).name for words in written}
    assert kinds <= {"make", "moewright", "torchrun", "git", "cd"}, f"README has commands that no test runs: {kinds}"
    tools = ("moewright", "torchrun")
    return [words for words in written if Path(words[0]).name in tools and words[1] != "demo"]


def test_the_readme_shows_every_verb() -> None:
    shown = [" ".join(words) for words in commands()]
    missing = [verb.name for verb in VERBS if not any(line.startswith(f"moewright {verb.name} ") for line in shown)]
    assert missing == ["demo"], "it has its own, slow, test"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3}  # as many as SmolLM2 has
    write_dense(tmp_path / "SmolLM2-135M", tie_word_embeddings=True, hidden_size=72, intermediate_size=96, **heads)
    (tmp_path / "corpus").mkdir()
    for index in range(12):
        lines = [f"def f{line}(x):\n    return x + {index * line}\n" for line in range(40)]
        (tmp_path / "corpus" / f"module{index}.py").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "held-out.txt").write_text("def g(x):\n    return x\n" * 40, encoding="utf-8")
    [run] = blocks("toml")
    (tmp_path / "run.toml").write_text(run, encoding="utf-8")
    return tmp_path


def test_the_readme_commands_run(place: Path) -> None:
    for words in commands():
        tool, *arguments = [name for word in words for name in expand(word, place)]
        arguments += next((options for verb, options in SMALL.items() if verb in words), "").split()
        done = subprocess.run(
            [SCRIPTS / tool, *arguments],
            cwd=place,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{tool} {shlex.join(arguments)}\n{done.stdout}{done.stderr}"
        if "--json" in words:
            json.loads(done.stdout)
        else:
            assert done.stdout.strip(), f"{tool} {shlex.join(arguments)} printed nothing"


def expand(word: str, folder: Path) -> list[str]:
    """What a shell makes of a word with a star."""
    if "*" not in word:
        return [word]
    names = sorted(str(path.relative_to(folder)) for path in folder.glob(word))
    assert names, f"README: {word} matches nothing"
    return names
