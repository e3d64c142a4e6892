"""The learning rate of each step: a pure function, so that a resumed run needs no state for it."""

import math
from typing import Literal

Schedule = Literal["cosine", "constant", "wsd"]


def learning_rate(
    step: int, *, peak: float, schedule: Schedule, steps: int, warmup_steps: int, decay_steps: int, min_ratio: float
) -> float:
    """The learning rate of step number `step`, counted from 1 to `steps`.

    It rises in a line to `peak` at step `warmup_steps`. Then
    - constant: `peak` for good;
    - cosine: half a cosine down to `min_ratio * peak` at the last step;
    - wsd (warm-up, stable, decay): `peak`, then in a line over the last `decay_steps` steps
      down to `min_ratio * peak` at the last step.
    """
    assert 1 <= step <= steps
    if step <= warmup_steps:
        return peak * step / warmup_steps
    if schedule == "cosine":
        progress = (step - warmup_steps) / (steps - warmup_steps)
        return peak * (min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))
    if schedule == "wsd":
        progress = max(0.0, (step - (steps - decay_steps)) / decay_steps)
        return peak * (1 - (1 - min_ratio) * progress)
    return peak
