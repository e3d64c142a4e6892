"""Computing activations again in the backward pass instead of keeping them."""

from typing import Literal

from transformers import PreTrainedModel


def recompute(model: PreTrainedModel, what: Literal["none", "experts", "block"]) -> None:
    """Have the backward pass compute this part of each block again; before the model is sharded."""
    assert what != "experts", "not there yet"
    if what == "block":
        # The first is the name since transformers 5.23 or a little earlier, the second goes away in 6.
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
