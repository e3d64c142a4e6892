"""Live models from folders: a skeleton without memory, checked against the files, then filled.

Whatever format a folder has, in memory it is a transformers model, some of whose feed-forward blocks are MoELayers.
"""

import re
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from moewright.backbone.formats.base import Format
from moewright.backbone.formats.choose import format_for
from moewright.backbone.formats.own import OWN_TYPE
from moewright.backbone.formats.rows import Fields, Layers
from moewright.backbone.graft import graft
from moewright.backbone.pretrained import RECOMPUTED
from moewright.backbone.skeleton import empty_model, has_tied_head, untie_head
from moewright.backbone.slots import Box, Index, Slices, Slot, TensorSource
from moewright.checkpoint.read import RECORD, ModelFolder, read_description
from moewright.errors import ModelError
from moewright.family.row import Family
from moewright.family.table import family_of

GENERATION: Final = "generation_config.json"
BoxesOf = Callable[[Tensor], list[Box]]
"""What this process holds of a tensor of the model, which is on meta."""


def load_model(path: str | Path, *, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Load a dense or a sparse folder on CPU, in evaluation mode, in its own dtype or the given one.

    Tensors are read one at a time into place. Raises `ModelError` before anything is allocated if names or shapes
    disagree with the config.
    """
    folder = ModelFolder(path)
    model, written_as = open_skeleton(folder, dtype=dtype)
    fill(model, written_as, FolderSource(folder))
    if (folder.path / GENERATION).is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(folder.path), local_files_only=True)
    return model


def open_skeleton(folder: ModelFolder, *, dtype: torch.dtype | None = None) -> tuple[PreTrainedModel, Format]:
    """The model that a folder holds with its parameters on meta, and the format that it is written in.

    Names, shapes and what must be constant are checked. Raises `ModelError`.
    """
    written_as = format_for(folder.config)
    dtype = dtype or folder_dtype(folder)
    config, layers, said = _described(written_as, folder.config, folder.record or {})
    family = family_of(config)
    tied = _are_tied(folder, family, written_as, said=said and bool(config.tie_word_embeddings))
    if not family.seq2seq:  # the embeddings of an encoder and a decoder stay tied to each other
        config.tie_word_embeddings = tied
    _require_plausible(folder, config, written_as)
    _require_routers(folder, config, layers, written_as)
    model = empty_model(config, dtype=dtype)
    if family.seq2seq and not tied and has_tied_head(model):
        untie_head(model)
    graft(model, layers)
    slots = written_as.slots(model)
    expected = {slot.name: slot.shape for slot in slots}
    ignored = _ignored(folder, model, written_as, expected=expected)
    folder.check(expected, optional=[*ignored, *_repeated(folder, model, written_as)])
    for slot in slots:
        if slot.must_match and slot.contradicts(folder.read(slot.name)):
            raise ModelError(f"{folder.path}: {slot.name} is not {slot.fill:g} everywhere; {_why_constant(folder)}")
    return model, written_as


def described(path: str | Path, *, dtype: torch.dtype) -> PreTrainedModel:
    """The model that a folder's config.json describes, with its parameters on meta; the folder needs no weights.

    Raises `ModelError`.
    """
    fields, record = read_description(Path(path))
    config, layers, said = _described(format_for(fields), fields, record or {})
    config.tie_word_embeddings = said and bool(config.tie_word_embeddings)
    model = empty_model(config, dtype=dtype)
    graft(model, layers)
    return model


def _described(
    written_as: Format, fields: dict[str, Any], record: dict[str, Any]
) -> tuple[PreTrainedConfig, Layers, bool]:
    """The backbone's config, the sparse layers, and whether the embeddings are said to be tied."""
    said = Fields(record, fields["model_type"], file=RECORD).flag(
        "tie_word_embeddings", default=written_as.says_tied(fields)
    )
    config, layers = written_as.read(fields, record=record, tied=said)
    return config, layers, said


def folder_dtype(folder: ModelFolder) -> torch.dtype:
    """The dtype that a folder's model computes in, whatever a router's bias has. Our own type says it."""
    written_as = format_for(folder.config)
    if written_as is OWN_TYPE:
        return dtype_named(folder.config.get("dtype"))
    return folder.dtype(but=written_as.keeps_float32)


def dtype_named(name: object) -> torch.dtype:
    """The dtype of that name; `ModelError` for what no model of ours is in."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        if name == str(dtype).removeprefix("torch."):
            return dtype
    raise ModelError(f"dtype={name!r}: choose one of float32, bfloat16, float16, float64")


@dataclass(frozen=True)
class FolderSource:
    """The tensors of a folder that was checked."""

    folder: ModelFolder

    def read(self, slot: Slot, index: Slices | None = None) -> Tensor:
        return self.folder.read(slot.name, index)


@torch.no_grad()
def fill(
    model: PreTrainedModel,
    format: Format,  # noqa: A002
    source: TensorSource,
    *,
    device: torch.device | str = "cpu",
    boxes_of: BoxesOf | None = None,
    with_part: Callable[[Tensor, Tensor], Tensor] = lambda meta, part: part,
) -> None:
    """Give a model on meta its memory, on `device` and a parameter at a time, and its values from a source.

    With `boxes_of` each tensor that a slot holds becomes the part of it that this process has, and only the slots, and
    rows of slots, that fall into it are read; `with_part(meta, part)` is the tensor that the model gets then. Tied
    parameters stay tied; statistics of layers, which no slot holds, are zero.
    """
    slots: dict[str, list[tuple[Slot, Index]]] = {}
    for slot in format.slots(model):
        if slot.loaded:
            name, index = slot.place(model)
            slots.setdefault(name, []).append((slot, index))

    def filled(meta: Tensor, name: str) -> Tensor:
        if name not in slots:
            return torch.zeros_like(meta, device=device)
        everything = tuple(slice(0, size) for size in meta.shape)
        boxes = boxes_of(meta) if boxes_of else [Box(everything, everything)]
        shape = [max(held.stop for held in dim) for dim in zip(*(box.local for box in boxes), strict=True)]
        tensor = torch.empty(shape, dtype=meta.dtype, device=device)
        for slot, index in slots[name]:
            for box in boxes:
                ranges = [range(size)[held] for size, held in zip(meta.shape, box.whole, strict=True)]
                if (meeting := _meeting(index, ranges, meta.shape)) is not None:
                    here, there = meeting
                    tensor[box.local][here].copy_(slot.read(source, there))
        return with_part(meta, tensor)

    parameters: dict[int, nn.Parameter] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                if id(parameter) not in parameters:
                    tensor = filled(parameter, f"{path}.{name}".lstrip("."))
                    parameters[id(parameter)] = nn.Parameter(tensor, requires_grad=parameter.requires_grad)
                module._parameters[name] = parameters[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                on_meta = filled(buffer, f"{path}.{name}".lstrip(".")) if buffer.is_meta else buffer
                module._buffers[name] = on_meta.to(device)


def _meeting(index: Index, held: list[range], shape: torch.Size) -> tuple[Index, Slices | None] | None:
    """Where a slot, which is at `index` of a tensor, and the part of it that is `held` meet.

    The place in the part, and the place in the slot (None for all of it); None where they do not meet.
    """
    here: list[int | slice] = []
    there: list[slice] = []
    whole = True
    for dim, (size, mine) in enumerate(zip(shape, held, strict=True)):
        at = index[dim] if dim < len(index) else slice(None)
        its = range(at, at + 1) if isinstance(at, int) else range(size)[at]
        low, high = max(its.start, mine.start), min(its.stop, mine.stop)
        if low >= high:
            return None
        whole &= (low, high) == (its.start, its.stop)
        if isinstance(at, int):
            here.append(low - mine.start)
        else:
            here.append(slice(low - mine.start, high - mine.start))
            there.append(slice(low - its.start, high - its.start))
    return tuple(here), None if whole else tuple(there)


def _are_tied(folder: ModelFolder, family: Family, written_as: Format, *, said: bool) -> bool:
    """Whether to tie input and output embeddings, given what the folder says of it.

    A stored output embedding that differs from the input embedding counts more than what is said; a warning says so.
    """
    embedding, head = written_as.on_disk(family.embedding, family), written_as.on_disk(family.head, family)
    if not said or head not in folder.tensors or embedding not in folder.tensors:
        return said
    if folder.tensors[head].shape != folder.tensors[embedding].shape:
        return True  # refused with the other shapes
    equal = torch.equal(folder.read(head), folder.read(embedding))
    if not equal and family.config_tells_ties:
        warnings.warn(
            f"{folder.path} says that input and output embeddings are tied, but holds two that differ; "
            f"they are loaded untied",
            stacklevel=3,
        )
    return equal


def _require_plausible(folder: ModelFolder, config: PreTrainedConfig, written_as: Format) -> None:
    """Compare the sizes that make a model large with what the files hold, before the model's skeleton is built."""
    family = family_of(config)
    embedding, shape = written_as.on_disk(family.embedding, family), (config.vocab_size, config.hidden_size)
    stored = folder.tensors[embedding].shape if embedding in folder.tensors else None
    if stored != shape:
        what = "is missing" if stored is None else f"has the shape {list(stored)}"
        raise ModelError(f"{folder.path}: {embedding} {what}, where config.json calls for {list(shape)}")
    for stack in family.stacks:
        count = getattr(config, stack.count)
        last = written_as.on_disk(stack.layer.format(layer=count - 1), family)
        if count < 1 or not any(name.startswith(f"{last}.") for name in folder.tensors):
            raise ModelError(f"{folder.path}: no tensor of {last}, where config.json says {stack.count}={count}")


def _require_routers(folder: ModelFolder, config: PreTrainedConfig, layers: Layers, written_as: Format) -> None:
    """Compare numbers of experts with what the files hold, before a list of all their tensors is made."""
    family = family_of(config)
    places = family.places(config)
    for layer, moe in layers.items():
        name = written_as.router_name(places[layer], family)
        wanted, stored = (moe.num_experts, moe.hidden_size), folder.tensors.get(name)
        if stored is None or stored.shape != wanted:
            what = "is missing" if stored is None else f"has the shape {list(stored.shape)}"
            raise ModelError(f"{folder.path}: {name} {what}, where config.json calls for {list(wanted)}")


def _ignored(
    folder: ModelFolder, model: PreTrainedModel, written_as: Format, *, expected: Collection[str]
) -> list[str]:
    """Tensors of a folder that no part of the model is: what is computed, and what its class ignores.

    Warns of what the folder's architecture can use and we do not carry along.
    """
    patterns = (*RECOMPUTED, *(model._keys_to_ignore_on_load_unexpected or ()))
    others = [name for name in folder.tensors if name not in expected]
    unread = [name for name in others if written_as.unread(name, folder.config, model.config)]
    if unread:
        warnings.warn(
            f"{folder.path}: {len(unread)} tensors of layers that predict later tokens ({unread[0]}, ...) are left out",
            stacklevel=3,
        )
    return unread + [name for name in others if any(re.search(pattern, name) for pattern in patterns)]


def _repeated(folder: ModelFolder, model: PreTrainedModel, written_as: Format) -> list[str]:
    """Names of what is tied to another tensor, and may be in a folder or not.

    Raises `ModelError` if it differs.
    """
    family, names = family_of(model.config), []
    first = {id(parameter): written_as.on_disk(name, family) for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        original, repeated = first[id(parameter)], written_as.on_disk(name, family)
        if repeated == original:
            continue
        names.append(repeated)
        if {original, repeated} <= folder.tensors.keys() and not torch.equal(
            folder.read(original), folder.read(repeated)
        ):
            raise ModelError(
                f"{folder.path}: {repeated} differs from {original}, to which this {model.config.model_type} model "
                "ties it; untie them in config.json if transformers supports that, or use another folder"
            )
    return names


def _why_constant(folder: ModelFolder) -> str:
    if folder.record is None:
        return "attention biases or shared experts like these are not supported yet"
    return (
        "moewright.json says it should be, so others changed it; delete moewright.json to load it by config.json alone"
    )
