"""A verb of the command line in a process of its own, so that its memory can be measured."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from moewright.errors import MoewrightError

KEEP: Final = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_TOP_PAD_": str(1 << 28)}
"""Have glibc keep freed memory: by default it gives large blocks back to the system, and faults them in again."""


@dataclass(frozen=True)
class Outcome:
    """The result of a process, and its cost."""

    facts: dict[str, Any]
    """The JSON object it printed."""
    seconds: float
    peak_memory_bytes: int
    """Its largest resident set."""


def run_verb(*arguments: str) -> Outcome:
    """Run `moewright ARGUMENTS --json`; its progress and messages go to our standard error."""
    return run_python(["-m", "moewright", *arguments, "--json"], what=f"moewright {arguments[0]}")


def run_python(arguments: Sequence[str], *, what: str) -> Outcome:
    """Run this Python with `arguments`, and read the JSON object that it prints.

    Raises `MoewrightError` if it fails; its own message has then been shown.
    """
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, text=True, env=os.environ | KEEP)
    assert process.stdout is not None
    try:
        output = process.stdout.read()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    process.stdout.close()
    if process.returncode:
        raise MoewrightError(f"{what} ended with code {process.returncode}; its message is above")
    unit = 1 if sys.platform == "darwin" else 1024
    return Outcome(json.loads(output), time.perf_counter() - start, usage.ru_maxrss * unit)
