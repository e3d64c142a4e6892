"""How much a neuron of the dense block matters to the loss."""

from collections.abc import Mapping

import torch
from torch import Tensor

from moewright.upcycle.methods import neuron_dim


def batch_importance(weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> Tensor:
    """|sum of weight times gradient| over all weights of a neuron, for one batch: (W,) float64.

    The importance of MoEBERT (arXiv 2204.07675) is the sum over the data of
    |w1_j . dL/dw1_j + w2_j . dL/dw2_j|: the first-order change of the loss if neuron j were left out. Add up
    what this returns over batches: the absolute value is of each batch, so a batch of one sample, with the loss of that
    sample, gives the paper's score, and larger batches let samples of opposite sign cancel. It is not the
    same as one absolute value for each matrix, or one of gradients added up over all data.

    By part: `gate` and `up`, (W, D), `down`, (D, W), and the biases `gate_bias` and `up_bias`, (W,), whichever the
    block has: gate and biases are weights of the neuron like the others (the paper's blocks have no gate, and its
    formula no bias). `down_bias` belongs to no neuron.
    """
    assert weights, "a block without weights"
    return (
        torch.stack(
            [first_order(part, weight, gradients[part]) for part, weight in weights.items() if part != "down_bias"]
        )
        .sum(dim=0)
        .abs()
    )


def first_order(part: str, weight: Tensor, gradient: Tensor) -> Tensor:
    """The sum of weight times gradient over each neuron's share of one part: (W,) float64, with its sign."""
    # In float32 at least: the products of 16-bit weights and gradients may be below what 16 bits can hold.
    wide = torch.promote_types(weight.dtype, torch.float32)
    product = weight.detach().to(wide) * gradient.to(wide)
    if product.dim() > 1:
        product = product.sum(dim=1 - neuron_dim(part), dtype=torch.float64)
    return product.double()
