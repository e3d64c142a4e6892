"""Training state: saved by the commit protocol, verified to the last byte before it is used.

A state is a folder ``step-00000010`` with, for each rank that wrote it, a file of the pieces of tensors that were its
to write (``rank-00000.safetensors``; a process alone writes one), ``index.json`` (which box of which tensor lies
where, `shards.py`), ``facts.json`` and, written last, the marker ``COMMITTED.json`` with the size and hash of all
others. It is prepared as ``step-00000010.tmp-<uuid>``, which no reader opens. No part of it is a pickle.

States of schema 1 have one file of whole tensors, ``tensors.safetensors``, and no index; they are read, too.
"""

import re
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import torch
from torch import Tensor

from moewright.checkpoint.check import difference
from moewright.checkpoint.commit import NewFolder
from moewright.checkpoint.disk import remove, require_space, writing
from moewright.checkpoint.files import FileRecord, json_bytes, write_bytes
from moewright.checkpoint.shards import (
    Piece,
    ShardReader,
    StoredTensor,
    index_of,
    read_index,
    whole_tensors,
    write_pieces,
)
from moewright.checkpoint.tensorfile import LazyTensor
from moewright.checkpoint.untrusted import MAX_JSON_BYTES, parse_records, read_json
from moewright.errors import CheckpointError, ModelError

SCHEMA: Final = 2
TENSORS: Final = "tensors.safetensors"  # of schema 1
FACTS: Final = "facts.json"
INDEX: Final = "index.json"
MARKER: Final = "COMMITTED.json"
# ".old-": the state that a second save of the same step has moved aside; it counts until the new one is in place.
STATE = re.compile(r"step-\d{8,}(\.old-[0-9a-f]{32})?")
LEFTOVER = re.compile(r"step-\d{8,}\.tmp-[0-9a-f]{32}")


def rank_file(rank: int) -> str:
    """Name of the file that a rank writes."""
    return f"rank-{rank:05}.safetensors"


class NewState:
    """A state on its way, held by one process, the first rank: every rank writes its file into ``path``, then `commit`.

    A context manager; leaving the block without `commit` removes what was written, so all ranks must have ended their
    writing by then. A state of the same step is replaced. One state at a time may be on its way below a root.

    Raises ResourceError if the disk has less than ``nbytes`` to spare, CheckpointError if nothing can be written below
    ``root``; the earlier states are then untouched.
    """

    def __init__(self, root: Path, *, step: int, nbytes: int) -> None:
        assert step >= 0
        self.root, self.step, self.nbytes = root, step, nbytes
        self.final = root / f"step-{step:08}"
        self.path, aside = (root / f"{self.final.name}.{kind}-{uuid.uuid4().hex}" for kind in ("tmp", "old"))
        self._new = NewFolder(self.final, self.path, aside, MARKER, target=root, replace=True)

    def __enter__(self) -> Self:
        with writing(self.root, CheckpointError):
            self.root.mkdir(parents=True, exist_ok=True)
            require_space(self.root, self.nbytes)
            self._new.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._new.__exit__(kind, error, traceback)

    def commit(
        self,
        records: Sequence[FileRecord],
        *,
        shapes: Mapping[str, tuple[int, ...]],
        facts: Mapping[str, Any],
        keep: int,
        damaged: Collection[str] = (),
    ) -> Path:
        """Make a state of the files that the ranks have written, and return its folder.

        ``records`` are those of the files, in the order of ranks; ``shapes`` those of all tensors. Once the state is
        complete, all but the newest ``keep`` up to its step are removed, and so are the leftovers of killed saves and
        the states that the caller knows to be ``damaged``; states of later steps (damaged ones that a resume has
        skipped) stay until they are replaced.

        ``facts`` is anything JSON can hold (ValueError for NaN and Inf). CheckpointError if a file is not as its record
        says, or a tensor is not there exactly once; ResourceError and CheckpointError as for the class.
        """
        assert keep >= 1
        files = [self.path / rank_file(rank) for rank in range(len(records))]
        with writing(self.root, CheckpointError):
            for file, record in zip(files, records, strict=True):
                if not file.is_file() or file.stat().st_size != record["bytes"]:
                    raise CheckpointError(
                        f"{file}: this process does not see the {record['bytes']} bytes that were written there: "
                        "is it one folder for all ranks?"
                    )
                self._new.records[file.name] = record
            try:
                index = index_of(files, shapes)
            except ModelError as error:
                raise CheckpointError(str(error)) from error
            assert len(index) <= MAX_JSON_BYTES, f"an index of {len(index)} bytes is not readable"
            self._new.records[INDEX] = write_bytes(self.path / INDEX, index)
            self._new.records[FACTS] = write_bytes(self.path / FACTS, json_bytes(facts))
            self._new.commit({"schema": SCHEMA, "step": self.step, "ranks": len(files), "torch": torch.__version__})
            _retire(self.root, self.step, keep, damaged)
        return self.final


