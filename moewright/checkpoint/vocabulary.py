"""The number of tokens of a folder's tokenizer, from its files alone and without the library that runs it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moewright.checkpoint.untrusted import file_inside, read_json

TOKENIZER = "tokenizer.json"
OLDER = ("vocab.json", "added_tokens.json")
"""Tables of tokens and their ids; where there is a ``tokenizer.json``, it alone counts."""


def token_count(folder: Path) -> int:
    """One more than the largest id of a token; 0 without any of these files.

    ModelError if one of them is not a JSON object.
    """
    names = [name for name in (TOKENIZER, *OLDER) if (folder / name).exists()]
    ids: list[int] = []
    for name in names[:1] if TOKENIZER in names else names:
        content = read_json(file_inside(folder, name))
        ids += _ids(content) if name == TOKENIZER else _integers(content.values())
    return 1 + max(ids, default=-1)


def _ids(tokenizer: dict[str, Any]) -> Iterator[int]:
    """The ids in a ``tokenizer.json``: of its model (a table, or for Unigram a list in the order of ids) and added."""
    model, added = tokenizer.get("model"), tokenizer.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, list):
        yield len(vocabulary) - 1
    elif isinstance(vocabulary, dict):
        yield from _integers(vocabulary.values())
    if isinstance(added, list):
        yield from _integers(token.get("id") for token in added if isinstance(token, dict))


def _integers(values: Any) -> Iterator[int]:
    return (value for value in values if type(value) is int)
