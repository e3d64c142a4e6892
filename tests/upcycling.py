"""What tests of upcycling share."""

import torch
from torch import Tensor


def complete(neurons_EF: Tensor, *, granularity: int, width: int, shared_S: Tensor | None = None) -> bool:
    """Whether each virtual group, with the shared expert's neurons if there are any, holds each neuron once."""
    groups = neurons_EF.reshape(-1, granularity * neurons_EF.shape[1])
    if shared_S is not None:
        groups = torch.cat((groups, shared_S.expand(len(groups), -1)), dim=1)
    due = torch.arange(width).expand(len(groups), -1)
    return groups.shape == due.shape and torch.equal(groups.sort(dim=1).values, due)
