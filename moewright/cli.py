"""The command ``moewright``: it prints, turns exceptions into one line and an exit code, and exits.

The verbs and their options are the table in ``options/verbs.py``.
"""

import contextlib
import errno
import json
import math
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from moewright.errors import MoewrightError, ResourceError, settings_written
from moewright.options.parser import Facts, as_flag
from moewright.options.verbs import parse

INTERNAL_ERROR = 70
INTERRUPTED = 130
WIDTH_OF_A_FILE = 160  # when standard output is not a terminal: wide enough that no row wraps

# Nothing is fetched from a hub by any verb, and the bars and notes of the libraries below us would mix with ours.
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code: 0, or one of ``moewright.errors``, 70 (a bug of ours), 130 (Ctrl-C)."""
    argv = sys.argv[1:] if argv is None else argv
    debug = "--debug" in argv or os.environ.get("MOEWRIGHT_DEBUG") == "1"
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        with _one_line_warnings():
            verb, values = parse(argv)
            as_json = getattr(values, "json", False)
            # With --json, standard output is for the object alone, whatever a library prints.
            quiet = contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()
            with quiet, settings_written(verb.settings(), write=lambda name: f"{as_flag(name)} "):
                facts = verb.run(verb.read(values))
            _show(facts, as_json=as_json)
        return 0 if facts is None else verb.exit_code(facts)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED, debug=debug)
    except BrokenPipeError:
        # The reader (head, less) has gone: nobody is left to tell, and Python must not try again while it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MoewrightError as error:
        # Of several ranks one speaks; before they have met, the first of each machine, whose files it may be about.
        silent = _number("LOCAL_RANK") > 0 if error.told is None else error.told
        return error.exit_code if silent else _fail(str(error), error.exit_code, debug=debug)
    except Exception as error:  # the outermost frame: any other error ends as one line, too
        if lacking := _lacking(error):
            return _fail(f"out of {lacking}: {error}", ResourceError.exit_code, debug=debug)
        hint = "" if debug else "; run it again with --debug for the traceback"
        message = f"internal error (a bug of ours) {type(error).__name__}: {error}{hint}"
        return _fail(message, INTERNAL_ERROR, debug=debug)


def leave(code: int) -> NoReturn:
    """End the process with this code.

    A rank ends without the interpreter's own farewell. gloo's threads are still there after `destroy_process_group`
    (seen with torch 2.13: caches of DTensor keep the groups), and while the interpreter is taken down, such a process
    now and then ends with SIGABRT in place of its code.
    """
    if _number("WORLD_SIZE") > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _number(name: str) -> int:
    """A number that torchrun tells its ranks; 0 for a process that it has not started."""
    return int(os.environ.get(name, "0"))


def _show(facts: Facts | None, *, as_json: bool) -> None:
    if facts is None or _number("RANK") > 0:
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
def _one_line_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: None if _number("RANK") else _say("warning", str(message))
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
