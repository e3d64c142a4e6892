"""How a model is divided among ranks: the `[parallel]` table, and its degrees for a number of ranks."""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal, get_args

from moewright.errors import UsageError

Offloaded = Literal["none", "optimizer", "experts", "all"]
Outside = Literal["cpu", "disk"]
Recomputed = Literal["none", "experts", "block"]

LAYOUTS: Final = {"E": 0, "E+D": 0, "E+Z": 2, "E+D+M": 0, "E+D+Z": 2, "E+Z-Off+M": 2}
"""The layouts of the paper (arXiv 2109.10465), with the ZeRO stage that each has by default."""


def require_choice(name: str, value: object, kind: object) -> None:
    """UsageError unless the value of a setting is one of a `Literal`."""
    if value not in get_args(kind):
        raise UsageError(f"{name}={value}: choose one of {', '.join(map(str, get_args(kind)))}")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """The `[parallel]` table: how a run is divided among its ranks, and what it keeps where."""

    layout: str | None = None
    """E (experts over all ranks), E+D (over some, and copies of these), E+Z and E+D+Z (the same, with ZeRO), E+D+M (E+D
    with tensor slicing), E+Z-Off+M (ZeRO, offload and tensor slicing)."""

    ep: int | None = None
    """Ranks among which the experts of a layer are divided; by default all, or the most that divide E with +D or +M."""

    etp: int | None = None
    """Ranks among which the width of each expert is divided, beside `ep`; by default 1."""

    tp: int | None = None
    """Ranks among which the dense parts are sliced, and which have the same text; by default 1, and with +M the most
    that divide attention heads and widths."""

    dp_replicate: int | None = None
    """With ZeRO: copies of the whole model, each of them sharded over the ranks that it has; by default 1."""

    fsdp: int | None = None
    """With ZeRO: ranks over which a copy of the dense parts is sharded; by default all that the others leave."""

    zero: int | None = None
    """ZeRO stage: 0 shards nothing, 1 optimiser states, 2 gradients too, 3 parameters too; by default 2 with +Z."""

    offload: Offloaded | None = None
    """What is kept outside of the device: optimiser states; or of the experts, or of all, weights and gradients too; by
    default none, and with E+Z-Off+M optimizer."""

    offload_to: Outside = "cpu"
    """Where: in the host's memory, or in files in `offload_folder`."""

    offload_folder: str = ""
    """For disk: a folder, best on a fast disk of each machine's own; it needs room and holds nothing afterwards."""

    recompute: Recomputed = "none"
    """What the backward pass computes again instead of keeping it: the experts' hidden states, or all of each block."""

    def __post_init__(self) -> None:
        if self.layout is not None and self.layout not in LAYOUTS:
            raise UsageError(f"layout={self.layout}: choose one of {', '.join(LAYOUTS)}")
        for name in ("ep", "etp", "tp", "dp_replicate", "fsdp"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UsageError(f"{name}={value}: it must be at least 1")
        if self.zero not in (None, 0, 1, 2, 3):
            raise UsageError(f"zero={self.zero}: choose one of 0, 1, 2, 3")
        if self.offload is not None:
            require_choice("offload", self.offload, Offloaded)
        require_choice("offload_to", self.offload_to, Outside)
        require_choice("recompute", self.recompute, Recomputed)
        if self.offload_to == "disk" and not self.offload_folder:
            raise UsageError("offload_to=disk without offload_folder: name a folder with room for it")
        if self.offload_folder and self.offload_to != "disk":
            raise UsageError(f"offload_folder={self.offload_folder} with offload_to=cpu: set offload_to=disk")
        if self.offload_to == "disk" and self.offloaded == "none":
            raise UsageError("offload_to=disk with offload=none: choose one of optimizer, experts, all")
        if self.layout == "E+Z-Off+M" and self.offloaded == "none":
            raise UsageError("offload=none with layout=E+Z-Off+M: choose one of optimizer, experts, all")
        if self.layout is not None and (other := self._contradicted(self.layout)):
            raise UsageError(f"{other}, or leave one of them out")
        for name in ("dp_replicate", "fsdp"):
            if (value := getattr(self, name)) is not None and not self.stage:
                raise UsageError(
                    f"{name}={value} with zero=0: every rank has all dense parts then, or its slice; leave it out"
                )

    def _contradicted(self, layout: str) -> str | None:
        """What contradicts the layout, and what to choose."""
        slices = layout.endswith("+M")
        if layout == "E+Z-Off+M":
            if self.zero in (0, 1):
                return f"zero={self.zero} with layout={layout}: choose zero=2 or zero=3"
        elif self.zero is not None and bool(LAYOUTS[layout]) != bool(self.zero):
            other = "E+Z-Off+M" if slices else layout.removesuffix("+Z") if layout.endswith("+Z") else f"{layout}+Z"
            return f"zero={self.zero} with layout={layout}: choose layout={other}"
        if not slices and (self.tp or 1) > 1:
            other = "E+Z-Off+M" if LAYOUTS[layout] else "E+D+M"
            return f"tp={self.tp} with layout={layout}: choose layout={other}"
        if layout == "E+D+M" and self.tp == 1:
            return f"tp=1 with layout={layout}: choose layout=E+D"
        return None

    @property
    def stage(self) -> int:
        """The ZeRO stage."""
        return LAYOUTS[self.layout or "E+D"] if self.zero is None else self.zero

    @property
    def offloaded(self) -> Offloaded:
        """What is kept outside of the device."""
        return self.offload or ("optimizer" if self.layout == "E+Z-Off+M" else "none")

    @property
    def slices(self) -> bool:
        """Whether the layout asks for tensor slicing."""
        return self.layout is not None and self.layout.endswith("+M")


@dataclass(frozen=True, kw_only=True)
class Degrees:
    """The sizes of the meshes. Ranks are the same in both; neighbours are those of `tp`, and those of `ep` and `etp`.

    Dense parts: `dp_replicate` copies, each sharded over `fsdp` ranks, each of which has its slice on `tp` ranks.
    Experts: `expert_replicate` copies, each divided among `ep` ranks, and the experts of each of these sharded over
    `expert_fsdp` ranks, each of which has its slice of them on `etp` ranks. So the number of ranks is
    `dp_replicate * fsdp * tp`, and `expert_replicate * expert_fsdp * ep * etp`.
    """

    ranks: int = 1
    tp: int = 1
    ep: int = 1
    etp: int = 1
    dp_replicate: int = 1
    zero: int = 0

    @property
    def fsdp(self) -> int:
        """Ranks over which one copy of the dense parts, or of a slice of them, is sharded."""
        return self.ranks // (self.dp_replicate * self.tp)

    @property
    def expert_fsdp(self) -> int:
        """Ranks over which the experts of one `ep` rank, or a slice of them, are sharded."""
        return self.ranks // (self.dp_replicate * self.ep * self.etp) if self.zero else 1

    @property
    def expert_replicate(self) -> int:
        """Copies of the experts."""
        return self.ranks // (self.ep * self.etp * self.expert_fsdp)

    @property
    def layout(self) -> str:
        """The name of the layout; the paper has none for ZeRO with tensor slicing and without offload."""
        if self.tp > 1 and not self.zero:
            return "E+D+M"
        name = ("E" if self.ep * self.etp == self.ranks else "E+D") + ("+Z" if self.zero else "")
        return f"{name}+M" if self.tp > 1 else name


def resolve(
    config: ParallelConfig | None,
    *,
    ranks: int,
    experts: Collection[int],
    widths: Collection[int] = (),
    sliced: Mapping[str, int] | None = None,
) -> Degrees:
    """The degrees for so many ranks and a model whose layers have these numbers of experts; none for a dense model.

    `widths` are those of the experts, which `etp` must divide; `sliced` the sizes that `tp` must divide, by what a
    message calls them (`{"attention heads": 9}`).

    Raises UsageError, with the choices that there are, for degrees that do not divide the ranks, or these numbers.
    """
    config = config or ParallelConfig()
    tp = _tensor_degree(config, ranks=ranks, sliced=sliced or {})
    copies = _copies(config, ranks=ranks, tp=tp)
    ep, etp = _expert_degrees(config, ranks=ranks, copies=copies, experts=experts, widths=widths)
    return Degrees(
        ranks=ranks, tp=tp, ep=ep, etp=etp, dp_replicate=copies if config.stage else ranks // tp, zero=config.stage
    )


def _tensor_degree(config: ParallelConfig, *, ranks: int, sliced: Mapping[str, int]) -> int:
    if config.tp is None and not config.slices:
        return 1
    what = ", ".join([_ranks(ranks), *(f"{size} {name}" for name, size in sliced.items())])
    data = (config.dp_replicate or 1) * (config.fsdp or 1) if config.tp is None else 1
    choices = [n for n in _divisors(ranks) if ranks // n % data == 0 and all(size % n == 0 for size in sliced.values())]
    if config.layout == "E+D+M" and max(choices, default=1) == 1:
        common = math.gcd(*sliced.values())
        others = f" or a number of ranks that {_nearest(2, _divisors(common)[1:])} divides" if common > 1 else ""
        raise UsageError(f"layout=E+D+M with {what}: nothing but 1 divides them; choose layout=E+D{others}")
    if config.tp is None:
        return max(choices, default=1)
    if config.tp not in choices:
        least = 2 if config.layout == "E+D+M" else 1
        near = _nearest(config.tp, [n for n in choices if n >= least])
        raise UsageError(f"tp={config.tp} with {what}: choose {near}")
    return config.tp


def _copies(config: ParallelConfig, *, ranks: int, tp: int) -> int:
    """Copies of the whole model with ZeRO, each of them sharded over at least two ranks; else 1."""
    data = ranks // tp
    where = _ranks(ranks) + (f" and tp={tp}" if tp > 1 else "")
    choices = [n for n in _divisors(data) if n < data or n == 1]
    copies = config.dp_replicate or 1
    if copies not in choices:
        raise UsageError(f"dp_replicate={copies} with {where}: choose {_nearest(copies, choices)}")
    if config.fsdp is None:
        return copies
    if config.dp_replicate is not None:
        choices = [copies]
    shards = [data // n for n in choices]
    if config.fsdp not in shards:
        where += f" and dp_replicate={copies}" if config.dp_replicate is not None else ""
        raise UsageError(f"fsdp={config.fsdp} with {where}: choose {_nearest(config.fsdp, shards)}")
    return data // config.fsdp


def _expert_degrees(
    config: ParallelConfig, *, ranks: int, copies: int, experts: Collection[int], widths: Collection[int]
) -> tuple[int, int]:
    shards = ranks // copies
    where = _ranks(ranks) + (f" in {copies} copies" if copies > 1 else "")
    what = f"{where} and {', '.join(map(str, sorted(set(experts)))) or 'no'} experts a layer"
    etp = config.etp or 1
    slices = [n for n in _divisors(shards) if all(width % n == 0 for width in widths or [1])]
    if etp not in slices:
        width = f" of width {', '.join(map(str, sorted(set(widths))))}" if widths else ""
        raise UsageError(f"etp={etp} with {what}{width}: choose {_nearest(etp, slices)}")
    what += f" in {etp} slices" if etp > 1 else ""
    choices = [ep for ep in _divisors(shards // etp) if all(count % ep == 0 for count in experts or [1])]
    ep, most = config.ep, ranks // etp
    if config.layout in ("E", "E+Z"):
        if ep not in (None, most) or most not in choices:
            found = f"ep={ep} with layout={config.layout}" if ep else f"layout={config.layout}"
            other = config.layout.replace("E", "E+D", 1)
            raise UsageError(
                f"{found}: with {what} it would be ep={most}, for which ranks must divide the experts and "
                f"form one copy; choose layout={other}, with ep={_nearest(ep or most, choices)}"
            )
        ep = most
    ep = max(choices) if ep is None else ep
    if ep not in choices:
        raise UsageError(f"ep={ep} with {what}: choose {_nearest(ep, choices)}")
    return ep, etp


def _ranks(number: int) -> str:
    return f"{number} rank{'s' if number > 1 else ''}"


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _nearest(value: int, choices: Iterable[int]) -> str:
    """The choices next to a value, as words."""
    near = sorted(sorted(choices, key=lambda choice: abs(choice - value))[:2])
    return " or ".join(map(str, near))
