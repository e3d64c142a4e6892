"""The gradient's norm over parameters on two meshes, and clipping with one factor everywhere."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from moewright.parallel.experts import local_part
from moewright.parallel.parts import copy_of
from moewright.parallel.ranks import Ranks


@torch.no_grad()
def clip_gradients(
    parameters: Iterable[nn.Parameter],
    *,
    max_norm: float,
    loss: Tensor,
    ranks: Ranks,
    gradients: Iterable[Tensor] | None = None,
) -> tuple[float, float]:
    """Scale the whole gradient down to `max_norm` (0: leave it) where it is larger; returns loss and norm.

    `loss` is the part of the step's that these rows have, 0-dim. Each element of the gradient counts once, however many
    ranks hold it, and so do the rows; one reduction over the ranks adds up squares and loss. A gradient that is not
    finite has such a norm on all.
    `gradients` are those of the parameters where `grad` does not have them, on whatever device.
    """
    if gradients is None:
        gradients = (parameter.grad for parameter in parameters if parameter.grad is not None)
    gradients = list(gradients)
    if ranks.size == 1:
        mine = [local_part(gradient) for gradient in gradients]
        # A norm of one number is that number.
        whole = nn.utils.get_total_norm([g if _dtype(g) == g.dtype else _norm(g) for g in mine])
        factor = max_norm / (whole + 1e-6)  # as in torch's own function, to the last bit
        if max_norm and factor < 1:
            for gradient in mine:
                _scale(gradient, factor.to(gradient.device))
        return float(loss), float(whole)
    squares = loss.new_zeros((), dtype=torch.float64)
    for gradient in gradients:
        square = _norm(local_part(gradient)).double().square() / copy_of(gradient, ranks)[1]
        squares += square.to(squares.device)
    total, square = ranks.totals(torch.stack([loss.double() / ranks.tp, squares])).tolist()
    norm = math.sqrt(square)
    if max_norm and norm > max_norm:
        for gradient in gradients:
            local_part(gradient).mul_(max_norm / (norm + 1e-6))
    return total, norm


def _dtype(gradient: Tensor) -> torch.dtype:
    """What is computed in: at least float32, since in bfloat16 norm and factor are off by up to 0.4%."""
    return torch.promote_types(gradient.dtype, torch.float32)


def _norm(gradient: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(gradient, dtype=_dtype(gradient))
    return norm


def _scale(gradient: Tensor, factor: Tensor) -> None:
    if _dtype(gradient) == gradient.dtype:
        gradient.mul_(factor)
    else:  # with one dim the factor keeps its dtype
        torch.mul(gradient, factor.reshape(1), out=gradient)
