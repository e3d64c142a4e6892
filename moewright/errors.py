"""The exceptions that users meet: each is one line to print and one exit code.

Everything else that reaches ``moewright.cli`` is a bug of ours and exits with 70.
"""

import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar


class MoewrightError(Exception):
    """Base of all errors that name something a user can change.

    The message is one line: what was found, what is allowed, what to do next.
    """

    exit_code: ClassVar[int] = 70
    told: bool | None = None
    """Whether another process of the run tells the user of it. None: these processes have not met over it, so that it
    may be this one's alone (`Ranks.agreeing`)."""


class UsageError(MoewrightError, ValueError):
    """A flag, a run file or a combination of settings is wrong (exit 2)."""

    exit_code = 2


class ModelError(MoewrightError, ValueError):
    """A model folder cannot be read, or cannot be written where asked (exit 2)."""

    exit_code = 2


class DataError(MoewrightError, ValueError):
    """Text is missing, empty, or not what it claims to be (exit 3)."""

    exit_code = 3


class CheckpointError(MoewrightError):
    """Training state is missing, damaged, or belongs to another run, or the training itself diverged (exit 4)."""

    exit_code = 4


class ResourceError(MoewrightError):
    """The disk or the memory cannot hold the result (exit 5)."""

    exit_code = 5


class Preempted(MoewrightError):
    """Training was asked to stop and has saved; the same command goes on (exit 75)."""

    exit_code = 75


@contextmanager
def settings_written(names: Iterable[str], *, write: Callable[[str], str]) -> Iterator[None]:
    """Say settings in errors and warnings as the user wrote them.

    Every message of ours writes a setting as `name=value`, or mentions it as `name`, with the backticks or with an
    underscore in it; any other word is an English word. Where the settings `names` came from flags or from a run file,
    `write(name)` is what stands for `name=` there: `--top-k ` or `upcycle.top_k = `. A part of a path is no setting. Of
    errors only `UsageError` speaks of settings; other errors name fields of files.
    """
    longest_first = sorted(map(re.escape, names), key=len, reverse=True)
    pattern = re.compile(rf"(?<![\w./\\-])(`?)({'|'.join(longest_first)})(?:(=)|\1(?![\w/\\-]|\.\w))")

    def written(mention: re.Match[str]) -> str:
        tick, name, equals = mention.groups()
        if equals:
            return tick + write(name)
        return write(name).rstrip(" =") if tick or "_" in name else mention[0]

    def show(message: Warning | str, *where: Any, **file: Any) -> None:
        show_before(pattern.sub(written, str(message)), *where, **file)

    show_before = warnings.showwarning
    warnings.showwarning = show
    try:
        yield
    except UsageError as error:
        error.args = (pattern.sub(written, str(error)), *error.args[1:])
        raise
    finally:
        warnings.showwarning = show_before


def listed(names: list[str]) -> str:
    """The first five names, and the number of the others: a list that fits into the line of an error."""
    more = len(names) - 5
    return ", ".join(names[:5]) + (f" and {more} more" if more > 0 else "")
