"""Moving a new model into a folder that holds other things, too: all of them stay, and no half model is ever seen."""

import re
from pathlib import Path
from typing import NamedTuple

from moewright.checkpoint.check import difference
from moewright.checkpoint.files import FileRecord, parse_records, read_json, sync
from moewright.checkpoint.read import CONFIG, INDEX, RECORD, WEIGHTS
from moewright.errors import ModelError

SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


class Move(NamedTuple):
    """What is to be done, in this order."""

    going: list[str]
    coming: list[str]


def plan_move(work: Path, home: Path) -> Move:
    """What puts the model in ``work``, which is written whole, into ``home`` in place of the model there.

    ModelError if a folder is in the way, or ``work`` is not what we left.
    """
    files = _files(work / RECORD)
    coming = [name for name in (*sorted(files.keys() - {CONFIG, RECORD}), RECORD, CONFIG) if (work / name).exists()]
    old = {file.name for file in home.iterdir() if file.name in (WEIGHTS, INDEX) or SHARD.fullmatch(file.name)}
    for name in (*coming, *old, RECORD, CONFIG):
        if (home / name).is_dir():
            raise ModelError(f"{home}: a folder {name} is in the way; choose another folder, or move it")
        if (work / name).is_symlink():
            raise ModelError(f"{work}: {name} is a link, which we did not leave there; remove the folder")
    return Move(sorted({*old, RECORD} - files.keys()), coming)


def move(work: Path, home: Path, plan: Move) -> None:
    """Carry it out. ``home`` is no model while its config.json is away, which goes first, and comes last.

    The record comes just before it. A move that was interrupted is finished by being planned and done once more.
    """
    (home / CONFIG).unlink(missing_ok=True)
    sync(home)
    for name in plan.going:
        (home / name).unlink(missing_ok=True)
    for name in plan.coming:
        if name == CONFIG:
            sync(home)
        (work / name).rename(home / name)
    sync(home)


def finish_move(work: Path, home: Path) -> None:
    """Finish a move that was interrupted, if that is what ``work`` is left of; ModelError as `plan_move`."""
    if (home / CONFIG).exists():
        return
    if (work / RECORD).exists():  # which is the last to be written, and the last but one to be moved
        move(work, home, plan_move(work, home))
    elif (work / CONFIG).is_file() and (home / RECORD).exists():
        record = _files(home / RECORD).get(CONFIG)
        if record is not None and not (work / CONFIG).is_symlink() and difference(work / CONFIG, record) is None:
            (work / CONFIG).rename(home / CONFIG)
            sync(home)


def _files(record: Path) -> dict[str, FileRecord]:
    try:
        return parse_records(read_json(record).get("files"))
    except ValueError as error:
        raise ModelError(f"{record}: {error}; we did not leave it like that: remove the file") from error
