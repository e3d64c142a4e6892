"""Live models from folders, and folders from live models.

In memory a model is always a transformers model, some of whose feed-forward blocks are
MoELayers, whatever layout its folder has. `moewright.json` remembers what the layout cannot say:
which family it was, and whether its embeddings were tied.
"""

import re
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from moewright import __version__
from moewright.backbone.formats import OWN, TWINS, choose_format, is_sparse, read_sparse, says_tied, sparse_fields
from moewright.backbone.graft import graft, moe_layers
from moewright.backbone.layout import Slot, own_name, slots
from moewright.backbone.skeleton import empty_model, has_tied_head, materialise, untie_head
from moewright.backbone.twin import Layers, Twin, dense_fields, truth
from moewright.checkpoint.read import RECORD, ModelFolder
from moewright.checkpoint.tensorfile import LazyTensor
from moewright.checkpoint.write import SHARD_BYTES, FolderWriter
from moewright.errors import ModelError
from moewright.family.table import Family, backbone_config, family_of

GENERATION: Final = "generation_config.json"
RECOMPUTED: Final = (r"rotary_emb\.inv_freq$", r"embed_positions\.weights$")
"""Tensors that old versions stored, and that are computed from the config."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """How a model is written: as a dense model, as a twin, or as our own type."""

    twin: Twin | None = None

    def slots(self, model: PreTrainedModel) -> list[Slot]:
        """Every tensor of the folder, in the order of writing."""
        return slots(model, None) if self.twin is None else self.twin.slots(model)

    def name(self, model: PreTrainedModel) -> str:
        """The model_type that config.json has."""
        if self.twin is not None:
            return self.twin.model_type
        return OWN if moe_layers(model) else str(model.config.model_type)

    def fields(self, model: PreTrainedModel) -> dict[str, Any]:
        """The fields of config.json."""
        layers = {layer: moe.config for layer, moe in moe_layers(model).items()}
        if layers:
            return sparse_fields(self.twin, model.config, layers, dtype=stored_dtype(model))
        return dense_fields(model.config, dtype=stored_dtype(model)) | {"architectures": [type(model).__name__]}

    def record(self, model: PreTrainedModel) -> dict[str, Any]:
        """What `moewright.json` must say for `load_model` to give this model back."""
        found = {
            "backbone": model.config.model_type,
            "moewright": __version__,
            "tie_word_embeddings": has_tied_head(model),
        }
        if self.twin is not None and (moe := next(iter(moe_layers(model).values()), None)) is not None:
            found |= self.twin.record(moe.config)
        return found


def form_of(model: PreTrainedModel, *, wanted: str | None = None) -> Form:
    """The form that a model is written in, or the format that is wanted; `ModelError` if that does not compute it."""
    layers = {layer: moe.config for layer, moe in moe_layers(model).items()}
    if not layers:
        if wanted not in (None, model.config.model_type):
            raise ModelError(f"format={wanted} of a dense {model.config.model_type} model: only sparse models have one")
        return Form()
    return Form(twin=choose_format(model.config, layers, wanted=wanted))


def load_model(
    path: str | Path, *, dtype: torch.dtype | None = None, fields: Mapping[str, Any] | None = None
) -> PreTrainedModel:
    """Load a dense or a sparse folder on CPU, in evaluation mode, in its own dtype or the given one.

    With `fields` they stand in place of those of its config.json. Tensors are read one at a time into place. Raises
    `ModelError` before anything is allocated if names or shapes disagree with the config.
    """
    folder = ModelFolder(path)
    if fields is not None:
        folder.config = dict(fields)
    model, form = empty_model_of(folder, dtype=dtype)
    fill(model, form, lambda slot: folder.read(slot.name))
    if (folder.path / GENERATION).is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(folder.path), local_files_only=True)
    return model


def empty_model_of(folder: ModelFolder, *, dtype: torch.dtype | None = None) -> tuple[PreTrainedModel, Form]:
    """The model that a folder holds with its parameters on meta, and the form that it is written in.

    Names, shapes and what must be constant are checked. Raises `ModelError`.
    """
    sparse, record = is_sparse(folder.config), folder.record or {}
    dtype = dtype or folder_dtype(folder)
    twin: Twin | None = None
    layers: Layers = {}
    said = says_tied(folder.config) if sparse else True
    said = truth(record, "tie_word_embeddings", default=said, what=folder.config["model_type"], file=RECORD)
    if sparse:
        twin, config, layers = read_sparse(folder.config, record=record, tied=said)
    else:
        config = backbone_config(folder.config)
    family, on_disk = family_of(config), partial(_on_disk, twin=twin, config=config)
    tied = _are_tied(folder, family, said=said and bool(config.tie_word_embeddings), on_disk=on_disk)
    if not family.seq2seq:  # the embeddings of an encoder and a decoder stay tied to each other
        config.tie_word_embeddings = tied
    _require_plausible(folder, config, on_disk)
    _require_routers(folder, config, layers, twin)
    model = empty_model(config, dtype=dtype)
    if family.seq2seq and not tied and has_tied_head(model):
        untie_head(model)
    graft(model, layers)
    form = Form(twin=twin)
    found = form.slots(model)
    expected = {slot.name: slot.shape for slot in found}
    ignored = _ignored(folder, model, twin, expected=expected)
    folder.check(expected, optional=[*ignored, *_repeated(folder, model, on_disk)])
    for slot in found:
        if slot.must_match and not bool(folder.read(slot.name).eq(slot.fill or 0.0).all()):
            raise ModelError(f"{folder.path}: {slot.name} is not {slot.fill:g} everywhere; {_why_constant(folder)}")
    return model, form


def folder_dtype(folder: ModelFolder) -> torch.dtype:
    """The dtype that a folder's model computes in, whatever a router's bias has. Our own type says it."""
    model_type = folder.config.get("model_type")
    if model_type == OWN:
        return dtype_named(folder.config.get("dtype"))
    twin = TWINS.get(model_type) if isinstance(model_type, str) else None
    return folder.dtype() if twin is None else folder.dtype(but=twin.layout.keeps_float32)


def dtype_named(name: object) -> torch.dtype:
    """The dtype of that name; `ModelError` for what no model of ours is in."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        if name == str(dtype).removeprefix("torch."):
            return dtype
    raise ModelError(f"dtype={name!r}: choose one of float32, bfloat16, float16, float64")


