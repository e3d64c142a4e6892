"""docs/architecture.md is what the code does. `python -m tests.test_architecture` renews what is generated there.

Two ways through the code are followed while it runs: every file of the package in which a function is called stands in
the list, once, and after every file that imports it. So a reader who goes down the list never has to climb back.
"""

import ast
import contextlib
import io
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from experiments.page import renewed
from moewright.backbone.blocks import routing_step
from moewright.cli import main
from moewright.moe.kernels import default_kernel
from moewright.optim.adamw import make_optimizer
from moewright.train.loop import train_step
from moewright.train.start import start
from moewright.upcycle.config import UpcycleConfig
from tests.imports import PACKAGE, ROOMS, ROOT, files_imported, room, tree
from tests.models import write_dense
from tests.runs import make_run

PAGE = ROOT / "docs" / "architecture.md"
TEXT = "Two times two is four, and two plus two is four.\n" * 8


def upcycle(folder: Path) -> Callable[[], None]:
    """`moewright upcycle` with a comparison on a text, its second call: the first one imports."""
    (folder / "text.txt").write_text(TEXT)
    source = write_dense(folder / "dense")
    settings = ["--experts", "4", "--top-k", "2", "--verify-text", str(folder / "text.txt"), "--overwrite"]

    def command() -> None:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            assert main(["upcycle", str(source), str(folder / "sparse"), *settings]) == 0

    command()
    return command


def training_step(folder: Path) -> Callable[[], None]:
    """One step of a model that was upcycled."""
    config = make_run(folder, upcycle=UpcycleConfig(experts=4, top_k=2))
    started = start(config, cache_dir=folder)
    routing = routing_step(started.model)
    optimizer = make_optimizer(started.model, weight_decay=0.0, betas=(0.9, 0.95))

    def step() -> None:
        train_step(
            started.model,
            started.rows.batch(range(4)),
            objective=started.objective,
            routing=routing,
            optimizer=optimizer,
            step=1,
            settings=config.train,
        )

    step()
    return step


WAYS: dict[str, Callable[[Path], Callable[[], None]]] = {"upcycle": upcycle, "training step": training_step}


@contextlib.contextmanager
def files_called() -> Iterator[list[Path]]:
    """Collect the files of the package in which a function is called inside the block, in the order of first calls."""
    found: dict[str, None] = {}

    def see(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_name != "<module>":
            found.setdefault(frame.f_code.co_filename)

    files: list[Path] = []
    before = sys.getprofile()
    threading.setprofile(see)
    sys.setprofile(see)
    try:
        yield files
    finally:
        sys.setprofile(before)
        threading.setprofile(before)
        files += [Path(name) for name in found if Path(name).is_relative_to(PACKAGE)]


def downward(files: list[Path]) -> list[Path]:
    """The files, room by room from the last one, each after all those that import it, else in the order given."""
    left, ordered = sorted(files, key=lambda file: -ROOMS.index(room(file))), []
    imported = {file: files_imported(file) for file in files}
    while left:
        following = next(file for file in left if not any(file in imported[other] for other in left))
        left.remove(following)
        ordered.append(following)
    return ordered


def sentence(path: Path) -> str:
    """The first sentence of a file's docstring."""
    text = " ".join((ast.get_docstring(tree(path)) or "").split())
    assert text, f"{path.relative_to(ROOT)} has no docstring"
    return text.partition(". ")[0].rstrip(".")


def way(prepare: Callable[[Path], Callable[[], None]], folder: Path) -> str:
    """The files of one way, as a Markdown table."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = prepare(folder)
        with files_called() as files:
            run()
    rows = [
        f"| {number} | [`{file.relative_to(PACKAGE)}`](../{file.relative_to(ROOT)}) | {sentence(file)} |"
        for number, file in enumerate(downward(files), start=1)
    ]
    return "\n".join(["| | file | |", "|---:|---|---|", *rows])


def rooms() -> str:
    """The rooms that there are, in the order of imports, as a Markdown table."""
    lines = ["| room | |", "|---|---|"]
    for name in ROOMS:
        for path, shown in ((PACKAGE / f"{name}.py", f"{name}.py"), (PACKAGE / name / "__init__.py", f"{name}/")):
            if path.is_file():
                lines.append(f"| [`{shown}`](../moewright/{shown}) | {sentence(path)} |")
    return "\n".join(lines)


def parts(folder: Path) -> dict[str, str]:
    """What is generated of the page, by its place there."""
    found = {"rooms": rooms()}
    for name, prepare in WAYS.items():
        (folder / name).mkdir()
        found[name] = way(prepare, folder / name)
    return found


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """The ways do not depend on threads, and a small model is faster with one."""


@pytest.mark.skipif(default_kernel(torch.device("cpu")) != "native", reason="the page shows a CPU with a C++ compiler")
def test_the_page_shows_the_ways_that_the_code_takes(tmp_path: Path) -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert renewed(page, parts(tmp_path)) == page, "run python -m tests.test_architecture"


def test_a_list_that_climbs_back_is_put_in_order() -> None:
    cli, errors = PACKAGE / "cli.py", PACKAGE / "errors.py"
    assert downward([errors, cli]) == [cli, errors]


def test_calls_are_seen_in_threads_too() -> None:
    with files_called() as files:
        thread = threading.Thread(target=sentence, args=(PACKAGE / "cli.py",))
        thread.start()
        thread.join()
    assert files == []  # the tests' own files are not of the package
    with files_called() as files:
        thread = threading.Thread(target=UpcycleConfig, kwargs={"experts": 4, "top_k": 2})
        thread.start()
        thread.join()
    assert PACKAGE / "upcycle" / "config.py" in files


if __name__ == "__main__":
    import tempfile

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        PAGE.write_text(renewed(PAGE.read_text(encoding="utf-8"), parts(Path(place))), encoding="utf-8")