def write_rank(path: Path, *, rank: int, pieces: Sequence[Piece]) -> FileRecord:
    """Write a rank's file into the ``path`` of a `NewState`, and bring it to the disk.

    ResourceError if the disk is full, CheckpointError if it cannot be written.
    """
    with writing(path, CheckpointError):
        return write_pieces(path / rank_file(rank), pieces)


def save_state(
    root: Path, *, step: int, tensors: Mapping[str, Tensor | LazyTensor], facts: Mapping[str, Any], keep: int = 2
) -> Path:
    """Write the state of ``step``, whose tensors are all here, below ``root``; returns its folder.

    What is kept, and errors, as for `NewState`.
    """
    lazy = {name: _lazy(tensor) for name, tensor in tensors.items()}
    pieces = [Piece(name, (0,) * len(entry.shape), entry) for name, entry in lazy.items()]
    with NewState(root, step=step, nbytes=sum(entry.nbytes for entry in lazy.values())) as new:
        record = write_rank(new.path, rank=0, pieces=pieces)
        shapes = {name: entry.shape for name, entry in lazy.items()}
        return new.commit([record], shapes=shapes, facts=facts, keep=keep)


def _lazy(tensor: Tensor | LazyTensor) -> LazyTensor:
    if isinstance(tensor, LazyTensor):
        return tensor
    return LazyTensor(tuple(tensor.shape), tensor.dtype, tensor.detach)


def _retire(root: Path, step: int, keep: int, damaged: Collection[str]) -> None:
    """Delete all that the newest state makes superfluous: older and damaged states, replaced ones, leftovers."""
    states = [path for path in _states(root) if _step(path) <= step]
    new = f"step-{step:08}"
    kept = [path for path in states if not path.suffix and (path.name == new or path.name not in damaged)][:keep]
    for path in states:
        if path not in kept:
            # Renamed first: a kill while deleting leaves a leftover, not a damaged state.
            path.rename(root / f"{path.stem}.tmp-{uuid.uuid4().hex}")
    for path in _leftovers(root):
        remove(path)


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


def _states(root: Path) -> list[Path]:
    """All states, the newest first; one that was moved aside follows the one that replaces it."""
    states = [path for path in root.iterdir() if STATE.fullmatch(path.name)]
    return sorted(states, key=lambda path: (-_step(path), path.name))


def _leftovers(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if LEFTOVER.fullmatch(path.name))


def fault_of(path: Path, *, rank: int = 0, ranks: int = 1) -> str | None:
    """Why a state does not verify (marker, index, sizes, hashes), in words; None if it does.

    With several ``ranks`` each verifies its share of the files; the state is sound if no rank has found a fault.
    """
    try:
        records = _read_marker(path)
        rest = sorted(records.keys() - {FACTS, INDEX}, key=lambda name: (-records[name]["bytes"], name))
        first = [name for name in (FACTS, INDEX) if name in records and rank == 0]
        for name in (*first, *rest[rank::ranks]):
            if fault := difference(path / name, records[name]):
                return fault
        if rank == 0 and INDEX in records:
            read_index(path / INDEX, files=len(rest))
    except (CheckpointError, ModelError, OSError) as error:
        return str(error)
    return None


