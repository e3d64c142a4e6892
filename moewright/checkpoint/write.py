"""Writing model folders: beside the target, hashed, and put in place by one rename."""

import contextlib
import json
import os
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from moewright.checkpoint.files import (
    FileRecord,
    copy_file,
    file_inside,
    json_bytes,
    overlap,
    read_json,
    record_of,
    remove,
    replace_text,
    require_space,
    sync,
    write_bytes,
    writing,
)
from moewright.checkpoint.into import finish_move, move, plan_move
from moewright.checkpoint.lock import lock_folder
from moewright.checkpoint.read import CONFIG, INDEX, INSIDE, RECORD, WEIGHTS, interrupted_name
from moewright.checkpoint.tensorfile import LazyTensor, write_tensor_file
from moewright.checkpoint.vocabulary import token_count
from moewright.errors import ModelError

TOKENIZER_CONFIG = "tokenizer_config.json"
COMPANIONS = (
    "tokenizer.json",
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "spiece.model",
    "vocab.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    # The licence travels with the weights.
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
    "NOTICE.txt",
)


SHARD_BYTES = 5 * 10**9


class FolderWriter:
    """Writes a model folder so that the target holds the old model, nothing, or the whole new model, never a part.

    A context manager. Everything goes to ``path``, a temporary folder beside the target that is locked while we live;
    ``commit`` renames it. Leaving the block without ``commit`` removes it. What a killed process left (a temporary
    folder, or an old model moved aside) is put right by the next writer on the same target.

    ``sources`` are folders that the new model is made from: the target may not be, hold, or lie in one of them.

    With ``into`` a target that exists is kept, whatever it holds, and ``path`` lies in it. ``commit`` moves the new
    files into it, and of what was there only a model is replaced: its config, weights, index and record. Until the last
    file has arrived there is no config.json, so nobody takes the folder for a model; the next writer finishes a move
    that was interrupted.

    ModelError if the target exists and ``overwrite`` is not set, is no model folder, is being written by another
    process, or cannot be written; ResourceError if the disk is full.
    """

    path: Path

    def __init__(
        self, target: str | Path, *, overwrite: bool = False, into: bool = False, sources: Sequence[Path] = ()
    ) -> None:
        self.target = Path(target)
        self._home = Path(os.path.realpath(target))  # where the renames happen, also if the target is a link
        if not self._home.name:
            raise ModelError(f"{self.target}: the root of the file system; choose a folder")
        self._overwrite = overwrite
        self._old = self._home.with_name(interrupted_name(self._home.name))
        self._into = into and self._home.is_dir()
        self.path = self._home / INSIDE if self._into else self._home.with_name(f".{self._home.name}.moewright-tmp")
        self._records: dict[str, FileRecord] = {}
        self._committed = self._moving = False
        for source in sources:
            if overlap(self._home, source):
                raise ModelError(
                    f"{self.target}: would overwrite or mix with its source {source}; choose another folder"
                )
        self._refuse_existing()

    def __enter__(self) -> Self:
        with writing(self.target):
            self._new_parents = [folder for folder in self._home.parents if not folder.exists()]
            self._home.parent.mkdir(parents=True, exist_ok=True)
            self._lock = self._take_lock()
            try:
                self._mend()
                self._refuse_existing()
                for leftover in self.path.iterdir():
                    remove(leftover)
            except BaseException:
                self._give_up()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._committed:
            os.close(self._lock)
        else:
            self._give_up()

    def write_tensors(
        self,
        tensors: Mapping[str, LazyTensor],
        *,
        max_shard_bytes: int = SHARD_BYTES,
        on_tensor: Callable[[str, int], None] | None = None,
    ) -> None:
        """Write the weights, in the order of the mapping, one tensor in memory at a time.

        A shard is closed before it would exceed ``max_shard_bytes`` (a larger tensor has a shard to itself). One shard
        is ``model.safetensors``; several are numbered and listed in an index. ``on_tensor(name, bytes)`` follows each.
        """
        shards = plan_shards(tensors, max_shard_bytes)
        total = sum(lazy.nbytes for lazy in tensors.values())
        with writing(self.target):
            require_space(self.path, total + 256 * len(tensors))  # a header has about 100-200 bytes a tensor
        places: dict[str, str] = {}
        known: dict[Hashable, bytes] = {}
        for number, names in enumerate(shards, start=1):
            file = WEIGHTS if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
            shard = {name: tensors[name] for name in names}
            with writing(self.target):
                self._records[file] = write_tensor_file(self.path / file, shard, on_tensor=on_tensor, known=known)
            places |= dict.fromkeys(names, file)
        if len(shards) > 1:
            self.write_json(INDEX, {"metadata": {"total_size": total}, "weight_map": places})

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a JSON file: sorted keys, indent 2, a newline at the end; ValueError for NaN and Inf."""
        with writing(self.target):
            self._records[name] = write_bytes(self.path / name, json_bytes(value))

    def write_text(self, name: str, text: str) -> None:
        """Write a text file in UTF-8."""
        with writing(self.target):
            self._records[name] = write_bytes(self.path / name, text.encode())

    def copy_companions(self, source: Path) -> list[str]:
        """Copy tokenizer, generation and licence files (an allow-list) from a model folder; returns their names.

        In ``tokenizer_config.json``, ``auto_map`` and private keys are left out. ModelError for a link that leads out,
        and for a tokenizer with more entries than the embedding has rows, by the config.json written before.
        """
        config = read_json(self.path / CONFIG) if CONFIG in self._records else {}
        rows = (config.get("backbone") or config).get("vocab_size")
        tokens = token_count(source)
        if isinstance(rows, int) and tokens > rows:
            raise ModelError(
                f"{source}: the tokenizer has {tokens} tokens, but the model's embedding has {rows} rows; "
                "copy the tokenizer that belongs to the model there"
            )
        names = [name for name in COMPANIONS if os.path.lexists(source / name)]
        for name in names:
            file = file_inside(source, name)
            with writing(self.target):
                if name == TOKENIZER_CONFIG:
                    self._records[name] = _copy_tokenizer_config(file, self.path / name)
                else:
                    self._records[name] = copy_file(file, self.path / name)
        return names

    def commit(self, record: Mapping[str, Any]) -> Path:
        """Write moewright.json (``record`` and all hashes), put the folder in place; returns the target.

        With ``overwrite`` the old folder is moved aside, the new one put in place, the old one deleted.
        """
        assert {CONFIG, RECORD} & self._written() == {CONFIG}, (
            "config.json is written before the commit, the record by it"
        )
        with writing(self.target):
            for name in sorted(self._written() - self._records.keys()):  # files written by others, as a tokenizer's
                sync(self.path / name)
                self._records[name] = record_of(self.path / name)
            # Whole or not there: it says that everything before it was written.
            replace_text(self.path / RECORD, json_bytes({**record, "files": self._records}).decode())
            if self._into:
                plan = plan_move(self.path, self._home)
                self._moving = True  # from here on the temporary folder may hold what the target lacks
                move(self.path, self._home, plan)
                remove(self.path)
                self._committed = True
                return self.target
            if self._overwrite and self._home.exists():
                self._home.rename(self._old)
            self.path.rename(self._home)
            self._committed = True
            sync(self._home.parent)
            remove(self._old)
        return self.target

    def _written(self) -> set[str]:
        return {file.name for file in self.path.iterdir()}

    def _refuse_existing(self) -> None:
        if not os.path.lexists(self._home):
            return
        if not self._home.is_dir():
            raise ModelError(f"{self.target}: a file is in the way; choose another folder")
        if self._into or not any(self._home.iterdir()):
            return
        if not self._overwrite:
            raise ModelError(
                f"{self.target}: exists and is not empty; choose another folder, or overwrite it (--overwrite)"
            )
        if not (self._home / CONFIG).is_file():  # --overwrite with a mistyped path must not cost someone their files
            raise ModelError(f"{self.target}: has no {CONFIG}, so it is no model folder; it is not overwritten")

    def _take_lock(self) -> int:
        """Make the temporary folder, or take over one whose writer is dead; returns the locked descriptor."""
        while True:
            made = True
            try:
                self.path.mkdir()
            except FileExistsError:
                made = False
            try:
                descriptor, locked = lock_folder(self.path)
            except FileNotFoundError:
                continue  # its owner has just finished with it
            except BlockingIOError as error:
                raise ModelError(f"{self.target}: another process is writing it; wait for it or stop it") from error
            if not locked:
                if not made:
                    os.close(descriptor)
                    raise ModelError(
                        f"{self.path}: left by another process, and this file system has no locks to tell whether it "
                        "still runs; remove the folder if it does not"
                    )
                warnings.warn(
                    f"{self.target}: no locks on this file system; let no other process write it", stacklevel=3
                )
            return descriptor

    def _mend(self) -> None:
        """Finish or undo what was interrupted between its renames."""
        if self._into:
            self._moving = True
            finish_move(self.path, self._home)
            self._moving = False
        if not self._old.exists():
            return
        if (self._home / RECORD).exists():  # the new model arrived, and only the deletion is missing
            remove(self._old)
        elif self._home.exists() and any(self._home.iterdir()):
            raise ModelError(f"{self.target}: something else took the place of the model in {self._old}; remove either")
        else:
            self._old.rename(self._home)
            warnings.warn(
                f"{self.target}: an overwrite had been interrupted; the old model is in place again", stacklevel=2
            )

    def _give_up(self) -> None:
        """Remove what we made. The lock is held to the end, so nobody takes the folder for a stale one."""
        if self._old.exists() and not self._home.exists():
            self._old.rename(self._home)
        if not self._moving:  # else it holds what the target lacks, for the next writer
            remove(self.path)
        os.close(self._lock)
        with contextlib.suppress(OSError):  # not empty: somebody else has found a use for it
            for folder in self._new_parents:
                folder.rmdir()


def plan_shards(tensors: Mapping[str, LazyTensor], max_shard_bytes: int) -> list[list[str]]:
    """Split the names, in order, into shards of at most ``max_shard_bytes`` of data each."""
    assert tensors, "a model has at least one tensor"
    shards: list[list[str]] = [[]]
    room = max_shard_bytes
    for name, lazy in tensors.items():
        if lazy.nbytes > room and shards[-1]:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= lazy.nbytes
    return shards


def _copy_tokenizer_config(source: Path, target: Path) -> FileRecord:
    config = read_json(source)
    kept = {key: value for key, value in config.items() if key != "auto_map" and not key.startswith("_")}
    if kept == config:
        return copy_file(source, target)
    return write_bytes(target, (json.dumps(kept, indent=2, ensure_ascii=False) + "\n").encode())
