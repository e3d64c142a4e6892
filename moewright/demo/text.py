"""Python's standard library as text: modules to learn from, and others to be measured on."""

import random
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from moewright.errors import DataError


@dataclass(frozen=True)
class Split:
    """Files written for training and for measuring; no module is in both."""

    train: list[Path]
    held_out: list[Path]
    train_tokens: int
    held_out_tokens: int


def write_split(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    train_tokens: int,
    held_out_tokens: int,
    module_tokens: int,
    seed: int,
) -> Split:
    """Write the first `module_tokens` tokens of modules drawn by `seed` to `folder`/held-out and `folder`/train.

    Modules are the top-level `*.py` files of this Python's standard library; shorter ones are left out.
    Draws modules until both parts have their tokens. Raises `DataError` if the library is too small.
    """
    modules = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    random.Random(seed).shuffle(modules)
    pieces = _pieces(modules, tokenizer, module_tokens)
    held_out = _write(folder / "held-out", pieces, held_out_tokens // module_tokens)
    train = _write(folder / "train", pieces, -(-train_tokens // module_tokens))
    return Split(train, held_out, len(train) * module_tokens, len(held_out) * module_tokens)


def _pieces(modules: Sequence[Path], tokenizer: PreTrainedTokenizerBase, tokens: int) -> Iterator[tuple[str, str]]:
    """Name and first tokens, as text, of each module that is long enough."""
    for module in modules:
        text = module.read_text(encoding="utf-8")
        encoded = tokenizer(text, return_offsets_mapping=True, verbose=False)
        if len(encoded["input_ids"]) >= tokens:
            yield module.name, text[: encoded["offset_mapping"][tokens - 1][1]]


def _write(folder: Path, pieces: Iterator[tuple[str, str]], count: int) -> list[Path]:
    folder.mkdir(parents=True)
    paths = []
    for name, text in pieces:
        paths.append(folder / name)
        paths[-1].write_text(text, encoding="utf-8")
        if len(paths) == count:
            return paths
    raise DataError(f"Python's standard library has too few long modules: {len(paths)} of {count} found")
