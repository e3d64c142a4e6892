"""A plan: what each rank, host and step needs, and whether it fits."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any, Final

from transformers import PreTrainedModel

from moewright.parallel.config import Degrees
from moewright.plan.devices import Devices, Recompute, Workload
from moewright.plan.flops import Speed, speed
from moewright.plan.layouts import Choice, Passing, choice, first_change, search
from moewright.plan.ledger import COMPONENTS
from moewright.plan.memory import Memory, held, placed, unit_of
from moewright.plan.simulate import Simulated, simulate
from moewright.plan.sizes import Sizes, facts_of, sizes_of
from moewright.plan.units import written

SHOWN: Final = 10
"""Layouts that a search lists."""
CHECKED: Final = 3
"""How many of these are simulated."""


def plan(
    model: PreTrainedModel,
    degrees: Degrees,
    work: Workload,
    devices: Devices,
    *,
    skew: float = 2.0,
    searching: bool = False,
    asked: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The facts of a plan, in plain types; the names of the first two levels stay.

    `skew` is the load of the busiest rank of an `ep` axis over the mean, for which there must be room. `searching` adds
    the layouts that fit, by their times; `asked` are settings that these must have.
    """
    sizes, passing = sizes_of(model), passing_of(model, work)
    by_formula = choice(sizes, degrees, work, devices, passing=passing, skew=skew)
    balanced = simulate(model, degrees, work)
    skewed = simulate(model, degrees, work, skew=skew) if degrees.ep * degrees.etp > 1 else balanced
    memories = [_placed(one, sizes, degrees, work) for one in (balanced, skewed)]
    outside = sum(memories[1].host.values()) + sum(memories[1].disk.values())
    timed = speed(sizes, degrees, work, devices, outside=outside, traffic=balanced.traffic)
    fits = memories[1].fits(devices)
    facts: dict[str, Any] = {
        "fits": fits,
        "change": "" if fits else first_change(sizes, degrees, work, devices, passing=passing, skew=skew),
        "model": facts_of(sizes),
        "layout": {"name": degrees.layout, "devices": degrees.ranks} | by_formula.settings,
        "device": _room(memories[1].needed(devices), devices.memory)
        | {"tensors": sum(memories[1].device.values()), "process": devices.process, "slack": devices.slack},
        "host": _room(memories[1].host_needed(devices), devices.host_memory) | {"devices": devices.on_host},
        "disk": {"needed": memories[1].disk_needed(devices)},
        "memory": _rows(memories, by_formula.memory),
        "step": _step(timed, work, degrees, devices),
        "traffic": [
            {
                "axis": axis,
                "bytes": int(balanced.traffic[axis]),
                "formula": int(count),
                "seconds": timed.seconds[axis],
            }
            for axis, count in by_formula.speed.sent.items()
        ],
        "notes": _notes(sizes, degrees, work, memories, by_formula.memory, devices),
    }
    if searching:
        facts["layouts"] = found(model, work, devices, sizes=sizes, passing=passing, skew=skew, asked=asked)
    return facts


def passing_of(model: PreTrainedModel, work: Workload) -> Passing:
    """What a micro-batch holds on a rank of its own, by recomputation: counted, each once and when it is asked for."""
    one = replace(work, rows=work.share(1)[0])  # one micro-batch

    @cache
    def passing(recompute: Recompute) -> Mapping[str, int]:
        return simulate(model, Degrees(), replace(one, recompute=recompute)).passing

    return passing


def _placed(simulated: Simulated, sizes: Sizes, degrees: Degrees, work: Workload) -> Memory:
    return placed(simulated.peak, work, held=held(sizes, degrees)[1], unit=unit_of(sizes, degrees))


def _room(needed: int, there: int | None) -> dict[str, Any]:
    return {"memory": there, "needed": needed, "free": None if there is None else there - needed}


