"""The two meshes over the ranks: one for the dense parts, one for the experts."""

from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moewright.parallel.config import Degrees


@dataclass(frozen=True, kw_only=True)
class Meshes:
    """Both meshes have all ranks, in the same order; the last axis has neighbours."""

    degrees: Degrees
    dense: DeviceMesh
    """(replicate, shard): sizes `dp_replicate` and `fsdp`."""
    experts: DeviceMesh
    """(replicate, shard, ep): sizes `expert_replicate`, `expert_fsdp` and `ep`."""


def make_meshes(degrees: Degrees, *, device_type: str) -> Meshes:
    """The meshes over all ranks of the process group, which must be `degrees.ranks`; every rank must call it."""
    return Meshes(
        degrees=degrees,
        dense=init_device_mesh(
            device_type, (degrees.dp_replicate, degrees.fsdp), mesh_dim_names=("replicate", "shard")
        ),
        experts=init_device_mesh(
            device_type,
            (degrees.expert_replicate, degrees.expert_fsdp, degrees.ep),
            mesh_dim_names=("replicate", "shard", "ep"),
        ),
    )


def table(degrees: Degrees, *, experts: int = 0) -> str:
    """The ranks as a small table, with the experts of a layer that has so many: for people."""
    dense = f"dense parts in {degrees.dp_replicate} copies" if degrees.dp_replicate > 1 else "dense parts"
    dense += f" sharded over {degrees.fsdp} ranks" if degrees.fsdp > 1 else " on every rank"
    lines = [f"{degrees.layout} on {degrees.ranks} ranks: ep {degrees.ep}, {dense} (zero {degrees.zero})"]
    if not experts:
        return lines[0]
    each = experts // degrees.ep
    heads = [f"experts {at}-{at + each - 1}" if each > 1 else f"expert {at}" for at in range(0, experts, each)]
    width = max(len(head) for head in heads) + 2
    label = "shard" if degrees.expert_fsdp > 1 else "copy"
    lines.append(" " * 10 + "".join(head.ljust(width) for head in heads).rstrip())
    for row in range(degrees.ranks // degrees.ep):
        ranks = (f"rank {row * degrees.ep + column}".ljust(width) for column in range(degrees.ep))
        lines.append(f"{label} {row}".ljust(10) + "".join(ranks).rstrip())
    return "\n".join(lines)
