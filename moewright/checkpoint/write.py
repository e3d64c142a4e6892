"""Writing model folders: shards, their index, the files that go with them, and the record of it all."""

import json
import os
import re
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self

from moewright.checkpoint.commit import NewFolder
from moewright.checkpoint.disk import overlap, require_space, writing
from moewright.checkpoint.files import FileRecord, copy_file, json_bytes, write_bytes
from moewright.checkpoint.into import Move
from moewright.checkpoint.read import CONFIG, INDEX, INSIDE, RECORD, WEIGHTS, interrupted_name
from moewright.checkpoint.tensorfile import LazyTensor, write_tensor_file
from moewright.checkpoint.untrusted import file_inside, read_json
from moewright.checkpoint.vocabulary import token_count
from moewright.errors import ModelError

TOKENIZER_CONFIG: Final = "tokenizer_config.json"
COMPANIONS: Final = f"""
    tokenizer.json {TOKENIZER_CONFIG} special_tokens_map.json added_tokens.json vocab.json merges.txt tokenizer.model
    sentencepiece.bpe.model spiece.model vocab.txt chat_template.jinja chat_template.json generation_config.json
    LICENSE LICENSE.txt NOTICE NOTICE.txt
""".split()
"""The files that go with a model's weights: tokenizer, generation settings, and the licence."""
SHARD_BYTES: Final = 5 * 10**9
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


class FolderWriter:
    """Writes a model folder so that the target holds the old model, nothing, or the whole new model, never a part.

    A context manager. Everything goes to ``path``, a temporary folder beside the target that is locked while we live;
    ``commit`` renames it. Leaving the block without ``commit`` removes it. The remains of a killed process (a temporary
    folder, or an old model moved aside) are put right by the next writer on the same target.

    ``sources`` are folders that the new model is made from: the target may not be, hold, or lie in one of them.

    With ``into`` a target that exists is kept, with all its contents, and ``path`` lies in it. ``commit`` moves the new
    files into it; of the old ones only a model is replaced: its config, weights, index and record. Until the last file
    has arrived there is no config.json, so nobody takes the folder for a model; the next writer finishes a move that
    was interrupted.

    ModelError if the target exists and ``overwrite`` is not set, is no model folder, is being written by another
    process, or cannot be written; ResourceError if the disk is full.
    """

    path: Path

    def __init__(
        self, target: str | Path, *, overwrite: bool = False, into: bool = False, sources: Sequence[Path] = ()
    ) -> None:
        self.target = Path(target)
        home = Path(os.path.realpath(target))  # where the renames happen, also if the target is a link
        if not home.name:
            raise ModelError(f"{self.target}: the root of the file system; choose a folder")
        into = into and home.is_dir()
        self.path = home / INSIDE if into else home.with_name(f".{home.name}.moewright-tmp")
        self._new = NewFolder(
            home,
            self.path,
            aside=home.with_name(interrupted_name(home.name)),
            marker=RECORD,
            target=self.target,
            replace=overwrite,
            into=Move(self.path, home, RECORD, CONFIG, _is_weight_file) if into else None,
            check=self._check,
        )
        for source in sources:
            if overlap(home, source):
                raise ModelError(
                    f"{self.target}: would overwrite or mix with its source {source}; choose another folder"
                )
        self._refuse_existing()

    def __enter__(self) -> Self:
        with writing(self.target):
            self._new.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._new.__exit__(*error)

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
                self._new.records[file] = write_tensor_file(self.path / file, shard, on_tensor=on_tensor, known=known)
            places |= dict.fromkeys(names, file)
        if len(shards) > 1:
            self.write_json(INDEX, {"metadata": {"total_size": total}, "weight_map": places})

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a JSON file: sorted keys, indent 2, a newline at the end; ValueError for NaN and Inf."""
        with writing(self.target):
            self._new.records[name] = write_bytes(self.path / name, json_bytes(value))

    def write_text(self, name: str, text: str) -> None:
        """Write a text file in UTF-8."""
        with writing(self.target):
            self._new.records[name] = write_bytes(self.path / name, text.encode())

    def copy_companions(self, source: Path) -> list[str]:
        """Copy tokenizer, generation and licence files (an allow-list) from a model folder; returns their names.

        In ``tokenizer_config.json``, ``auto_map`` and private keys are left out. ModelError for a link that leads out,
        and for a tokenizer with more entries than the embedding has rows, by the config.json written before.
        """
        config = read_json(self.path / CONFIG) if CONFIG in self._new.records else {}
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
            copy = _copy_tokenizer_config if name == TOKENIZER_CONFIG else copy_file
            with writing(self.target):
                self._new.records[name] = copy(file, self.path / name)
        return names

    def commit(self, record: Mapping[str, Any]) -> Path:
        """Write moewright.json (``record`` and all hashes), put the folder in place; returns the target.

        With ``overwrite`` the old folder is moved aside, the new one put in place, the old one deleted.
        """
        there = {file.name for file in self.path.iterdir()}
        assert {CONFIG, RECORD} & there == {CONFIG}, "config.json is written before the commit, the record by it"
        with writing(self.target):
            self._new.commit(record)
        return self.target

    def _check(self) -> None:
        if not self._new.locked:
            warnings.warn(f"{self.target}: no locks on this file system; let no other process write it", stacklevel=4)
        self._refuse_existing()

    def _refuse_existing(self) -> None:
        home = self._new.home
        if not os.path.lexists(home):
            return
        if not home.is_dir():
            raise ModelError(f"{self.target}: a file is in the way; choose another folder")
        if self._new.into or not any(home.iterdir()):
            return
        if not self._new.replace:
            raise ModelError(
                f"{self.target}: exists and is not empty; choose another folder, or overwrite it (--overwrite)"
            )
        if not (home / CONFIG).is_file():  # --overwrite with a mistyped path must not cost someone their files
            raise ModelError(f"{self.target}: has no {CONFIG}, so it is no model folder; it is not overwritten")


def _is_weight_file(name: str) -> bool:
    return name in (WEIGHTS, INDEX) or SHARD.fullmatch(name) is not None


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
