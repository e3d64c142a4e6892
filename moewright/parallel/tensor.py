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
    kind: type[nn.Module] = nn.Module
    """What module it can be for."""
    parameter: Placement | None = None
    """How a parameter that is named itself is divided; None where none can be."""


ROWS: Final = {"weight": Shard(0), "bias": Shard(0)}
COLUMNS: Final = {"weight": Shard(1)}
JOINED: Final = {name: joined_shard(0, joined=2) for name in ("weight", "bias")}
STYLES: Final = {
    "colwise": Style(Columns, ROWS, nn.Linear, parameter=Shard(0)),
    "colwise_gather_output": Style(GatheredColumns, ROWS, nn.Linear),
    "colwise_rep": Style(GatheredColumns, ROWS, nn.Linear),
    "packed_colwise": Style(Columns, JOINED, nn.Linear),
    "rowwise": Style(Rows, COLUMNS, nn.Linear),
    "rowwise_split_input": Style(SplittingRows, COLUMNS, nn.Linear),
    "rowwise_rep": Style(SplittingRows, COLUMNS, nn.Linear),
    "embedding_rowwise": Style(Entries, {"weight": Shard(0)}, nn.Embedding),
    "embedding_by_head": Style(Local, COLUMNS, nn.Embedding),  # of ours: sliced heads read its outputs
    "replicated_with_grad_allreduce": Style(Summed),
    "local_params": Style(Local),
    "replicate": Style(),
}
"""The styles that there are. All others are refused."""
SLICES_OUTPUTS: Final = ("colwise", "packed_colwise")
VOCABULARY: Final[tuple[tuple[type[nn.Module], str], ...]] = (
    (nn.Linear, "colwise_gather_output"),
    (nn.Embedding, "embedding_rowwise"),
)
"""The styles of what shares one table of the vocabulary."""


def plan_of(model: PreTrainedModel) -> dict[str, str]:
    """The style of each module or parameter of this model that has one, by its path; of MoELayers only what is dense.

    Raises UsageError where there is no plan, for a style that there is not, and for a parameter that sliced heads read
    and of which the plan says nothing.
    """
    family = family_of(model.config)
    rules = [
        (re.compile(re.escape(path).replace(r"\*", r"\d+")), style)
        for path, style in ((model.tp_plan or {}) | dict(family.slices)).items()
    ]
    modules, plan = dict(model.named_modules()), {}
    for path in _paths(model):
        for pattern, style in rules:
            if pattern.fullmatch(path):
                _require_possible(style, path, modules.get(path), family)
                plan[path] = style
    if not plan:
        raise UsageError(f"transformers has no plan for slices of {family.model_type}: choose tp=1")
    _require_complete(model, plan, family)
    for path, module in model.named_modules():
        if isinstance(module, MoELayer) and module.shared is not None:
            first = "packed_colwise" if module.config.gated else "colwise"
            plan |= {f"{path}.shared.{module.shared.first_name}": first, f"{path}.shared.down_proj": "rowwise"}
    return plan | _vocabulary(model, plan, family)


def _paths(model: nn.Module) -> Iterator[str]:
    """The paths of all modules and parameters outside of MoELayers, of modules first; a shared one has several."""
    inside = tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, MoELayer))
    modules = [path for path, module in model.named_modules() if not isinstance(module, MoELayer | nn.Identity)]
    for path in (*modules, *(path for path, _ in model.named_parameters(remove_duplicate=False))):
        if not f"{path}.".startswith(inside):
            yield path


def _require_possible(style: str, path: str, module: nn.Module | None, family: Family) -> None:
    """Refuse a style that there is not, or not for this module; None stands for a parameter."""
    known = STYLES.get(style)
    if known is None or (known.parameter is None if module is None else not isinstance(module, known.kind)):
        what = "" if known is None else f" of {'parameters' if module is None else type(module).__name__}"
        raise UsageError(
            f"{path} of {family.model_type}: the plan of transformers slices it in the style {style}{what}, which "
            f"cannot be had; those that can are {', '.join(STYLES)}: choose tp=1"
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
                    f"{path} of {family.model_type} is used by sliced heads, and the plan of transformers does not "
                    "say how; choose tp=1"
                )


def _vocabulary(model: PreTrainedModel, plan: Mapping[str, str], family: Family) -> dict[str, str]:
    """The styles of all modules with a table of the vocabulary, where input or output embeddings have one."""
    names = (family.embedding, family.head)
    if not any(name.removesuffix(".weight") in plan for name in names):
        return {}
    tables = {id(model.get_parameter(name)) for name in names}
    return {
        path: style
        for path, module in model.named_modules()
        for kind, style in VOCABULARY
        if isinstance(module, kind) and id(module._parameters["weight"]) in tables and path not in plan
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
    for words, size in sliced_sizes(model.config, moe_configs(model)).items():
        if size % mesh.size():
            raise UsageError(f"tp={mesh.size()}: this model has {size} {words}; choose a divisor")
    axis = Axis(mesh)
    sliced: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    heads, counting = family.counts_heads, set()
    for path, name in plan.items():
        style = STYLES[name]
        parent, _, own = path.rpartition(".")
        owner = model.get_submodule(parent)
        if own in owner._parameters:  # a parameter without a module
            assert style.parameter is not None, "the plan was checked"
            _slice(owner, own, style.parameter, mesh, sliced)
            continue
        module = model.get_submodule(path)
        for parameter, placement in style.placements.items():
            _slice(module, parameter, placement, mesh, sliced)
        if style.module is not None:
            become(module, style.module, axis)
        if heads and name in SLICES_OUTPUTS and hasattr(owner, heads):
            counting.add((owner, heads))
    for attention, attribute in counting:
        setattr(attention, attribute, getattr(attention, attribute) // mesh.size())


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


def sliced_sizes(config: PreTrainedConfig, layers: Mapping[int, MoEConfig] | None = None) -> dict[str, int]:
    """What `tp` must divide, by what messages call it: heads and widths of which a rank has its part.

    `layers` are the mixtures of the model by layer number, whose shared experts count in the place of the blocks.
    Widths that are gathered before they are used, and the vocabulary, may be divided unevenly.
    """
    family, layers = family_of(config), layers or {}
    plan = (config.base_model_tp_plan or {}) | dict(family.slices)
    dense = {place.stack.name for layer, place in enumerate(family.places(config)) if layer not in layers}
    sizes: dict[str, int | None] = {}
    for stack in family.stacks:
        several = len(family.stacks) > 1
        whose = f"{stack.name} " if several else ""
        prefix = stack.layer.partition("{layer}")[0] if several else ""
        local = [path for path, style in plan.items() if style in SLICES_OUTPUTS and path.startswith(prefix)]
        if any(_in_block(path, stack) for path in local) and stack.name in dense:
            sizes[f"units of a dense {whose}block"] = getattr(config, stack.size)
        if not all(_in_block(path, stack) or ".experts." in path or ".shared_" in path for path in local):
            sizes[f"{whose}attention heads"] = getattr(config, stack.heads)
            sizes[f"{whose}key-value heads"] = getattr(config, "num_key_value_heads", None)
    shared = {moe.shared_size for moe in layers.values()}
    sizes["units of a shared expert"] = math.gcd(*shared)
    return {words: size for words, size in sizes.items() if size}


def _in_block(path: str, stack: Stack) -> bool:
    """Whether a path of a plan is a projection of the feed-forward block itself."""
    parent, _, own = path.rpartition(".")
    return parent.endswith(f".{stack.block}") if stack.block else own.startswith("fc")
