"""The objective of a run: how a batch is divided and counted, and how its loss is formed.

The loop knows no more of a batch than an `Objective` tells it. Causal language modelling is the one there is.

Letters: B rows, S tokens of a row, V vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from moewright.backbone.blocks import routing_contexts
from moewright.data.pack import IGNORE, Batch

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
        batch = batch.to(model.device)
        mask = {"token_mask": batch.token_mask} if padded and routing_contexts(model) else {}
        with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=self.dtype == "bfloat16"):
            # No cache: with one, transformers would let packed documents see each other.
            logits_BSV = model(
                input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **mask
            ).logits
        return functional.cross_entropy(
            logits_BSV.flatten(0, 1).float(), batch.targets.flatten(), ignore_index=IGNORE, reduction="sum"
        )
