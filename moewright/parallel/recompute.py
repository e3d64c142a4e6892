"""Computing activations again in the backward pass instead of keeping them."""

from typing import Literal

from transformers import PreTrainedModel

from moewright.backbone.blocks import moe_layers


def recompute(model: PreTrainedModel, what: Literal["none", "experts", "block"]) -> None:
    """Have the backward pass compute this part of each block again; before the model is sharded.

    `experts`: their products alone. Router, losses, statistics and the way of tokens to other ranks and back, on which
    all ranks wait for one another, happen once. `block`: all of it, the all-to-alls too, in the same order everywhere.
    """
    if what == "experts":
        for layer in moe_layers(model).values():
            layer.experts.recomputed = True
    elif what == "block":
        # The first is the name since transformers 5.23 or a little earlier, the second goes away in 6.
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