def _rows(memories: list[Memory], by_formula: Memory) -> list[dict[str, Any]]:
    """Bytes of a rank by place and component."""
    rows = []
    for place in ("device", "host", "disk"):
        balanced, skewed = (getattr(memory, place) for memory in memories)
        for name in COMPONENTS if place == "device" else balanced:
            numbers = (balanced[name], skewed[name], getattr(by_formula, place)[name])
            if place == "device" or any(numbers):
                row = dict(zip(("balanced", "skewed", "formula"), numbers, strict=True))
                rows.append({"place": place, "component": name} | row)
    return rows


def _step(timed: Speed, work: Workload, degrees: Degrees, devices: Devices) -> dict[str, Any]:
    return {
        "tokens": work.tokens,
        "micro_batches": work.share(degrees.ranks // degrees.tp)[1],
        "flops": timed.flops,
        "flops_per_device": timed.flops / devices.number,
        "seconds": timed.total,
        "tokens_per_second": work.tokens / timed.total,
        **{f"seconds_{name}": value for name, value in timed.seconds.items()},
    }


def _notes(
    sizes: Sizes, degrees: Degrees, work: Workload, memories: list[Memory], by_formula: Memory, devices: Devices
) -> list[str]:
    notes = []
    if degrees.zero and sizes.sparse and degrees.expert_fsdp == 1 and degrees.ranks > 1:
        notes.append(
            "ZeRO gives the experts nothing here: ep * etp is all ranks of a copy, so each part of an expert is on one "
            "of them; only more ranks or offload make their states smaller"
        )
    size, count = work.share(degrees.ranks // degrees.tp)
    if size * count * (degrees.ranks // degrees.tp) > work.rows:
        notes.append(f"the {work.rows} rows of a step do not fill all ranks equally: some wait")
    simulated, said = (sum(memory.device.values()) for memory in (memories[1], by_formula))
    if abs(simulated - said) > 0.1 * simulated:
        notes.append(
            f"the formula says {written(said)} where the simulated step has {written(simulated)}: the latter is the "
            "model's own, and counts"
        )
    if devices.host_memory is None and work.offload != "none":
        notes.append("nothing is known of the host's memory: give --host-memory")
    return notes


def found(
    model: PreTrainedModel,
    work: Workload,
    devices: Devices,
    *,
    sizes: Sizes,
    passing: Passing,
    skew: float,
    asked: Mapping[str, Any] | None,
) -> list[dict[str, Any]]:
    """The quickest layouts that fit; the first few are simulated, and left out where that says otherwise."""
    rows: list[dict[str, Any]] = []
    for one in search(sizes, work, devices, passing=passing, skew=skew, asked=asked):
        checked = None
        if len(rows) < CHECKED:
            memory = _placed(simulate(model, one.degrees, one.work, skew=skew), sizes, one.degrees, one.work)
            if not memory.fits(devices):
                continue
            checked = memory.needed(devices)
        rows.append(_row(one, devices, checked))
        if len(rows) == SHOWN:
            break
    return rows


def _row(one: Choice, devices: Devices, checked: int | None) -> dict[str, Any]:
    return {
        "name": one.degrees.layout,
        **{"dp_replicate": 1} | one.settings,
        "seconds": one.speed.total,
        "needed": checked,
        "formula": one.memory.needed(devices),
    }


def for_people(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The same, with bytes in their units and times in seconds of few digits."""
    shown = dict(facts)
    if facts["fits"]:
        del shown["change"]
    for place in ("device", "host", "disk"):
        sizes = ("memory", "needed", "free", "tensors", "process")
        shown[place] = {
            name: written(value) if name in sizes and value is not None else value
            for name, value in facts[place].items()
        }
    shown["memory"] = [
        row | {name: written(row[name]) for name in ("balanced", "skewed", "formula")} for row in facts["memory"]
    ]
    shown["traffic"] = [row | {name: written(row[name]) for name in ("bytes", "formula")} for row in facts["traffic"]]
    if "layouts" in facts:
        shown["layouts"] = [
            row | {name: None if row[name] is None else written(row[name]) for name in ("needed", "formula")}
            for row in facts["layouts"]
        ]
    return shown
