"""The text of a distillation: rows to learn from, and rows to measure on."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from moewright.data.documents import read_documents
from moewright.data.pack import Batch, PackedRows, pack, rows_at
from moewright.data.texts import expand
from moewright.data.tokenizer import load_tokenizer
from moewright.distil.config import DistilConfig
from moewright.errors import DataError, UsageError


class Rows(NamedTuple):
    """Some rows of a text, S tokens each."""

    packed: PackedRows
    numbers: range

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """All rows in order; the last batch may be smaller."""
        for first in range(0, len(self.numbers), batch_size):
            yield self.packed.batch(self.numbers[first : first + batch_size])

    def batch_of_step(self, step: int, config: DistilConfig) -> Batch:
        """The rows that step number `step`, counted from 1, learns from: each once before any is read again."""
        position, total = (step - 1) * config.batch_size, len(self.numbers)
        drawn = rows_at(position, count=config.batch_size, total=total, seed=config.seed)
        return self.packed.batch([self.numbers[index] for index in drawn])

    @property
    def tokens(self) -> int:
        """The number of real tokens."""
        S = self.packed.sequence_length
        return min(self.numbers.stop * S, len(self.packed.tokens)) - self.numbers.start * S

    def documents(self) -> Iterator[Tensor]:
        """The documents, or parts of them, that stand in the rows: token ids, int64 (N,)."""
        for batch in self.batches(1):
            starts = (batch.position_ids[0] == 0).nonzero().flatten()[1:]
            parts = (tensor[0].tensor_split(starts) for tensor in (batch.input_ids, batch.token_mask))
            yield from (ids for ids, real in zip(*parts, strict=True) if bool(real.all()))


def read_rows(
    folder: Path,
    config: DistilConfig,
    *,
    vocabulary: int,
    text: Sequence[str],
    verify_text: Sequence[str],
    cache_dir: Path,
) -> tuple[Rows, Rows]:
    """The rows to learn from, and those to measure on: of `verify_text`, or else the end of `text`.

    The tokenizer is that of the model in `folder`, whose embedding has `vocabulary` rows.

    Raises `UsageError` for a file in both, and `DataError` for less text than a batch takes.
    """
    if verify_text and (twice := {p.resolve() for p in expand(text)} & {p.resolve() for p in expand(verify_text)}):
        raise UsageError(f"{min(twice)} is in both `text` and `verify_text`: hold out another text")
    tokenizer = load_tokenizer(folder, vocabulary=vocabulary)

    def packed(files: Sequence[str]) -> PackedRows:
        documents, S = read_documents(files, cache_dir=cache_dir), config.sequence_length
        return pack(documents, tokenizer, sequence_length=S, seed=config.seed, cache_dir=cache_dir)

    rows, wanted = packed(text), -(-config.held_out_tokens // config.sequence_length)
    if verify_text:
        other = packed(verify_text)
        learned, held_out = Rows(rows, range(len(rows))), Rows(other, range(min(wanted, len(other))))
    else:
        last = max(0, len(rows) - wanted)
        learned, held_out = Rows(rows, range(last)), Rows(rows, range(last, len(rows)))
    if len(learned.numbers) < config.batch_size:
        needed = (config.batch_size + (0 if verify_text else wanted)) * config.sequence_length
        raise DataError(
            f"the text has {len(rows.tokens)} tokens, where a batch{'' if verify_text else ' and the held-out rows'} "
            f"take {needed}: give more text, or a smaller batch_size, sequence_length or held_out_tokens"
        )
    return learned, held_out
