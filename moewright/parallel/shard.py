"""Data parallelism and ZeRO: every block, and the experts in it, under torch's `fully_shard`.

| `zero` | parameters | gradients | optimiser states |
|---|---|---|---|
| 0 | whole | whole, reduced once a step | whole |
| 1 | sharded, whole from the forward to the backward pass | whole in a step, reduced once | sharded |
| 2 | as with 1 | sharded, reduced after each micro-batch | sharded |
| 3 | sharded, whole for the forward pass of a block and again for its backward pass | as with 2 | sharded |
"""

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from moewright.moe.layer import MoELayer
from moewright.parallel.config import Degrees
from moewright.parallel.memory import DeviceMemory
from moewright.parallel.mesh import Meshes
from moewright.parallel.offload import Offload


def shard(
    model: nn.Module,
    blocks: Iterable[nn.Module],
    layers: Iterable[MoELayer],
    meshes: Meshes,
    *,
    offload: Offload,
) -> None:
    """Shard the experts of `layers` on the axes of their mesh other than `ep`, all else on the dense mesh.

    All gradients are reduced as sums: losses are divided by the targets of all ranks beforehand.
    """
    degrees = meshes.degrees
    # With zero 0 there is one shard, of which `fully_shard` makes a copy to compute with: it is freed at once.
    # What lies outside of the device comes for each pass of a block, so that no more than a block or two is there.
    reshard = degrees.zero in (0, 3)
    inside: dict[str, Any] = {"reshard_after_forward": reshard}
    outside: dict[str, Any] = {"reshard_after_forward": True}
    if meshes.dense.device_type != "cpu":
        outside["offload_policy"] = CPUOffloadPolicy(pin_memory=isinstance(offload.memory, DeviceMemory))
    experts_options = outside if offload.weights else inside
    dense_options = outside if offload.what == "all" else inside
    if any(parameter.dtype in (torch.bfloat16, torch.float16) for parameter in model.parameters()):
        sums = {"mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32)}
        experts_options, dense_options = experts_options | sums, dense_options | sums
    experts_mesh = meshes.experts["replicate", "shard"] if degrees.expert_replicate > 1 else meshes.experts["shard"]
    dense_mesh = meshes.dense["replicate", "shard"] if degrees.dp_replicate > 1 else meshes.dense["shard"]
    layers, blocks = list(layers), list(blocks)
    for layer in layers:
        fully_shard(
            layer.experts,
            mesh=experts_mesh,
            **experts_options,
            shard_placement_fn=lambda parameter: _placement(parameter, degrees),
        )
    for block in blocks:
        fully_shard(block, mesh=dense_mesh, **dense_options)
    fully_shard(model, mesh=dense_mesh, **dense_options)
    if offload.weights:
        chain = blocks if offload.what == "all" else [layer.experts for layer in layers]
        for module, following in pairwise(chain):  # on a GPU copies to it begin a block ahead
            assert isinstance(module, FSDPModule)
            assert isinstance(following, FSDPModule)
            module.set_modules_to_forward_prefetch([following])
            following.set_modules_to_backward_prefetch([module])
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no reduction that also multiplies


def reduce_gradients_at_the_end(model: nn.Module, *, last: bool) -> None:
    """Before a backward pass: let gradients be added up here, and be reduced in the `last` micro-batch of a step."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)


def reshard(model: nn.Module) -> None:
    """After forward passes without a backward pass: drop the whole parameters that stages 1 and 2 keep for it."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _placement(parameter: nn.Parameter, degrees: Degrees) -> Shard:
    """Experts as a whole where they divide, else a dim of each that is not sliced already and does."""
    assert isinstance(parameter, DTensor), "experts were divided before"
    ranks, sliced = degrees.expert_fsdp, [placement.dim for placement in parameter.placements]  # type: ignore[attr-defined]
    if parameter.shape[0] // degrees.ep % ranks:
        for dim in range(1, parameter.dim()):
            if dim not in sliced and parameter.shape[dim] % ranks == 0:
                return Shard(dim)
    return Shard(0)