def newest_state(root: Path, *, fault_of: Callable[[Path], str | None] = fault_of) -> tuple[Path | None, list[str]]:
    """The newest state below ``root`` that verifies, and why each newer one was skipped.

    (None, ...) if nothing was ever saved there. Leftovers of killed saves are named among the reasons, and are not
    counted as states. CheckpointError if there are states and none verifies: a run never starts from step 0 by itself.
    ``fault_of`` says why a state does not verify; several processes can share that work.
    """
    if not root.is_dir():
        return None, []
    reasons = [f"{path.name}: an interrupted save, ignored" for path in _leftovers(root)]
    states = _states(root)
    for path in states:
        if (fault := fault_of(path)) is None:
            return path, reasons
        reasons.append(f"{path.name}: {fault}")
    if states:
        raise CheckpointError(f"{root}: no state verifies ({'; '.join(reasons)}); restore one, or choose a new folder")
    return None, reasons


def states_after(path: Path) -> list[str]:
    """The names of the states of later steps than that of ``path``, in the same folder."""
    return [other.name for other in _states(path.parent) if _step(other) > _step(path)]


def _read_marker(path: Path) -> dict[str, FileRecord]:
    """The files of a state with their records; CheckpointError if the marker is not sound."""
    if not (path / MARKER).is_file():
        raise CheckpointError(f"{MARKER} is missing")
    try:
        marker = read_json(path / MARKER)
        records = parse_records(marker.get("files"))
    except ValueError as error:
        raise CheckpointError(f"{MARKER} is damaged: {error}") from error
    schema, ranks = marker.get("schema"), marker.get("ranks")
    if schema not in (1, SCHEMA):
        raise CheckpointError(f"{MARKER} has schema {schema!r}, this version reads 1 and {SCHEMA}")
    files = {TENSORS} if schema == 1 else {INDEX}
    if schema != 1 and type(ranks) is int and 0 < ranks <= len(records):
        files |= {rank_file(rank) for rank in range(ranks)}
    if marker.get("step") != _step(path) or records.keys() != files | {FACTS}:
        raise CheckpointError(f"{MARKER} belongs to another state")
    return records


@dataclass(frozen=True)
class SavedState:
    """A state that is open: its facts, and its tensors, which are read one at a time, or a part of one."""

    path: Path
    tensors: Mapping[str, StoredTensor]
    facts: dict[str, Any]
    reader: ShardReader = field(repr=False)

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> Tensor:
        """A tensor, or the part ``index`` of it, on the CPU; CheckpointError if the folder has changed since."""
        try:
            return self.reader.read(name, index)
        except (CheckpointError, ModelError, OSError) as error:
            raise _unreadable(self.path, error) from error


def open_state(path: Path) -> SavedState:
    """Open a state that ``newest_state`` has returned.

    The hashes are not computed a second time; CheckpointError if the folder has changed since.
    """
    try:
        records = _read_marker(path)
        files = [path / name for name in sorted(records.keys() - {FACTS, INDEX})]
        if INDEX in records:
            tensors = read_index(path / INDEX, files=len(files))
        else:
            tensors = whole_tensors(files[0])
        reader = ShardReader(files, tensors, keyed=INDEX in records)
        return SavedState(path, tensors, read_json(path / FACTS), reader)
    except (CheckpointError, ModelError, OSError) as error:
        raise _unreadable(path, error) from error


def load_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (on the CPU) and facts of a state that ``newest_state`` has returned; as `open_state`."""
    state = open_state(path)
    return {name: state.read(name) for name in state.tensors}, state.facts


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path}: cannot be loaded ({error})")
