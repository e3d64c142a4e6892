"""Tensor slicing of the dense parts: every rank of an axis has some heads, some neurons and some of the vocabulary.

What is sliced, and how, is said by the plan of the model's class in transformers, and by the row of its family in
`family/table.py`, where transformers has none. A plan names a style for each module.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Shard
from transformers import PreTrainedConfig, PreTrainedModel

from moewright.backbone.blocks import moe_configs
from moewright.errors import UsageError
from moewright.family.row import Family, Stack
from moewright.family.table import family_of
from moewright.moe.config import MoEConfig
from moewright.moe.layer import MoELayer
from moewright.parallel._torch import joined_shard
from moewright.parallel.parts import slice_of
from moewright.parallel.sliced import (
    Axis,
    Columns,
    Entries,
    GatheredColumns,
    Local,
    Rows,
    Sliced,
    SplittingRows,
    Summed,
    become,
)


@dataclass(frozen=True)
class Style:
    """What a style of a plan means."""

    module: type[Sliced] | None = None
    """How a module computes; None where nothing changes."""
    placements: Mapping[str, Placement] = field(default_factory=dict)
    """How its parameters are divided; those that are not here stay whole."""


ROWS: Final = {"weight": Shard(0), "bias": Shard(0)}
JOINED: Final = {name: joined_shard(0, joined=2) for name in ("weight", "bias")}
STYLES: Final = {
    "colwise": Style(Columns, ROWS),
    "colwise_gather_output": Style(GatheredColumns, ROWS),
    "colwise_rep": Style(GatheredColumns, ROWS),
    "packed_colwise": Style(Columns, JOINED),
    "rowwise": Style(Rows, {"weight": Shard(1)}),
    "rowwise_split_input": Style(SplittingRows, {"weight": Shard(1)}),
    "rowwise_rep": Style(SplittingRows, {"weight": Shard(1)}),
    "embedding_rowwise": Style(Entries, {"weight": Shard(0)}),
    "embedding_by_head": Style(Local, {"weight": Shard(1)}),  # of ours: its outputs are read by sliced heads
    "replicated_with_grad_allreduce": Style(Summed),
    "local_params": Style(Local),
    "replicate": Style(),
}
"""The styles that there are. All others are refused."""
SLICES_OUTPUTS: Final = ("colwise", "packed_colwise")
VOCABULARY: Final = {nn.Linear: "colwise_gather_output", nn.Embedding: "embedding_rowwise"}
"""The styles of what shares one table of the vocabulary."""


def plan_of(model: PreTrainedModel) -> dict[str, str]:
    """The style of each module or parameter of this model that has one, by its path; of MoELayers only what is dense.

    Raises UsageError for a style that there is not, and for a parameter that heads divided among ranks read and of
    which the plan says nothing.
    """
    family = family_of(model.config)
    rules = [
        (re.compile(re.escape(path).replace(r"\*", r"\d+")), style)
        for path, style in ((model.tp_plan or {}) | dict(family.slices)).items()
    ]
    plan = {}
    for path in _paths(model):
        for pattern, style in rules:
            if pattern.fullmatch(path):
                _require_known(style, path, family)
                plan[path] = style
    _require_complete(model, plan, family)
    for path, module in model.named_modules():
        if isinstance(module, MoELayer) and module.shared is not None:
            first = "packed_colwise" if module.config.gated else "colwise"
            plan |= {f"{path}.shared.{module.shared.first_name}": first, f"{path}.shared.down_proj": "rowwise"}
    return plan | _tied(model, plan)


def _paths(model: nn.Module) -> Iterator[str]:
    """The paths of all modules and parameters outside of MoELayers, of modules first; a shared one has several."""
    inside = tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, MoELayer))
    modules = [path for path, module in model.named_modules() if not isinstance(module, MoELayer | nn.Identity)]
    for path in (*modules, *(path for path, _ in model.named_parameters(remove_duplicate=False))):
        if not f"{path}.".startswith(inside):
            yield path


def _require_known(style: str, path: str, family: Family) -> None:
    if style not in STYLES:
        raise UsageError(
            f"tp: {path} of {family.model_type} has the style {style} in the plan of transformers, and the styles that "
            f"can be had are {', '.join(STYLES)}; choose tp=1"
        )


def _require_complete(model: nn.Module, plan: Mapping[str, str], family: Family) -> None:
    """Refuse a parameter in an attention module whose heads are divided, of which nothing is said."""
    blocks = {stack.block for stack in family.stacks}
    for parent in {path.rpartition(".")[0] for path, style in plan.items() if style in SLICES_OUTPUTS}:
        if "" in blocks or parent.endswith(tuple(blocks)):
            continue  # a block has no others, and where it stands in the layer itself, others are in the row's care
        for name, _ in model.get_submodule(parent).named_parameters():
            path = f"{parent}.{name}"
            if path not in plan and path.rpartition(".")[0] not in plan.keys() - {parent}:
                raise UsageError(
                    f"tp: the plan of transformers for {family.model_type} says nothing of {path}, which sliced heads "
                    "read; choose tp=1"
                )


def _tied(model: nn.Module, plan: Mapping[str, str]) -> dict[str, str]:
    """The styles of the modules that share the table of the vocabulary with one that has a style."""
    tables = {
        id(model.get_submodule(path).weight) for path, style in plan.items() if style in VOCABULARY.values()
    }  # fmt: skip
    return {
        path: style
        for path, module in model.named_modules()
        for kind, style in VOCABULARY.items()
        if isinstance(module, kind) and id(module.weight) in tables and path not in plan
    }


def slice_dense(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Leave each rank of the one-dimensional `mesh` its slice of the dense parts, as DTensors; in place.

    The parameters may be on meta, or hold the same values on all ranks. What no style names stays whole on every rank,
    as do activations outside of sliced modules: all ranks must have the same batch, and the same random numbers
    wherever these are for whole activations. Losses and gradients are then those of one process on each rank.

    Raises UsageError for what `plan_of` refuses, and for sizes that the mesh does not divide.
    """
    if mesh.size() == 1:
        return
    family, plan = family_of(model.config), plan_of(model)
    require_divisible(tp_divisors(model.config, moe_configs(model)), tp=mesh.size())
    axis = Axis(mesh)
    sliced: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    attentions = set()
    for path, name in plan.items():
        style = STYLES[name]
        parent, _, own = path.rpartition(".")
        owner = model.get_submodule(parent)
        if own in owner._parameters:  # a parameter without a module
            _slice(owner, own, style.placements["bias"], mesh, sliced)
            continue
        module = model.get_submodule(path)
        for parameter, placement in style.placements.items():
            _slice(module, parameter, placement, mesh, sliced)
        if style.module is not None:
            become(module, style.module, axis)
        if name in SLICES_OUTPUTS and hasattr(owner, family.counts_heads or ""):
            attentions.add(owner)
    for attention in attentions:
        setattr(attention, str(family.counts_heads), getattr(attention, str(family.counts_heads)) // mesh.size())


def _slice(
    module: nn.Module,
    name: str,
    placement: Placement,
    mesh: DeviceMesh,
    sliced: dict[int, tuple[nn.Parameter, nn.Parameter]],
) -> None:
    """Replace a parameter by this rank's slice of it. One that is shared stays so: `sliced` has wholes and slices."""
    whole = module._parameters.get(name)
    if whole is None:
        return
    if id(whole) not in sliced:
        part = nn.Parameter(slice_of(whole.detach(), mesh, placement), requires_grad=whole.requires_grad)
        sliced[id(whole)] = (whole, part)
    module.register_parameter(name, sliced[id(whole)][1])


def tp_divisors(config: PreTrainedConfig, layers: Mapping[int, MoEConfig] | None = None) -> dict[str, int]:
    """What `tp` must divide, by name: the heads and widths of which a rank has its part.

    `layers` are the mixtures of the model by layer number, whose shared experts count in the place of the blocks.
    """
    family, layers = family_of(config), layers or {}
    plan = (config.base_model_tp_plan or {}) | dict(family.slices)
    places = enumerate(family.places(config))
    dense = {place.stack.name for layer, place in places if layer not in layers}
    divisors: dict[str, int] = {}
    for stack in family.stacks:
        several = stack.layer.partition("{layer}")[0] if len(family.stacks) > 1 else ""
        local = [p for p, style in plan.items() if style in SLICES_OUTPUTS and p.startswith(several)]
        widths = [path for path in local if _in_block(path, stack)]
        heads = [path for path in local if path not in widths and ".experts." not in path and ".shared_" not in path]
        fields = [stack.size] if widths and stack.name in dense else []
        fields += [stack.heads, "num_key_value_heads"] if heads else []
        divisors |= {name: getattr(config, name) for name in fields if getattr(config, name, None) is not None}
    for layer, moe in layers.items():
        if moe.shared_size and moe.shared_size not in divisors.values():
            divisors[f"shared_size of layer {layer}"] = moe.shared_size
    return divisors


def _in_block(path: str, stack: Stack) -> bool:
    """Whether a path of a plan is a projection of the feed-forward block itself."""
    parent, _, own = path.rpartition(".")
    return parent.endswith(f".{stack.block}") if stack.block else own.startswith("fc")


def require_divisible(divisors: Mapping[str, int], *, tp: int) -> None:
    """Raise UsageError, with the choices that there are, if `tp` does not divide all of `tp_divisors`."""
    common = math.gcd(*divisors.values()) if divisors else 0
    if common % tp:
        found = ", ".join(f"{name} {number}" for name, number in divisors.items() if number % tp)
        possible = [n for n in range(1, common + 1) if common % n == 0]
        below, above = [n for n in possible if n < tp], [n for n in possible if n > tp]
        choices = " or ".join(map(str, below[-1:] + above[:1]))
        raise UsageError(f"tp={tp} does not divide {found}: choose {choices}")
