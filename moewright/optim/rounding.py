"""Stochastic rounding to bfloat16: up or down by chance, so that small updates count on average."""

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor

DROPPED: Final = 16
"""Bits of a float32 that a bfloat16 does not have."""


def rounded(values: Tensor, generator: torch.Generator) -> Tensor:
    """float32 -> bfloat16 of the same shape: one of the two neighbours, the nearer one the more often.

    A value x between neighbours a < b becomes b with the probability (x - a) / (b - a), so its mean is x
    (arXiv 2010.06192, section 2). What a bfloat16 holds stays as it is, and so does what is not finite.
    """
    noise = torch.randint(0, 1 << DROPPED, values.shape, generator=generator, dtype=torch.int32, device=values.device)
    raised = values.view(torch.int32).add(noise).bitwise_right_shift(DROPPED).bitwise_left_shift(DROPPED)
    return torch.where(values.isfinite(), raised.view(torch.float32), values).to(torch.bfloat16)


def generator_of(seed: int, *place: int | Sequence[int], device: torch.device) -> torch.Generator:
    """Random numbers that follow from `seed` and `place`: whoever holds a copy of a parameter rounds it alike."""
    numbers = [seed, *(number for part in place for number in ([part] if isinstance(part, int) else part))]
    state = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
    return torch.Generator(device=device).manual_seed(state)
