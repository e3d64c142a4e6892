"""The long text of the proof: past a sliding window, or past the length from which on rotary positions are scaled."""

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moewright.backbone.skeleton import longest_text

BEYOND: Final = 32
"""How many tokens more than a window, or than the original length, the text has."""
LONGEST: Final = 4608
"""The longest text that is compared: a window of 4096 and a few, which still runs on a laptop."""
EVERY: Final = 64
"""Of a long text, the logits of each so-manieth token are compared, and of the last so many."""


@dataclass(frozen=True)
class LongText:
    """How long a text must be to show what a model does with long ones."""

    length: int | None
    """Tokens; None where the short texts show all, or where more than `LONGEST` would be needed."""
    limit: int
    """From this token on it shows something."""
    unseen: tuple[str, ...]
    """Properties that need more than `LONGEST`."""

    @classmethod
    def of(cls, model: PreTrainedModel, *, short: int) -> "LongText":
        """For a model whose other texts have up to `short` tokens."""
        most, length, last, unseen = longest_text(model), None, 0, []
        for what, limit in sorted(_limits(model.config), key=lambda entry: entry[1]):
            needed = min(limit + BEYOND, most)
            if limit >= most or needed <= short:
                continue
            if needed <= LONGEST:
                length, last = needed, limit
            else:
                unseen.append(f"{what} beyond {limit} tokens: texts of more than {LONGEST} are not compared")
        return cls(length, last, tuple(unseen))

    def positions(self) -> Tensor:
        """The tokens (S',), int64, whose logits are compared; all would be gigabytes for a large vocabulary."""
        assert self.length is not None
        at_S = torch.arange(self.length)
        return at_S[(at_S % EVERY == 0) | (at_S >= self.length - EVERY)]


def _limits(config: Any) -> list[tuple[str, int]]:
    """From how many tokens on a model of this config computes something else, and what."""
    limits = []
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if window is not None and (kinds is None or "sliding_attention" in kinds):
        limits.append(("the sliding window", int(window)))
    rope = getattr(config, "rope_parameters", None) or {}
    for settings in [rope, *(inner for inner in rope.values() if isinstance(inner, dict))]:  # one for each layer type
        if original := settings.get("original_max_position_embeddings"):
            limits.append(("the rotary scaling", int(original)))
    return limits
