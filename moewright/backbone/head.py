"""The end of a decoder: from hidden states to logits, by the family's row."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moewright.family.table import family_of

T = TypeVar("T")


def logits_map(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """What a decoder does to the products of its head before they are logits, element by element."""
    family, config = family_of(model.config), model.config
    divisor = getattr(config, family.logits_divisor) if family.logits_divisor else 1.0
    cap = getattr(config, family.logits_softcap) if family.logits_softcap else None

    def mapped(products: Tensor) -> Tensor:
        logits = products if divisor == 1 else products / divisor
        return logits if cap is None else torch.tanh(logits / cap) * cap

    return mapped


def before_head(model: PreTrainedModel, use: Callable[[Tensor, nn.Module], T], **inputs: Any) -> T:
    """What `use(hidden_states, head)` makes of a decoder's last hidden states (B, S, D) and its head.

    It is called within the call of the model: only there are parameters whole that belong to the sharded model itself.
    """

    def forward(**inputs: Any) -> T:
        return use(model.base_model(**inputs).last_hidden_state, model.get_output_embeddings())

    model.__dict__["forward"] = forward
    try:
        result: T = model(**inputs)
    finally:
        del model.__dict__["forward"]
    return result
