"""What of a model lies outside of the device: optimiser states, the experts, or everything.

| `offload` | on the device | in the host's memory, or in files |
|---|---|---|
| none | all | |
| optimizer | parameters, gradients | moments, masters, gradients for these; from a GPU a master of every parameter |
| experts | all else | the experts' parameters, gradients, moments, masters |
| all | what a block computes with, while it does | parameters, gradients, moments, masters |

On a CPU the host's memory is the device's: there only files are outside.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.torch_version import TorchVersion
from transformers import PreTrainedModel

from moewright.backbone.blocks import moe_layers
from moewright.errors import UsageError
from moewright.family.table import family_of
from moewright.parallel.config import ParallelConfig
from moewright.parallel.experts import local_part
from moewright.parallel.memory import DeviceMemory, MappedFiles, Memory, Places, expect
from moewright.parallel.parts import with_part

HOST: Final = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Offload:
    """What lies in which memory; by default nothing does."""

    what: str = "none"
    memory: Memory | None = None
    """Where it lies; None where nothing does."""

    @property
    def weights(self) -> bool:
        """Whether there are parameters outside of the device."""
        return self.what in ("experts", "all")

    def covers(self, model: PreTrainedModel) -> set[str]:
        """The names of the parameters whose optimiser states lie outside."""
        if self.what in ("optimizer", "all"):
            return {name for name, _ in model.named_parameters()}
        if self.what == "none":
            return set()
        experts = {id(p) for layer in moe_layers(model).values() for p in layer.experts.parameters()}
        return {name for name, parameter in model.named_parameters() if id(parameter) in experts}

    def with_part(self, model: PreTrainedModel) -> Callable[[Tensor, Tensor], Tensor]:
        """For `fill` of a model on meta: like `parts.with_part`, with parameters that lie outside put there."""
        names = self.covers(model) if self.weights else set()
        outside = {id(parameter) for name, parameter in model.named_parameters() if name in names}

        def placed(meta: Tensor, part: Tensor) -> Tensor:
            if self.memory is not None and id(meta) in outside:
                part = self.memory.empty(part.shape, part.dtype).copy_(part)
            return with_part(meta, part)

        return placed

    @torch.no_grad()
    def put(self, model: PreTrainedModel) -> None:
        """Put the parameters of a live model that lie outside there; make the optimiser afterwards."""
        placed, moved = self.with_part(model), dict[nn.Parameter, nn.Parameter]()
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    if parameter not in moved:
                        tensor = placed(parameter, local_part(parameter))
                        moved[parameter] = nn.Parameter(tensor, requires_grad=parameter.requires_grad)
                    module._parameters[name] = moved[parameter]

    def places_of(self, model: PreTrainedModel) -> Callable[[nn.Parameter], Places]:
        """For the optimiser: where what belongs to a parameter lies."""
        names = self.covers(model)
        covered = {parameter for name, parameter in model.named_parameters() if name in names}
        # In the host's memory FSDP2 puts the gradients of parameters that lie there by itself.
        gradients = self.memory if self.weights and isinstance(self.memory, MappedFiles) else None
        outside = Places(states=self.memory, gradients=gradients)
        return lambda parameter: outside if parameter in covered else Places()

    def bring_ahead(self, model: PreTrainedModel) -> None:
        """Have the weights of the next block that computes, forward or backward, read from their files by then."""
        if not self.weights or not isinstance(self.memory, MappedFiles):
            return
        modules: list[nn.Module] = [layer.experts for layer in moe_layers(model).values()]
        if self.what == "all":
            modules = [model.get_submodule(place.layer) for place in family_of(model.config).places(model.config)]
        # These parameters, since during a pass the modules hold whole ones; but not their local parts, which
        # `fully_shard` may replace before the first pass, to pad or to pin them.
        divided = [list(module.parameters()) for module in modules]
        for (module, mine), (following, its) in pairwise(zip(modules, divided, strict=True)):
            module.register_forward_pre_hook(_expecting(its))
            following.register_forward_hook(_expecting_in_backward(mine))


def _expecting(parameters: Sequence[nn.Parameter]) -> Callable[[nn.Module, Any], None]:
    def hook(module: nn.Module, args: Any) -> None:
        expect(map(_here, parameters))

    return hook


def _expecting_in_backward(parameters: Sequence[nn.Parameter]) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(lambda gradient: expect(map(_here, parameters)))

    return hook


def _here(parameter: nn.Parameter) -> Tensor:
    return local_part(parameter.detach())


def offload_of(config: ParallelConfig, device: torch.device) -> Offload:
    """What the settings say for a run on this device.

    Raises UsageError for weights in the memory of a GPU's host with a torch before 2.13.
    """
    if config.offloaded == "none" or (config.offload_to == "cpu" and device.type == "cpu"):
        return Offload()
    if config.offload_to == "disk":
        return Offload(what=config.offloaded, memory=MappedFiles(Path(config.offload_folder)))
    offload = Offload(what=config.offloaded, memory=DeviceMemory(HOST, pinned=True))
    # FSDP2 copies gradients to pinned memory while the CPU goes on. That it waits for a copy before a hook reads it is
    # certain from 2.13 on (pytorch pull request 180666); before, gradients may silently be wrong.
    if offload.weights and TorchVersion(torch.__version__) < "2.13":
        raise UsageError(
            f"offload={offload.what} with torch {torch.__version__} on a GPU: gradients may be read before they have "
            "come to the host; install torch 2.13, or set offload_to=disk or offload=optimizer"
        )
    return offload


def ranks_here(ranks: int) -> int:
    """How many of so many ranks share this machine's disks, by what torchrun says; else all."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
