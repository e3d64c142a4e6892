"""Autocast, also on devices that have none (meta), and buffers that no cast of a module shortens."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype that autocast casts this tensor to for a product; None where it is off, and for float64."""
    kind = tensor.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind) and tensor.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return None


def no_autocast(device: torch.device) -> AbstractContextManager[None]:
    """A block in which every operator keeps the dtypes it is given."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def keep_dtypes(module: nn.Module, before: Mapping[str, Tensor | None]) -> None:
    """Give buffers the values back that they had before a cast, on the device where they are now."""
    for name, tensor in before.items():
        now: Tensor | None = getattr(module, name)
        if tensor is not None and now is not None and now.dtype != tensor.dtype:
            setattr(module, name, tensor.to(now.device))
