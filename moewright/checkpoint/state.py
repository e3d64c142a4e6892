"""Training state: saved by the commit protocol, verified to the last byte before it is used.

A state is a folder ``step-00000010`` with ``tensors.safetensors``, ``facts.json`` and, written last, the marker
``COMMITTED.json`` with the size and SHA-256 of the other two. It is prepared as ``step-00000010.tmp-<uuid>``, which no
reader opens. No part of it is a pickle.
"""

import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moewright.checkpoint.check import difference
from moewright.checkpoint.commit import NewFolder
from moewright.checkpoint.disk import remove, require_space, writing
from moewright.checkpoint.files import FileRecord, json_bytes, write_bytes
from moewright.checkpoint.tensorfile import LazyTensor, TensorInfo, read_header, read_tensor, write_tensor_file
from moewright.checkpoint.untrusted import parse_records, read_json
from moewright.errors import CheckpointError, ModelError

SCHEMA = 1
TENSORS = "tensors.safetensors"
FACTS = "facts.json"
MARKER = "COMMITTED.json"
# ".old-": the state that a second save of the same step has moved aside; it counts until the new one is in place.
STATE = re.compile(r"step-\d{8,}(\.old-[0-9a-f]{32})?")
LEFTOVER = re.compile(r"step-\d{8,}\.tmp-[0-9a-f]{32}")


def save_state(
    root: Path, *, step: int, tensors: Mapping[str, Tensor | LazyTensor], facts: Mapping[str, Any], keep: int = 2
) -> Path:
    """Write the state of ``step`` below ``root`` and return its folder, ``root/step-XXXXXXXX``.

    A state of the same step is replaced. Once the new one is complete, all but the newest ``keep`` states up to
    ``step`` are removed, and so are the leftovers of killed saves; states of later steps (damaged ones that a resume
    has skipped) stay until they are replaced. One process at a time may save below a root.

    ``facts`` is anything JSON can hold (ValueError for NaN and Inf). ResourceError if the disk is full,
    CheckpointError if it cannot be written; the earlier states are then untouched.
    """
    assert step >= 0
    assert keep >= 1
    final = root / f"step-{step:08}"
    with writing(root, CheckpointError):
        root.mkdir(parents=True, exist_ok=True)
        lazy = {name: _lazy(tensor) for name, tensor in tensors.items()}
        require_space(root, sum(entry.nbytes for entry in lazy.values()))
        work, aside = (root / f"{final.name}.{kind}-{uuid.uuid4().hex}" for kind in ("tmp", "old"))
        with NewFolder(final, work, aside, MARKER, target=root, replace=True) as new:
            new.records[TENSORS] = write_tensor_file(new.path / TENSORS, lazy)
            new.records[FACTS] = write_bytes(new.path / FACTS, json_bytes(facts))
            new.commit({"schema": SCHEMA, "step": step, "torch": torch.__version__})
        _retire(root, step, keep)
    return final


def _lazy(tensor: Tensor | LazyTensor) -> LazyTensor:
    if isinstance(tensor, LazyTensor):
        return tensor
    return LazyTensor(tuple(tensor.shape), tensor.dtype, tensor.detach)


def _retire(root: Path, step: int, keep: int) -> None:
    """Delete all that the newest state makes superfluous: older states, replaced ones, leftovers of killed saves."""
    states = [path for path in _states(root) if _step(path) <= step]
    kept = [path for path in states if not path.suffix][:keep]
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


def newest_state(root: Path) -> tuple[Path | None, list[str]]:
    """The newest state below ``root`` that verifies (marker, sizes, SHA-256), and why each newer one was skipped.

    (None, ...) if nothing was ever saved there. Leftovers of killed saves are named among the reasons, and are not
    counted as states. CheckpointError if there are states and none verifies: a run never starts from step 0 by itself.
    """
    if not root.is_dir():
        return None, []
    reasons = [f"{path.name}: an interrupted save, ignored" for path in _leftovers(root)]
    states = _states(root)
    for path in states:
        try:
            for name, record in _read_marker(path).items():
                if fault := difference(path / name, record):
                    raise CheckpointError(fault)
        except (CheckpointError, OSError) as error:
            reasons.append(f"{path.name}: {error}")
        else:
            return path, reasons
    if states:
        raise CheckpointError(f"{root}: no state verifies ({'; '.join(reasons)}); restore one, or choose a new folder")
    return None, reasons


def _read_marker(path: Path) -> dict[str, FileRecord]:
    """The files of a state with their records; CheckpointError if the marker is not sound."""
    if not (path / MARKER).is_file():
        raise CheckpointError(f"{MARKER} is missing")
    try:
        marker = read_json(path / MARKER)
        records = parse_records(marker.get("files"))
    except ValueError as error:
        raise CheckpointError(f"{MARKER} is damaged: {error}") from error
    if marker.get("schema") != SCHEMA:
        raise CheckpointError(f"{MARKER} has schema {marker.get('schema')!r}, this version reads {SCHEMA}")
    if marker.get("step") != _step(path) or records.keys() != {TENSORS, FACTS}:
        raise CheckpointError(f"{MARKER} belongs to another state")
    return records


@dataclass(frozen=True)
class SavedState:
    """A state that is open: its facts, and its tensors, which are read one at a time, or a part of one."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    facts: dict[str, Any]

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> Tensor:
        """A tensor, or the part ``index`` of it, on the CPU; CheckpointError if the folder has changed since."""
        try:
            return read_tensor(self.tensors[name], index)
        except (ModelError, OSError) as error:
            raise _unreadable(self.path, error) from error


def open_state(path: Path) -> SavedState:
    """Open a state that ``newest_state`` has returned.

    The hashes are not computed a second time; CheckpointError if the folder has changed since.
    """
    try:
        _read_marker(path)
        return SavedState(path, read_header(path / TENSORS), read_json(path / FACTS))
    except (CheckpointError, ModelError, OSError) as error:
        raise _unreadable(path, error) from error


def load_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (on the CPU) and facts of a state that ``newest_state`` has returned; as `open_state`."""
    state = open_state(path)
    return {name: state.read(name) for name in state.tensors}, state.facts


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path}: cannot be loaded ({error})")