def fill(model: PreTrainedModel, form: Form, make: Callable[[Slot], Tensor]) -> None:
    """Give a model on meta its memory, and each slot of its form the tensor that `make` returns for it."""
    materialise(model)
    with torch.no_grad():
        for slot in form.slots(model):
            if slot.fill is None and not slot.tied:
                slot.view(model).copy_(make(slot) / slot.factor if slot.factor != 1.0 else make(slot))


def save_model(
    model: PreTrainedModel,
    out: str | Path,
    *,
    companions: Path | None = None,
    format: str | None = None,  # noqa: A002  # as the command line calls it
    overwrite: bool = False,
    record: Mapping[str, Any] | None = None,
) -> Path:
    """Write a live model as a folder; atomic. Plain transformers loads it unless the format is our own, `moewright`.

    `companions` is the folder that tokenizer and generation files are carried over from; `record` joins
    what `moewright.json` says. Without `format` a sparse model is written as the first architecture of
    transformers that computes it, or as our own type. Raises `ModelError` if the format does not represent the model
    or `out` exists, `ResourceError` if it does not fit.
    """
    form = form_of(model, wanted=format)
    with FolderWriter(out, overwrite=overwrite, sources=[] if companions is None else [companions]) as writer:
        write_model(writer, model, form, companions=companions)
        return writer.commit({**(record or {}), **form.record(model)})


