"""The two meshes over the ranks: one for the dense parts, one for the experts."""

from dataclasses import dataclass
from typing import Final

from torch import distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moewright.parallel._torch import set_timeout
from moewright.parallel.config import Degrees
from moewright.parallel.ranks import TIMEOUT

MOST: Final = 8
"""How many columns and lines a table of ranks has at most."""


@dataclass(frozen=True, kw_only=True)
class Meshes:
    """Both meshes have all ranks, in the same order; the last axis has neighbours."""

    degrees: Degrees
    dense: DeviceMesh
    """(replicate, shard, tp): sizes `dp_replicate`, `fsdp` and `tp`."""
    experts: DeviceMesh
    """(replicate, shard, ep, etp): sizes `expert_replicate`, `expert_fsdp`, `ep` and `etp`."""
    travel: ProcessGroup
    """The ranks of both `ep` and `etp`, in this order: those that tokens travel between."""


def make_meshes(degrees: Degrees, *, device_type: str) -> Meshes:
    """The meshes over all ranks of the process group, which must be `degrees.ranks`; every rank must call it.

    Their collectives wait for `ranks.TIMEOUT`, also where that of the process group is another.
    """
    dense = init_device_mesh(
        device_type,
        (degrees.dp_replicate, degrees.fsdp, degrees.tp),
        mesh_dim_names=("replicate", "shard", "tp"),
    )
    experts = init_device_mesh(
        device_type,
        (degrees.expert_replicate, degrees.expert_fsdp, degrees.ep, degrees.etp),
        mesh_dim_names=("replicate", "shard", "ep", "etp"),
    )
    for group in (*dense.get_all_groups(), *experts.get_all_groups()):
        if group is not dist.group.WORLD:  # which may be the caller's
            set_timeout(group, TIMEOUT)
    if degrees.etp > 1:
        travel, _ = dist.new_subgroups(group_size=degrees.ep * degrees.etp, timeout=TIMEOUT)
    else:
        travel = experts.get_group("ep")
    return Meshes(degrees=degrees, dense=dense, experts=experts, travel=travel)


def table(degrees: Degrees, *, experts: int = 0) -> str:
    """The ranks as a small table, with the experts of a layer that has so many; of many ranks the first few."""
    tp, etp = degrees.tp, degrees.etp
    dense = "dense parts" + (f" in {tp} slices" if tp > 1 else "")
    dense += f" in {degrees.dp_replicate} copies" if degrees.dp_replicate > 1 else ""
    if degrees.fsdp > 1:
        dense += f" sharded over {degrees.fsdp} ranks"
    elif tp == 1:
        dense += " on every rank"
    sizes = (f"tp {tp}, " if tp > 1 else "") + f"ep {degrees.ep}, " + (f"etp {etp}, " if etp > 1 else "")
    lines = [f"{degrees.layout} on {degrees.ranks} ranks: {sizes}{dense} (zero {degrees.zero})"]
    if tp > 1:
        groups = [f"{first}-{first + tp - 1}" for first in range(0, degrees.ranks, tp)]
        lines.append(f"the same rows on ranks {', '.join(_few(groups))}")
    if not experts:
        return "\n".join(lines)
    each = experts // degrees.ep
    heads = [f"experts {at}-{at + each - 1}" if each > 1 else f"expert {at}" for at in range(0, experts, each)]
    if etp > 1:
        heads = [f"{head}, {part}/{etp}" for head in heads for part in range(1, etp + 1)]
    label = "shard" if degrees.expert_fsdp > 1 else "copy"
    rows = [["", *_few(heads)]]
    for row in range(degrees.ranks // len(heads)):
        first = row * len(heads)
        rows.append([f"{label} {row}", *_few([f"rank {first + column}" for column in range(len(heads))])])
    if len(rows) > MOST:
        rows[MOST - 2 : -1] = [["..."]]
    widths = [10] + [max(len(head) for head in heads) + 2] * MOST
    return "\n".join(lines + ["".join(map(str.ljust, row, widths)).rstrip() for row in rows])


def _few(words: list[str]) -> list[str]:
    return words if len(words) <= MOST else [*words[: MOST - 2], "...", words[-1]]
