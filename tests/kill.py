"""Kill a piece of work before each of its steps on the disk, one process a step."""

import importlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moewright.checkpoint import files

STEPS = ("fsync", "mkdir", "rename", "rmdir", "unlink")
MOST = 300


def kill_everywhere(work: Callable[[Path, Callable[[], None]], None], root: Path) -> list[Path]:
    """Run ``work(folder, arm)``, a function of a test module, in fresh folders below ``root``; returns these folders.

    From its call of ``arm()`` on, the n-th process is killed (SIGKILL) just before its n-th step: an fsync, mkdir,
    rename, rmdir, unlink, or write to a hashed file. The last one met no more steps and has finished.
    """
    root.mkdir()
    module = Path(work.__code__.co_filename).stem
    command = [sys.executable, "-m", "tests.kill", f"tests.{module}", work.__name__, str(root)]
    here = Path(__file__).parent.parent
    subprocess.run(command, check=True, cwd=here, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=250)
    return sorted(root.iterdir())


def _arm(point: int) -> None:
    left = point

    def armed(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return wrapper

    for name in STEPS:
        setattr(os, name, armed(getattr(os, name)))
    files.HashedFile.write = armed(files.HashedFile.write)


def _main(module: str, name: str, root: Path) -> None:
    work = getattr(importlib.import_module(module), name)
    rehearsal = root / "rehearsal"  # what is imported at first use is imported once, and not in each child
    rehearsal.mkdir()
    work(rehearsal, lambda: None)
    shutil.rmtree(rehearsal)
    for point in range(1, MOST):
        folder = root / f"{point:03}"
        folder.mkdir()
        process = os.fork()
        if process == 0:
            status = 1
            try:
                work(folder, lambda point=point: _arm(point))
                status = 0
            finally:
                os._exit(status)
        _, status = os.waitpid(process, 0)
        if os.WIFEXITED(status):
            sys.exit(os.WEXITSTATUS(status))
        assert os.WTERMSIG(status) == signal.SIGKILL
    sys.exit(f"still not finished after {MOST} steps")


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
