"""The generators of random numbers of a process: of torch, CUDA, Python and NumPy."""

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def seed(seed: int) -> None:
    """Begin anew with all of them."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def states(device: torch.device) -> dict[str, Tensor]:
    """Their states, a vector each, of the same length on every process; CUDA's if that is where it computes."""
    _, words, gauss = random.getstate()
    numpy = np.random.get_state(legacy=False)
    assert isinstance(numpy, dict)
    found = packed(words, gauss, numpy) | {"torch": torch.get_rng_state()}
    if device.type == "cuda":  # elsewhere the question alone would take memory on a GPU
        found["cuda"] = torch.cuda.get_rng_state(device)
    return found


def packed(words: Sequence[int], gauss: float | None, numpy: Mapping[str, Any]) -> dict[str, Tensor]:
    """The states of Python's and NumPy's generators as vectors."""
    key, position = numpy["state"]["key"], numpy["state"]["pos"]
    # Whole numbers below 2^32 and one float64 each: exact in float64.
    return {
        "python": torch.tensor([*words, math.inf if gauss is None else gauss], dtype=torch.float64),
        "numpy": torch.tensor([*map(int, key), position, numpy["has_gauss"], numpy["gauss"]], dtype=torch.float64),
    }


def restore(found: dict[str, Tensor]) -> None:
    """Go on from `states`; a generator that has none stays as it is."""
    if "torch" in found:
        torch.set_rng_state(found["torch"])
    if "cuda" in found and torch.cuda.is_initialized():  # a process that computes there has its model there by now
        torch.cuda.set_rng_state(found["cuda"])
    if "python" in found:
        *words, gauss = found["python"].tolist()
        random.setstate((3, tuple(map(int, words)), None if math.isinf(gauss) else gauss))
    if "numpy" in found:
        *key, position, has_gauss, gauss = found["numpy"].tolist()
        np.random.set_state(("MT19937", np.array(key, dtype=np.uint32), int(position), int(has_gauss), gauss))
