"""A run's folder: known by a file of ours, used by one process at a time, and never anyone else's."""

import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from moewright.checkpoint.disk import remove, writing
from moewright.checkpoint.files import json_bytes, replace_text
from moewright.checkpoint.lock import lock_folder
from moewright.checkpoint.untrusted import read_json
from moewright.errors import CheckpointError, ModelError, UsageError
from moewright.train.config import RunConfig
from moewright.train.run_file import to_toml

CONFIG: Final = "config.toml"
CHECKPOINTS: Final = "checkpoints"
FINAL: Final = "final"
METRICS: Final = "metrics.jsonl"
EVALUATIONS: Final = "evaluations.jsonl"
RUN: Final = "moewright-run.json"
"""The file that marks the folder of a run: the run's identity, and the digests of its text files."""
CACHE: Final = ".moewright-cache"


@contextmanager
def open_run(folder: Path) -> Iterator[None]:
    """Hold the run's folder, made if need be, against other processes.

    Folders that were made here and hold nothing at the end go away: a run that cannot start leaves no trace.

    Raises UsageError: it is a file, holds something else than a run, is in use, or cannot be made.
    """
    with writing(folder, UsageError):
        _require_run_folder(folder)
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        descriptor = _lock(folder)
    try:
        yield
    finally:
        with suppress(OSError):  # not empty
            for path in made:
                path.rmdir()
        os.close(descriptor)


@contextmanager
def cache_in(folder: Path) -> Iterator[None]:
    """A place for temporary files in a run's folder that `open_run` holds; it goes away at the end."""
    cache = folder / CACHE
    with writing(folder, UsageError):
        remove(cache)  # of a run that was killed
        cache.mkdir()
    try:
        yield
    finally:
        shutil.rmtree(cache, ignore_errors=True)  # no reason to fail; the next start removes what is left


def cache_of(folder: Path, rank: int) -> Path:
    """An empty folder for one rank's temporary files, where `cache_in` holds the place for them."""
    cache = folder / CACHE / f"rank-{rank}"
    with writing(folder, UsageError):
        cache.mkdir()
    return cache


def record_run(folder: Path, *, config: RunConfig, identity: Mapping[str, Any], sources: Mapping[str, str]) -> None:
    """Make the folder this run's, and write down its resolved settings."""
    record = {"schema": 1, "identity": dict(identity), "sources": dict(sources)}
    with writing(folder, UsageError):
        replace_text(folder / RUN, json_bytes(record).decode())
        replace_text(folder / CONFIG, to_toml(config))


def recorded_run(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Identity and sources as `record_run` wrote them; CheckpointError if they are damaged."""
    try:
        record = read_json(folder / RUN)
    except (ModelError, OSError) as error:
        raise CheckpointError(f"{folder / RUN}: cannot be read ({error}): restore it, or name a new `out`") from error
    identity, sources = record.get("identity"), record.get("sources")
    if not (record.get("schema") == 1 and isinstance(identity, dict) and isinstance(sources, dict)):
        raise CheckpointError(f"{folder / RUN} is damaged or of a later version: restore it, or name a new `out`")
    return identity, sources


def _require_run_folder(folder: Path) -> None:
    """UsageError unless `folder` is new, empty, or holds a run."""
    if not folder.exists() or (folder / RUN).is_file():
        return
    if not folder.is_dir():
        raise UsageError(f"out = {folder} is a file: name a new folder")
    if any(path.name != CACHE for path in folder.iterdir()):  # a run killed at its start leaves its cache
        raise UsageError(f"out = {folder} is not empty and holds no run (no {RUN}): name a new folder")


def _lock(folder: Path) -> int:
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            descriptor, locked = lock_folder(Path(os.path.realpath(folder)))
        except FileNotFoundError:
            continue  # another run could not start and has just removed it
        except BlockingIOError as error:
            raise UsageError(
                f"out = {folder} is in use by another process: wait for it, stop it, or name a new folder"
            ) from error
        if not locked:
            warnings.warn(f"{folder}: no locks on this file system; let no other process train there", stacklevel=5)
        return descriptor
