"""Ranks as forks of one process that has imported everything: they start in a moment, and may be killed."""

import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from torch import distributed as dist

LONGEST = 240.0
"""Seconds after which ranks that still run are killed, and counted as failed."""


def run(work: Callable[[Path], None], folder: Path) -> None:
    """Call `work(folder)`, a function at the top of a test module, in a process that may call `on_forks`."""
    module = Path(work.__code__.co_filename).stem
    command = [sys.executable, "-m", "tests.forks", f"tests.{module}", work.__name__, str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-8000:]}"


def on_forks(work: Callable[[int], None], *, ranks: int) -> list[int]:
    """Call `work(rank)` in as many forks, joined by gloo if there are several; their exit codes, or minus a signal."""
    with tempfile.TemporaryDirectory() as store:
        children = [_fork(rank, work, store=f"{store}/store", ranks=ranks) for rank in range(ranks)]
        deadline = time.monotonic() + LONGEST
        codes: dict[int, int] = {}
        while len(codes) < ranks:
            for child in set(children) - codes.keys():
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    codes[child] = os.waitstatus_to_exitcode(status)
                elif time.monotonic() > deadline:
                    os.kill(child, signal.SIGKILL)
            time.sleep(0.01)
    return [codes[child] for child in children]


def together(work: Callable[[int], None], *, ranks: int) -> None:
    """As `on_forks`; fails if a rank does."""
    assert on_forks(work, ranks=ranks) == [0] * ranks


def _fork(rank: int, work: Callable[[int], None], *, store: str, ranks: int) -> int:
    if child := os.fork():
        return child
    code = 1
    try:
        if ranks > 1:
            dist.init_process_group("gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks)
        work(rank)
        if ranks > 1:
            dist.barrier()  # nobody leaves while another one still needs it
        code = 0
    except BaseException:  # noqa: BLE001  # whatever it is, this process is a rank and not the test
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    torch.set_num_threads(1)
    getattr(importlib.import_module(sys.argv[1]), sys.argv[2])(Path(sys.argv[3]))
