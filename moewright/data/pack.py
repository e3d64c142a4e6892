"""Documents to rows of equal length, in which no document sees another.

Letters: N tokens of the whole stream, S tokens of a row, R rows, B rows of a batch.

The documents stand one after the other in a seeded order, each closed by the end token. Row r reads
the tokens [r S, r S + S) and predicts the tokens one further, so each token is predicted at most once.
A document that is cut at the end of a row goes on in the next row as if it began there.

`position_ids` that restart at 0 isolate documents: given neither an attention mask nor a
cache, transformers builds the block-diagonal mask from them. With `use_cache=True` it does not,
and documents leak into each other without a word.
"""

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Final, Literal, Self, get_args

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moewright.errors import DataError, ModelError

IGNORE: Final = -100
"""The target of a position that predicts nothing (`ignore_index` of torch's cross entropy)."""

Purpose = Literal["documents", "rows", "held-out"]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """B rows of S tokens, all of shape (B, S)."""

    input_ids: Tensor
    """int64; the end token where `token_mask` is False."""
    position_ids: Tensor
    """int64, from 0 in each document; padding counts as a document of its own."""
    targets: Tensor
    """int64, the next token of the same document, else `IGNORE`."""
    token_mask: Tensor
    """bool, False for padding."""

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def padded(self) -> bool:
        """Whether there is a token that is not real; reads the mask."""
        return not bool(self.token_mask.all())

    def rows(self, start: int, stop: int) -> "Batch":
        """The rows [start, stop) as a batch of their own (views, no copy)."""
        return self._each(lambda tensor: tensor[start:stop])

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`."""
        return self._each(lambda tensor: tensor.to(device))

    @classmethod
    def stack(cls, batches: Sequence[Self]) -> Self:
        """All rows of `batches`, in their order."""
        return cls(**{part.name: torch.cat([getattr(batch, part.name) for batch in batches]) for part in fields(cls)})

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        return Batch(**{part.name: change(getattr(self, part.name)) for part in fields(self)})


class PackedRows:
    """R rows over one stream of tokens, addressed by index.

    Args:
        tokens: (N,) int32, the documents one after the other, each with its end token; may be memory-mapped.
        lengths: (documents,) int64, tokens of each document, at least 2 each; they add up to N.
        sequence_length: S, at least 2.
        end_token: the token in padded places.
    """

    def __init__(
        self, tokens: NDArray[np.int32], *, lengths: NDArray[np.int64], sequence_length: int, end_token: int
    ) -> None:
        assert lengths.sum() == len(tokens)
        assert min(sequence_length, lengths.min()) >= 2
        self.tokens = tokens
        self.sequence_length = sequence_length
        self.end_token = end_token
        self.starts: NDArray[np.int64] = np.cumsum(lengths) - lengths

    def __len__(self) -> int:
        return -(-(len(self.tokens) - 1) // self.sequence_length)

    def batch(self, indices: Sequence[int]) -> Batch:
        """The rows `indices`, on the CPU."""
        return Batch.stack([self._row(index) for index in indices])

    def fingerprint(self) -> str:
        """sha256 of all tokens, boundaries and the row length: equal if and only if the rows are."""
        digest = hashlib.sha256(f"{self.sequence_length} {self.end_token} {len(self.starts)} ".encode())
        digest.update(self.starts.tobytes())
        for start in range(0, len(self.tokens), 1 << 22):
            digest.update(self.tokens[start : start + (1 << 22)].tobytes())
        return digest.hexdigest()

    def _row(self, index: int) -> Batch:
        assert 0 <= index < len(self)
        S = self.sequence_length
        begin = index * S
        window = np.asarray(self.tokens[begin : begin + S + 1], dtype=np.int64)
        real = min(S, len(self.tokens) - begin)
        first, last = np.searchsorted(self.starts, [begin, begin + S], side="right")
        inner = self.starts[first:last] - begin  # where in the row, 1..S, a further document begins

        input_ids = np.full(S, self.end_token, dtype=np.int64)
        input_ids[:real] = window[:real]
        targets = np.full(S, IGNORE, dtype=np.int64)
        targets[: len(window) - 1] = window[1:]
        targets[inner - 1] = IGNORE
        begins = np.zeros(S, dtype=np.int64)
        for place in (*inner, real):
            begins[place:] = place
        row = (input_ids, np.arange(S) - begins, targets, np.arange(S) < real)
        tensors = [torch.from_numpy(array).unsqueeze(0) for array in row]
        return Batch(input_ids=tensors[0], position_ids=tensors[1], targets=tensors[2], token_mask=tensors[3])


def pack(
    documents: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    sequence_length: int,
    seed: int,
    cache_dir: Path,
) -> PackedRows:
    """Tokenise the column `text` of `documents` and pack it.

    Each document gets the special tokens the tokenizer itself puts before a text (a begin token where
    the model was trained with one) and the end token after it. The tokens stand in a
    memory-mapped file below `cache_dir`, 4 bytes each.

    Raises:
        ModelError: the tokenizer has no end token.
        DataError: no document has a token.
    """
    end_token = tokenizer.eos_token_id
    if not isinstance(end_token, int):
        raise ModelError("the tokenizer has no end token (eos_token): set it in its tokenizer_config.json")
    lengths: list[int] = []
    order = shuffled(len(documents), purpose="documents", seed=seed)
    cache_dir.mkdir(parents=True, exist_ok=True)
    path = cache_dir / f"tokens-{len(list(cache_dir.glob('tokens-*')))}.bin"
    with path.open("xb") as file:
        for texts in documents.select(order).iter(batch_size=64):
            for ids in tokenizer(texts["text"], return_attention_mask=False, verbose=False)["input_ids"]:
                closed = ids if ids[-1:] == [end_token] else [*ids, end_token]
                if len(closed) > 1:
                    np.asarray(closed, dtype=np.int32).tofile(file)
                    lengths.append(len(closed))
    if not lengths:
        raise DataError(f"none of {len(documents)} documents has a token: check the text and the tokenizer")
    tokens = np.memmap(path, dtype=np.int32, mode="r")
    return PackedRows(tokens, lengths=np.asarray(lengths), sequence_length=sequence_length, end_token=end_token)


def shuffled(count: int, *, purpose: Purpose, seed: int, epoch: int = 0) -> NDArray[np.int64]:
    """The numbers 0 to `count` - 1 in an order that `seed`, `epoch` and `purpose` determine together."""
    return np.random.default_rng([get_args(Purpose).index(purpose) + 1, seed, epoch]).permutation(count)


@functools.lru_cache(maxsize=1)
def _row_order(total: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return shuffled(total, purpose="rows", seed=seed, epoch=epoch)


def rows_at(position: int, *, count: int, total: int, seed: int) -> list[int]:
    """The `count` rows, of `total`, that training reads from the global row number `position` on.

    An epoch visits every row once, in an order of its own; where one ends, the next begins, also
    within a batch. A pure function, so that a data position is one number and needs no state.
    """
    rows: list[int] = []
    while len(rows) < count:
        epoch, offset = divmod(position + len(rows), total)
        rows += _row_order(total, seed, epoch)[offset : offset + count - len(rows)].tolist()
    return rows