def write_model(
    writer: FolderWriter,
    model: PreTrainedModel,
    form: Form,
    *,
    companions: Path | None = None,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Config, weights and companions of a live model, to be committed by the caller with the form's record."""
    dtype = stored_dtype(model)
    writer.write_json("config.json", form.fields(model))
    tensors = {slot.name: _lazy(model, slot, dtype) for slot in form.slots(model)}
    writer.write_tensors(tensors, max_shard_bytes=max_shard_bytes)
    if companions is not None:
        writer.copy_companions(companions)


def constant(slot: Slot, dtype: torch.dtype) -> Tensor:
    """The tensor of a slot that no part of the model is."""
    assert slot.fill is not None
    return torch.full(slot.shape, slot.fill, dtype=dtype)


def stored_dtype(model: PreTrainedModel) -> torch.dtype:
    """The dtype that a model is written in: its parameters', and where those differ the narrowest that holds all."""
    return reduce(torch.promote_types, {parameter.dtype for parameter in model.parameters()})


def _lazy(model: PreTrainedModel, slot: Slot, dtype: torch.dtype) -> LazyTensor:
    dtype = slot.dtype or dtype

    def make() -> Tensor:
        if slot.fill is not None:
            return constant(slot, dtype)
        tensor = slot.view(model).detach().to(dtype)
        return tensor if slot.factor == 1.0 else tensor * slot.factor

    return LazyTensor(slot.shape, dtype, make)


def _on_disk(name: str, *, twin: Twin | None, config: PreTrainedConfig) -> str:
    return family_of(config).on_disk(name) if twin is None else twin.layout.renamed(name)


def _are_tied(folder: ModelFolder, family: Family, *, said: bool, on_disk: Callable[[str], str]) -> bool:
    """Whether to tie input and output embeddings, given what the folder says of it.

    A stored output embedding that differs from the input embedding counts more than what is said; a warning says so.
    """
    embedding, head = on_disk(family.embedding), on_disk(family.head)
    if not said or head not in folder.tensors or embedding not in folder.tensors:
        return bool(said)
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


def _require_plausible(folder: ModelFolder, config: PreTrainedConfig, on_disk: Callable[[str], str]) -> None:
    """Compare the sizes that make a model large with what the files hold, before the model's skeleton is built."""
    family = family_of(config)
    embedding, shape = on_disk(family.embedding), (config.vocab_size, config.hidden_size)
    found = folder.tensors[embedding].shape if embedding in folder.tensors else None
    if found != shape:
        what = "is missing" if found is None else f"has the shape {list(found)}"
        raise ModelError(f"{folder.path}: {embedding} {what}, where config.json calls for {list(shape)}")
    for stack in family.stacks:
        count = getattr(config, stack.count)
        last = on_disk(stack.layer.format(layer=count - 1))
        if count < 1 or not any(name.startswith(f"{last}.") for name in folder.tensors):
            raise ModelError(f"{folder.path}: no tensor of {last}, where config.json says {stack.count}={count}")


def _require_routers(folder: ModelFolder, config: PreTrainedConfig, layers: Layers, twin: Twin | None) -> None:
    """Compare numbers of experts with what the files hold, before a list of all their tensors is made."""
    places = family_of(config).places(config)
    for layer, moe in layers.items():
        name = own_name(places[layer], "router.weight")
        if twin is not None:
            name = twin.layout.parts["router.weight"].format(layer=twin.layout.renamed(places[layer].layer))
        wanted, found = (moe.num_experts, moe.hidden_size), folder.tensors.get(name)
        if found is None or found.shape != wanted:
            what = "is missing" if found is None else f"has the shape {list(found.shape)}"
            raise ModelError(f"{folder.path}: {name} {what}, where config.json calls for {list(wanted)}")


def _ignored(folder: ModelFolder, model: PreTrainedModel, twin: Twin | None, *, expected: Collection[str]) -> list[str]:
    """Tensors of a folder that no part of the model is: what is computed, and what its class ignores.

    Warns of what the folder's architecture can use and we do not carry along.
    """
    patterns = (*RECOMPUTED, *(model._keys_to_ignore_on_load_unexpected or ()))
    others = [name for name in folder.tensors if name not in expected]
    unread = [name for name in others if twin is not None and twin.unread(name, folder.config, model.config)]
    if unread:
        warnings.warn(
            f"{folder.path}: {len(unread)} tensors of layers that predict later tokens ({unread[0]}, ...) are left out",
            stacklevel=3,
        )
    return unread + [name for name in others if any(re.search(pattern, name) for pattern in patterns)]


def _repeated(folder: ModelFolder, model: PreTrainedModel, on_disk: Callable[[str], str]) -> list[str]:
    """Names of what is tied to another tensor, and may be in a folder or not.

    Raises `ModelError` if it differs.
    """
    found = []
    first = {id(parameter): on_disk(name) for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        original, repeated = first[id(parameter)], on_disk(name)
        if repeated == original:
            continue
        found.append(repeated)
        if {original, repeated} <= folder.tensors.keys() and not torch.equal(
            folder.read(original), folder.read(repeated)
        ):
            raise ModelError(
                f"{folder.path}: {repeated} differs from {original}, to which this {model.config.model_type} model "
                "ties it; untie them in config.json if transformers supports that, or use another folder"
            )
    return found


def _why_constant(folder: ModelFolder) -> str:
    if folder.record is None:
        return "attention biases or shared experts like these are not supported yet"
    return (
        "moewright.json says it should be, so others changed it; delete moewright.json to load it by config.json alone"
    )
