"""The objective of a run: how a batch is divided and counted, and how its loss is formed.

The loop knows no more of a batch than an `Objective` tells it. Causal language modelling is the one there is.

Letters: B rows, S tokens of a row, V vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional
from transformers import PreTrainedModel

from moewright.backbone.blocks import routing_contexts
from moewright.backbone.head import before_head, logits_map
from moewright.data.pack import IGNORE, Batch
from moewright.train.chunked_loss import chunked_loss

BatchT = TypeVar("BatchT")
Produced = TypeVar("Produced", covariant=True)


class Rows(Protocol[Produced]):
    """Rows of data by number, from which batches are made."""

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int]) -> Produced:
        """The rows `indices` as one batch, on the CPU."""


class Objective(Protocol[BatchT]):
    """The loss that a model learns from, a sum over targets, so that a batch may be divided in any way."""

    def micro_batches(self, batch: BatchT, size: int) -> Iterator[BatchT]:
        """The batch in parts of at most `size` rows, in order, without a copy."""

    def padding(self) -> BatchT:
        """The smallest batch, with nothing real in it: for ranks that have no rows while others have."""

    def targets(self, batch: BatchT) -> int:
        """The number of tokens to be predicted, by which the summed loss is divided."""

    def tokens(self, batch: BatchT) -> Mapping[str, int]:
        """The number of real tokens that each stack of the model reads, by the stack's name."""

    def loss(self, model: PreTrainedModel, batch: BatchT) -> Tensor:
        """Minus the log-probability of all targets together, in nats: 0-dim float32, on the model's device."""


@dataclass(frozen=True, kw_only=True)
class CausalLanguageModel:
    """Predict the next token of each token within its document: `Batch.targets`."""

    dtype: Literal["bfloat16", "float32"]
    """Of the matrix products; logits and loss are float32 either way."""
    chunk_tokens: int = 0
    """Logits of batches with more tokens are computed for so many at a time; 0: whole."""
    device: torch.device | None = None
    """Where the model computes; None: where its parameters are."""

    def micro_batches(self, batch: Batch, size: int) -> Iterator[Batch]:
        return (batch.rows(first, first + size) for first in range(0, len(batch), size))

    def padding(self) -> Batch:
        zero = torch.zeros(1, 1, dtype=torch.int64)
        return Batch(input_ids=zero, position_ids=zero, targets=zero + IGNORE, token_mask=zero.bool())

    def targets(self, batch: Batch) -> int:
        return int((batch.targets != IGNORE).sum())

    def tokens(self, batch: Batch) -> Mapping[str, int]:
        return {"decoder": int(batch.token_mask.sum())}

    def loss(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        # Without a mask all tokens are real, which saves the layers many small operations; asked here, on the CPU.
        padded = batch.padded
        device = self.device or model.device
        batch = batch.to(device)
        inputs: dict[str, Any] = {"input_ids": batch.input_ids, "position_ids": batch.position_ids}
        inputs |= {"token_mask": batch.token_mask} if padded and routing_contexts(model) else {}
        inputs["use_cache"] = False  # with one, transformers would let packed documents see each other
        targets_N = batch.targets.flatten()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.dtype == "bfloat16"):
            if self.chunk_tokens and len(targets_N) > self.chunk_tokens:
                return before_head(model, partial(self._in_chunks, model, targets_N), **inputs)
            logits_BSV = model(**inputs).logits
        return _whole_loss(logits_BSV, targets_N)

    def _in_chunks(self, model: PreTrainedModel, targets_N: Tensor, hidden_BSD: Tensor, head: nn.Module) -> Tensor:
        hidden_ND, logits_of = hidden_BSD.flatten(0, 1), logits_map(model)
        if isinstance(head.weight, DTensor):  # sliced by rows of the vocabulary: its forward knows how to go on
            return _whole_loss(logits_of(head(hidden_ND)), targets_N)
        assert isinstance(head, nn.Linear)
        options: dict[str, Any] = {"chunk": self.chunk_tokens, "ignored": IGNORE, "logits_of": logits_of}
        return chunked_loss(hidden_ND, head.weight, head.bias, targets_N, **options)


def _whole_loss(logits: Tensor, targets_N: Tensor) -> Tensor:
    logits_NV = logits.flatten(0, -2).to(torch.promote_types(logits.dtype, torch.float32))
    return functional.cross_entropy(logits_NV, targets_N, ignore_index=IGNORE, reduction="sum")
