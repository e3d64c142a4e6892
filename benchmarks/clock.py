"""Where the time of a training step goes: wall time, CPU time and page faults, part by part.

Nothing in the step knows of it: the methods that a step calls on the objects it is given are replaced by ones that look
at the clock before and after. What passes between two looks belongs to one part.
"""

import resource
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Spent(NamedTuple):
    """What a part took."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    """Of all threads, in the process and in the system on its behalf."""
    system_seconds: float = 0.0
    """Of these, in the system: mostly page faults."""
    faults: int = 0
    """Pages that the system had to provide, 4 KiB or 2 MiB each."""

    def plus(self, other: "Spent") -> "Spent":
        return Spent(*(a + b for a, b in zip(self, other, strict=True)))

    def minus(self, other: "Spent") -> "Spent":
        return Spent(*(a - b for a, b in zip(self, other, strict=True)))


def now() -> Spent:
    """What the process took since it began."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return Spent(time.perf_counter(), used.ru_utime + used.ru_stime, used.ru_stime, used.ru_minflt)


class Clock:
    """The parts of one step after another; `begin` forgets what was before."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        self.parts: dict[str, Spent] = defaultdict(Spent)
        self.last = now()

    def look(self, part: str) -> None:
        """What passed since the last look belongs to `part`."""
        this = now()
        self.parts[part] = self.parts[part].plus(this.minus(self.last))
        self.last = this

    def total(self) -> Spent:
        total = Spent()
        for spent in self.parts.values():
            total = total.plus(spent)
        return total

    def watch(self, thing: object, method: str, *, before: str, after: str) -> None:
        """From now on a call of `thing.method` ends the part `before` and makes up the part `after`."""
        call: Callable[..., Any] = getattr(thing, method)

        def watched(*args: Any, **kwargs: Any) -> Any:
            self.look(before)
            result = call(*args, **kwargs)
            self.look(after)
            return result

        object.__setattr__(thing, method, watched)  # modules and frozen dataclasses have rules of their own

    def watch_update(self, optimizer: torch.optim.Optimizer, *, before: str, after: str) -> None:
        """The same for the optimiser's step, which others must recognise as it is."""
        optimizer.register_step_pre_hook(lambda *_: self.look(before))
        optimizer.register_step_post_hook(lambda *_: self.look(after))
