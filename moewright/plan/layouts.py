"""Which layouts a number of devices allows, which of them fit, and which takes the least time."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Final

from moewright.parallel.config import Degrees
from moewright.plan.devices import Devices, Offload, Recompute, Workload
from moewright.plan.flops import Speed, speed
from moewright.plan.memory import Memory, formula
from moewright.plan.sizes import Sizes

Passing = Callable[[Recompute], Mapping[str, int]]
"""What a micro-batch holds on a rank of its own, by what is computed again."""
RECOMPUTED: Final[tuple[Recompute, ...]] = ("none", "experts", "block")
OFFLOADS: Final[tuple[Offload, ...]] = ("none", "optimizer", "experts", "all")
DEGREES: Final = ("tp", "ep", "etp", "dp_replicate", "zero")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A layout with what it needs by formula."""

    degrees: Degrees
    work: Workload
    memory: Memory
    speed: Speed

    @property
    def settings(self) -> dict[str, Any]:
        """Its `[parallel]` table."""
        degrees = {name: getattr(self.degrees, name) for name in DEGREES if name != "dp_replicate" or self.degrees.zero}
        return degrees | {"offload": self.work.offload, "recompute": self.work.recompute}

    @property
    def order(self) -> tuple[float, ...]:
        """The quicker the better, and of equally quick ones that which needs less."""
        return self.speed.total, sum(self.memory.device.values())


def choice(
    sizes: Sizes, degrees: Degrees, work: Workload, devices: Devices, *, passing: Passing, skew: float
) -> Choice:
    """A layout, by formula."""
    memory = formula(sizes, degrees, work, passing=passing(work.recompute), skew=skew)
    outside = sum(memory.host.values()) + sum(memory.disk.values())
    return Choice(
        degrees=degrees,
        work=work,
        memory=memory,
        speed=speed(sizes, degrees, work, devices, outside=outside),
    )


def all_degrees(sizes: Sizes, devices: Devices) -> Iterator[Degrees]:
    """Every layout on these devices, with slices within a host."""
    ranks = devices.number
    divisors = [n for n in range(1, ranks + 1) if ranks % n == 0]
    within = [n for n in divisors if n <= devices.on_host]
    sliced = math.gcd(*sizes.divisors.values()) if sizes.divisors else 1
    tps = [n for n in within if sliced % n == 0]
    etps = [n for n in within if sizes.widths % n == 0] if sizes.sparse else [1]
    eps = [n for n in divisors if sizes.most_experts % n == 0] if sizes.sparse else [1]
    for tp, etp, ep, zero in product(tps, etps, eps, range(4)):
        data = ranks // tp
        copies = [n for n in divisors if (n < data and data % n == 0) or n == 1] if zero else [data]
        for dp_replicate in copies:
            shards = ranks // dp_replicate if zero else ranks
            if shards % (ep * etp) == 0:
                yield Degrees(ranks=ranks, tp=tp, ep=ep, etp=etp, dp_replicate=dp_replicate, zero=zero)


def search(
    sizes: Sizes,
    work: Workload,
    devices: Devices,
    *,
    passing: Passing,
    skew: float,
    asked: Mapping[str, Any] | None = None,
    offloads: tuple[Offload, ...] = OFFLOADS,
) -> list[Choice]:
    """The layouts that fit by formula, the quickest first.

    `asked` are settings of `Choice.settings` that are given.
    """
    found = []
    for degrees, offload, recompute in product(all_degrees(sizes, devices), offloads, RECOMPUTED):
        if "experts" in (offload, recompute) and not sizes.sparse:
            continue
        changed = replace(work, offload=offload, recompute=recompute)
        one = choice(sizes, degrees, changed, devices, passing=passing, skew=skew)
        if all(one.settings.get(name) == value for name, value in (asked or {}).items()) and one.memory.fits(devices):
            found.append(one)
    return sorted(found, key=lambda one: one.order)


def first_change(
    sizes: Sizes, degrees: Degrees, work: Workload, devices: Devices, *, passing: Passing, skew: float
) -> str:
    """The first thing to change of a layout that does not fit: a setting that is enough, or what is."""
    now = choice(sizes, degrees, work, devices, passing=passing, skew=skew).settings
    ways = search(sizes, work, devices, passing=passing, skew=skew)
    for kept in range(len(now) - 1, -1, -1):  # the layout that changes the fewest settings
        near = [one for one in ways if sum(one.settings.get(name) == value for name, value in now.items()) >= kept]
        if near:
            changes = {name: value for name, value in near[0].settings.items() if now.get(name) != value}
            return "set " + ", ".join(f"parallel.{name} = {json.dumps(value)}" for name, value in changes.items())
    if work.micro_rows > 1:
        return f"set train.micro_batch_size = 1, in place of {work.micro_rows}, and plan again"
    for factor in (2, 4, 8, 16, 32, 64):
        more = replace(devices, number=devices.number * factor)
        if search(sizes, work, more, passing=passing, skew=skew):
            return f"no layout fits: take {more.number} devices, or ones with more memory"
    return "no layout fits, nor on 64 times as many devices: take ones with more memory, or a smaller model"
