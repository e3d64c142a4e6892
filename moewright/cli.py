"""The command ``moewright``: one function a verb, and no logic.

Each verb turns its options into one library call and returns what is to be shown; ``main`` shows it and turns
exceptions into one line on standard error and an exit code. Libraries are imported by the verbs that need them, so
that ``moewright --help`` is quick. What options a verb has stands in ``options.py``.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import errno
import gc
import itertools
import json
import math
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from moewright.checkpoint.ahead import hash_ahead
from moewright.distil.config import DistilConfig
from moewright.errors import MoewrightError, ResourceError
from moewright.grow.config import GrowConfig
from moewright.options import parse
from moewright.upcycle.config import UpcycleConfig

INTERNAL_ERROR = 70
INTERRUPTED = 130
M_MMAP_THRESHOLD = -3  # of malloc.h
WIDTH_OF_A_FILE = 160  # when standard output is not a terminal: wide enough that no row wraps

# Nothing is fetched from a hub by any verb, and the bars and notes of the libraries below us would mix with ours.
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}

Facts = Mapping[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code: 0, or one of ``moewright.errors``, 70 (a bug of ours), 130 (Ctrl-C)."""
    argv = sys.argv[1:] if argv is None else argv
    debug = "--debug" in argv or os.environ.get("MOEWRIGHT_DEBUG") == "1"
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        with _one_line_warnings():
            args = parse(argv)
            # With --json, standard output is for the object alone, whatever a library prints.
            with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():
                facts = VERBS[args.verb](args)
            _show(facts, as_json=args.json)
        return 0
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED, debug=debug)
    except BrokenPipeError:
        # The reader (head, less) has gone: nobody is left to tell, and Python must not try again while it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MoewrightError as error:
        return _fail(str(error), error.exit_code, debug=debug)
    except Exception as error:  # the outermost frame: what is not ours to explain still ends as one line
        if lacking := _lacking(error):
            return _fail(f"out of {lacking}: {error}", ResourceError.exit_code, debug=debug)
        what = f"{type(error).__name__}: {error}"
        hint = "" if debug else "; run it again with --debug for the traceback"
        return _fail(f"internal error (a bug of ours) {what}{hint}", INTERNAL_ERROR, debug=debug)


def inspect(args: argparse.Namespace) -> Facts:
    with _importing():
        from moewright.backbone.inspect import inspect_folder

    return inspect_folder(args.folder, checksums=args.checksums)


def upcycle(args: argparse.Namespace) -> Facts:
    hashes = None if args.dry_run else hash_ahead(args.source)  # on another core, while this one imports
    with _importing():
        import torch

        from moewright.report.progress import progress_bar
        from moewright.upcycle.apply import upcycle_folder

    _return_large_blocks()
    settings = {field.name: getattr(args, field.name) for field in dataclasses.fields(UpcycleConfig)}
    config = UpcycleConfig(**settings | {"siblings": tuple(args.siblings)})
    with progress_bar("writing") as track:
        report = upcycle_folder(
            args.source,
            args.target,
            config,
            dtype=None if args.dtype is None else getattr(torch, args.dtype),
            format=args.format,
            verify_text=args.verify_text,
            dry_run=args.dry_run,
            overwrite=args.overwrite,
            allow_nonfinite=args.allow_nonfinite,
            hashes=hashes,
            track=track,
        )
    return report.as_dict()


def export(args: argparse.Namespace) -> Facts:
    with _importing():
        from moewright.export.folder import export_folder

    report = export_folder(
        args.source,
        args.target,
        to=args.to,
        overwrite=args.overwrite,
        accept_runtime_fault=args.accept_runtime_fault,
    )
    return report.as_dict()


def grow(args: argparse.Namespace) -> Facts:
    with _importing():
        import torch

        from moewright.grow.apply import grow_folder
        from moewright.report.progress import progress_bar

    _return_large_blocks()
    config = GrowConfig(**{field.name: getattr(args, field.name) for field in dataclasses.fields(GrowConfig)})
    with progress_bar("writing") as track:
        report = grow_folder(
            args.source,
            args.target,
            config,
            dtype=None if args.dtype is None else getattr(torch, args.dtype),
            verify_text=args.verify_text,
            dry_run=args.dry_run,
            overwrite=args.overwrite,
            track=track,
        )
    return report.as_dict()


