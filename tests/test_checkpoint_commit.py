"""The commit protocol with a payload that is neither a model nor a training state."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moewright.checkpoint.check import difference
from moewright.checkpoint.commit import NewFolder
from moewright.checkpoint.files import write_bytes
from moewright.errors import ModelError
from tests.kill import kill_everywhere

ROOT = Path(__file__).parents[1]


def new_folder(home: Path, **options: Any) -> NewFolder:
    work, aside = home.with_name("work"), home.with_name("aside")
    return NewFolder(home, work, aside, marker="DONE", target=home, **options)


def write(home: Path, text: bytes, **options: Any) -> None:
    with new_folder(home, **options) as new:
        for name in ("a", "b"):
            new.records[name] = write_bytes(new.path / name, text)
        new.commit({"text": text.decode()})


def text_of(home: Path) -> bytes:
    """The text of a folder; fails unless it is whole."""
    marker = json.loads((home / "DONE").read_text())
    assert marker["files"].keys() == {"a", "b"}
    assert [difference(home / name, record) for name, record in marker["files"].items()] == [None, None]
    text: bytes = marker["text"].encode()
    assert (home / "a").read_bytes() == (home / "b").read_bytes() == text
    return text


def test_several_processes_write_and_one_commits(tmp_path: Path) -> None:
    """A file whose record was handed over is not read again; one without a record is hashed at the commit."""
    script = """
import json, sys
from pathlib import Path
from moewright.checkpoint.files import write_bytes
print(json.dumps(write_bytes(Path(sys.argv[1]), b"text")))
"""
    with new_folder(tmp_path / "home") as new:
        for name in ("a", "b"):
            command = [sys.executable, "-c", script, str(new.path / name)]
            printed = subprocess.run(command, check=True, capture_output=True, cwd=ROOT).stdout
            if name == "a":
                new.records[name] = json.loads(printed)
        new.commit({"text": "text"})
    assert text_of(tmp_path / "home") == b"text"
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_a_check_that_refuses_leaves_nothing(tmp_path: Path) -> None:
    def refuse() -> None:
        raise ModelError("not here")

    with pytest.raises(ModelError, match="not here"), new_folder(tmp_path / "deep" / "home", check=refuse):
        raise AssertionError("entered")
    assert list(tmp_path.iterdir()) == []


def write_while_another_comes(home: Path) -> None:
    with new_folder(home) as new:
        home.mkdir()
        (home / "precious").write_text("dear")
        new.commit({})


def test_a_folder_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="not empty"):
        write_while_another_comes(tmp_path / "home")
    assert [path.name for path in tmp_path.rglob("*")] == ["home", "precious"]


def kill_replace(folder: Path, arm: Callable[[], None]) -> None:
    write(folder / "home", b"old")
    arm()
    write(folder / "home", b"new", replace=True)


@pytest.mark.filterwarnings("ignore:.*an overwrite had been interrupted")
def test_killed_at_any_step_the_old_or_the_new_folder_is_whole(tmp_path: Path) -> None:
    seen = []
    for folder in kill_everywhere(kill_replace, tmp_path / "kill"):
        home = folder / "home" if (folder / "home").exists() else folder / "aside"
        seen.append((home.name, text_of(home)))
        with new_folder(folder / "home") as new:  # puts things right
            assert not any(new.path.iterdir())
        assert [path.name for path in folder.iterdir()] == ["home"]
        assert text_of(folder / "home") == seen[-1][1]
    assert sorted(set(seen), key=seen.index) == [("home", b"old"), ("aside", b"old"), ("home", b"new")]
    assert seen.count(("aside", b"old")) == 1
    assert len(seen) > 12
