"""The record that gives layers the current batch's mask and loss scale."""

import torch
from torch import Tensor


class RoutingContext:
    """One record a model, shared by its layers; they only read it, also when a block is recomputed.

    `token_mask`: (T,) bool over the flattened batch, True for a real token; None when all are real.
    `loss_scale`: what the auxiliary losses are multiplied with before they join the gradient, 0-dim
    float32. `RoutingStep` sets it to the micro-batch's share of the step's tokens; it stays 1 under
    a trainer that knows nothing of it, whose number of micro-batches then scales these losses.

    A block that is recomputed must read what it read before: run the backward pass of one batch before
    the forward pass of the next.
    """

    def __init__(self) -> None:
        self.token_mask: Tensor | None = None
        self.loss_scale: Tensor = torch.ones(())
