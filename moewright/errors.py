"""The exceptions that users meet: each is one line to print and one exit code.

Everything else that reaches ``moewright.cli`` is a bug of ours and exits with 70.
"""

from typing import ClassVar


class MoewrightError(Exception):
    """Base of all errors that name something a user can change.

    The message is one line: what was found, what is allowed, what to do next.
    """

    exit_code: ClassVar[int] = 70


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
