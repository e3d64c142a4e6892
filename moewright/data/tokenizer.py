"""The tokenizer of a model folder, and the token ids of text files."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from moewright.data.texts import expand, texts_of
from moewright.errors import ModelError


def load_tokenizer(folder: str | Path, *, vocabulary: int | None = None) -> PreTrainedTokenizerBase:
    """Load the folder's tokenizer, from its files alone, for a model whose embedding has `vocabulary` rows.

    Raises ModelError: there is no tokenizer that loads, or it has a token without a row in the embedding.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the Rust library raises nothing narrower for a broken tokenizer.json
        why = " ".join(str(error).split())[:200]
        raise ModelError(
            f"{folder}: no tokenizer that loads ({why}); copy the model's tokenizer files there"
        ) from error
    size = 1 + max(tokenizer.get_vocab().values(), default=-1)
    if vocabulary is not None and size > vocabulary:
        raise ModelError(
            f"{folder}: the tokenizer has {size} tokens, but the model's embedding has {vocabulary} rows: "
            "copy the tokenizer that belongs to the model there"
        )
    return tokenizer


def tokenise(folder: Path, files: Sequence[Path | str], *, vocabulary: int) -> list[Tensor]:
    """The documents of the files as int64 token ids by the folder's tokenizer; no end token is added.

    Raises `DataError` for a missing file or text that is not UTF-8, `ModelError` for a tokenizer that does not load
    or has more entries than the model's `vocabulary`.
    """
    tokenizer = load_tokenizer(folder, vocabulary=vocabulary)
    texts = []
    for path in expand([str(file) for file in files]):
        for text in texts_of(path):
            texts.append(torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64))
    return texts
