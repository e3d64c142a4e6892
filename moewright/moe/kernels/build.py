"""Compiles native.cpp once for this machine, this torch and these sources, and loads what came out."""

import fcntl
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("native.cpp")
SOURCES = (SOURCE, SOURCE.with_name("native_elementwise.h"))
"""All that is compiled."""
# Not -ffast-math, which would change how the whole process rounds: the two are what vector loops need of it.
FLAGS = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-std=c++20", "-fopenmp", "-fPIC", "-shared")

_log = logging.getLogger("moewright")


@lru_cache
def problem() -> str | None:
    """Why there is no compiled kernel in this process; None when it is loaded. Compiles it if it is not there yet."""
    try:
        torch.ops.load_library(str(compiled()))
    except (OSError, subprocess.CalledProcessError) as error:
        text = getattr(error, "stderr", None) or str(error)
        return next((line for line in text.splitlines() if "error" in line), text.strip().splitlines()[0])
    return None


def compiled() -> Path:
    """The shared library, compiled if it is not there yet. Raises OSError and CalledProcessError."""
    folder, compiler = cache_folder(), _compiler()
    target = folder / f"native-{_identity(compiler)}.so"
    if target.exists():
        return target
    _log.warning("compiling the CPU kernel for torch %s, once: about half a minute", torch.__version__)
    folder.mkdir(parents=True, exist_ok=True)
    root = Path(torch.__file__).parent
    # Into a folder of its own, then renamed: whoever is killed half-way harms nobody. The ranks of a machine take
    # turns, and all but one find it done; the system gives the lock back, however its holder ends.
    with _alone(folder), tempfile.TemporaryDirectory(dir=folder) as scratch:
        if target.exists():
            return target
        result = Path(scratch) / target.name
        abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
        libraries = (f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10")
        command = [*compiler, *_flags(), abi, f"-I{root / 'include'}", str(SOURCE), "-o", str(result), *libraries]
        subprocess.run(command, check=True, capture_output=True, text=True)
        result.replace(target)
    return target


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until no other process of this machine is in here; on a file system without locks, do not wait."""
    with (folder / "compiling.lock").open("w") as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def cache_folder() -> Path:
    """Where compiled kernels are kept: `MOEWRIGHT_CACHE`, else below the user's cache folder."""
    if given := os.environ.get("MOEWRIGHT_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moewright"


def _flags() -> tuple[str, ...]:
    """For this processor, or for `MOEWRIGHT_MARCH`, such as x86-64-v3 to try what a lesser one would do."""
    return (*FLAGS, f"-march={os.environ.get('MOEWRIGHT_MARCH') or 'native'}")


def _compiler() -> list[str]:
    """`CXX`, which may be a command with arguments, or the first C++ compiler that there is."""
    if given := os.environ.get("CXX"):
        return shlex.split(given)
    compiler = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    if compiler is None:
        raise FileNotFoundError("there is no C++ compiler: install g++ or clang++, or set CXX to one")
    return [compiler]


def _identity(compiler: list[str]) -> str:
    """Changes with everything that the compiled code depends on."""
    version = subprocess.run([*compiler, "--version"], check=True, capture_output=True, text=True).stdout
    processor = sorted(torch.cpu.get_capabilities().items())
    sources = [source.read_text(encoding="utf-8") for source in SOURCES]
    facts = (sources, _flags(), torch.__version__, compiler, version, processor)
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