def train(args: argparse.Namespace) -> Facts:
    with _importing():
        from rich.console import Console

        from moewright.train import loop
        from moewright.train.run_file import load_run

    result = loop.train(load_run(args.run, args.overrides), console=Console(stderr=True))
    facts = dataclasses.asdict(result)
    if not args.json:
        facts.pop("losses", None)  # metrics.jsonl has them
    return facts


def distil(args: argparse.Namespace) -> Facts:
    with _importing():
        from moewright.distil.apply import distil_folder
        from moewright.report.progress import progress_bar

    config = DistilConfig(**{field.name: getattr(args, field.name) for field in dataclasses.fields(DistilConfig)})
    texts = {"text": args.text, "verify_text": args.verify_text}
    with progress_bar("distilling") as track:
        facts = distil_folder(
            args.dense, args.sparse, args.target, config, overwrite=args.overwrite, track=track, **texts
        )
    if not args.json:
        for row in facts["layers"]:
            del row["top_ks"], row["errors_before"], row["errors_after"]  # moewright.json has them
    return facts


def evaluate_perplexity(args: argparse.Namespace) -> Facts:
    with _importing():
        from moewright.evaluate.perplexity import evaluate_files
        from moewright.report.progress import progress_bar

    with progress_bar("scoring") as track:
        facts = evaluate_files(args.folder, args.texts, track=track)
    if not args.json:
        facts.pop("windows", None)
    return facts


def demo(args: argparse.Namespace) -> None:
    with _importing():
        from rich.console import Console

        from moewright.demo.story import run_demo

    names = itertools.chain(["demo"], (f"demo-{number}" for number in itertools.count(2)))
    out = args.out or next(path for path in (Path("runs") / name for name in names) if not path.exists())
    run_demo(out, Console())


VERBS: Final[Mapping[str, Callable[[argparse.Namespace], Facts | None]]] = {
    "inspect": inspect,
    "upcycle": upcycle,
    "grow": grow,
    "train": train,
    "export": export,
    "distil": distil,
    "perplexity": evaluate_perplexity,
    "demo": demo,
}


def _show(facts: Facts | None, *, as_json: bool) -> None:
    if facts is None:
        return
    if as_json:
        print(json.dumps(_json_ready(facts), allow_nan=False))
    else:
        from rich.console import Console

        from moewright.report.terminal import layout

        width = None if sys.stdout.isatty() else WIDTH_OF_A_FILE
        Console(width=width, highlight=False).print(layout(facts))
    sys.stdout.flush()


def _json_ready(value: Any) -> Any:
    """Paths become strings; a number that is not finite becomes null, since JSON has no way to write it."""
    if isinstance(value, Mapping):
        return {str(key): _json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_ready(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


@contextlib.contextmanager
def _importing() -> Iterator[None]:
    """Look for no garbage meanwhile, nor later in what has come: it took a fifth of an upcycling; libraries stay."""
    new, enabled = "torch" not in sys.modules, gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
        if new:  # in a process that calls `main` again and again, what is garbage by then would stay too
            gc.freeze()


def _return_large_blocks() -> None:
    """Let the C library give large blocks back at once, for a verb whose memory is a few large tensors of many sizes.

    Its heap would keep the holes between them: twice the memory, for an upcycling with granularity 4.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(M_MMAP_THRESHOLD, 2**20)


@contextlib.contextmanager
def _one_line_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: _say("warning", str(message))
        yield


def _fail(message: str, exit_code: int, *, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    _say("error", message)
    return exit_code


def _say(kind: str, message: str) -> None:
    print(f"moewright: {kind}: {' '.join(message.split())}", file=sys.stderr)


def _lacking(error: Exception) -> str | None:
    """``memory`` or ``disk space`` if that is what the error reports; torch says it only in its messages."""
    if isinstance(error, MemoryError):
        return "memory"
    if isinstance(error, RuntimeError) and re.search(
        r"(not enough|out of|can't allocate) memory|bad_alloc", str(error)
    ):
        return "memory"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "disk space"
    return None
