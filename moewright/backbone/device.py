"""The device that a setting names."""

import torch

from moewright.errors import UsageError


def device_of(device: str, *, name: str = "train.device") -> torch.device:
    """The device that `auto`, `cpu` or `cuda` stands for; UsageError when a GPU is asked for and there is none."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"{name} = cuda, but torch finds no GPU: use auto or cpu")
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)
