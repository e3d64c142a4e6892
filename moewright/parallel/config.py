"""How a model is divided among ranks: the `[parallel]` table, and its degrees for a number of ranks."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Final, Literal

from moewright.errors import UsageError

LAYOUTS: Final = {"E": 0, "E+D": 0, "E+Z": 2, "E+D+Z": 2}
"""The layouts that there are, with the ZeRO stage that each has by default."""
NOT_YET: Final = {"E+D+M": "tensor slicing", "E+Z-Off+M": "tensor slicing and offload"}
"""The layouts of the paper (arXiv 2109.10465) that cannot be had yet, with the part that each lacks."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """The `[parallel]` table: how a run is divided among its ranks, E+D without it, and what it keeps where."""

    layout: str | None = None
    """E (experts over all ranks), E+D (over some, and copies of these), E+Z and E+D+Z (the same, with ZeRO)."""

    ep: int | None = None
    """Ranks among which the experts of a layer are divided; by default all, or the most that divide E with +D."""

    dp_replicate: int | None = None
    """With ZeRO: copies of the whole model, each of them sharded over the ranks that it has; by default 1."""

    zero: int | None = None
    """ZeRO stage: 0 shards nothing, 1 optimiser states, 2 gradients too, 3 parameters too; by default 2 with +Z."""

    offload: Literal["none", "optimizer", "experts", "all"] = "none"
    """What is kept outside of the device: optimiser states; or of the experts, or of all, weights and gradients too."""

    offload_to: Literal["cpu", "disk"] = "cpu"
    """Where: in the host's memory, or in files in `offload_folder`."""

    offload_folder: str = ""
    """For disk: a folder, best on a fast disk of each machine's own; it needs room and holds nothing afterwards."""

    recompute: Literal["none", "experts", "block"] = "none"
    """What the backward pass computes again instead of keeping it: the experts' hidden states, or all of each block."""

    def __post_init__(self) -> None:
        if self.layout in NOT_YET:
            raise UsageError(
                f"layout={self.layout} needs {NOT_YET[self.layout]}, which is not there yet: "
                f"choose one of {', '.join(LAYOUTS)}"
            )
        if self.layout is not None and self.layout not in LAYOUTS:
            raise UsageError(f"layout={self.layout}: choose one of {', '.join(LAYOUTS)}")
        for name in ("ep", "dp_replicate"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UsageError(f"{name}={value}: it must be at least 1")
        if self.zero not in (None, 0, 1, 2, 3):
            raise UsageError(f"zero={self.zero}: choose one of 0, 1, 2, 3")
        if self.offload_to == "disk" and not self.offload_folder:
            raise UsageError("offload_to=disk without offload_folder: name a folder with room for it")
        if self.offload_folder and self.offload_to != "disk":
            raise UsageError(f"offload_folder={self.offload_folder} with offload_to=cpu: set offload_to=disk")
        if self.offload_to == "disk" and self.offload == "none":
            raise UsageError("offload_to=disk with offload=none: choose one of optimizer, experts, all")
        if self.layout is not None and self.zero is not None and bool(LAYOUTS[self.layout]) != bool(self.zero):
            other = self.layout.removesuffix("+Z") if self.layout.endswith("+Z") else f"{self.layout}+Z"
            raise UsageError(
                f"zero={self.zero} with layout={self.layout}: choose layout={other}, or leave one of them out"
            )
        if self.dp_replicate is not None and not self.stage:
            raise UsageError(
                f"dp_replicate={self.dp_replicate} with zero=0: every rank has all dense parts then; leave it out"
            )

    @property
    def stage(self) -> int:
        """The ZeRO stage."""
        return LAYOUTS[self.layout or "E+D"] if self.zero is None else self.zero


@dataclass(frozen=True, kw_only=True)
class Degrees:
    """The sizes of the meshes. The ranks are the same in both: those of `ep` are neighbours.

    Dense parts: `dp_replicate` copies, each sharded over `fsdp` ranks. Experts: `expert_replicate` copies, each
    divided among `ep` ranks, and the experts of each of these sharded over `expert_fsdp` ranks.
    """

    ranks: int = 1
    ep: int = 1
    dp_replicate: int = 1
    zero: int = 0

    @property
    def fsdp(self) -> int:
        """Ranks over which one copy of the dense parts is sharded."""
        return self.ranks // self.dp_replicate

    @property
    def expert_fsdp(self) -> int:
        """Ranks over which the experts of one `ep` rank are sharded."""
        return self.fsdp // self.ep if self.zero else 1

    @property
    def expert_replicate(self) -> int:
        """Copies of the experts."""
        return self.ranks // (self.ep * self.expert_fsdp)

    @property
    def layout(self) -> str:
        """The name of the layout."""
        return ("E" if self.ep == self.ranks else "E+D") + ("+Z" if self.zero else "")


def resolve(config: ParallelConfig | None, *, ranks: int, experts: Collection[int]) -> Degrees:
    """The degrees for so many ranks and a model whose layers have these numbers of experts; none for a dense model.

    Raises UsageError, with the choices that there are, for degrees that do not divide the ranks or the experts.
    """
    config = config or ParallelConfig()
    zero, copies = config.stage, config.dp_replicate or 1
    possible = [n for n in _divisors(ranks) if n < ranks or n == 1]
    if copies not in possible:
        raise UsageError(f"dp_replicate={copies} with {ranks} ranks: choose {_nearest(copies, possible)}")
    shards = ranks // copies
    choices = [ep for ep in _divisors(shards) if all(count % ep == 0 for count in experts or [1])]
    where = f"{ranks} rank{'s' if ranks > 1 else ''}" + (f" in {copies} copies" if copies > 1 else "")
    what = f"{where} and {', '.join(map(str, sorted(set(experts)))) or 'no'} experts a layer"
    ep = config.ep
    if config.layout in ("E", "E+Z"):
        if ep not in (None, ranks) or ranks not in choices:
            found = f"ep={ep} with layout={config.layout}" if ep else f"layout={config.layout}"
            other = config.layout.replace("E", "E+D", 1)
            raise UsageError(
                f"{found}: with {what} it would be ep={ranks}, for which ranks must divide the experts and "
                f"form one copy; choose layout={other}, with ep={_nearest(ep or ranks, choices)}"
            )
        ep = ranks
    ep = max(choices) if ep is None else ep
    if ep not in choices:
        raise UsageError(f"ep={ep} with {what}: choose {_nearest(ep, choices)}")
    return Degrees(ranks=ranks, ep=ep, dp_replicate=copies if zero else ranks, zero=zero)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _nearest(value: int, choices: Iterable[int]) -> str:
    """The choices next to a value, as words."""
    near = sorted(sorted(choices, key=lambda choice: abs(choice - value))[:2])
    return " or ".join(map(str, near))
